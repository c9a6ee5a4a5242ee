"""``generate()`` behind a long prompt: packed keys and values against transformers' own caches.

Llamas of two layers with the widths of Qwen3-0.6B (of 28 layers) and of Llama 3.1 8B (of 32), and as large a share of
the vocabulary. Weights, keys and values are random; caches are filled with the prompt's directly. What the model itself
takes, its weights above all, is the same on both sides and bounds the ratio: 6.3 of our 8.1 ms a token in the first,
all but 1 or 2 of 62 in the second, where no cache can make generating five times as fast (quiet machine of 2 cores).
Rivals that quantize are measured where their package is there (requirements/bench.txt).
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import fastok
import torch
from fastok.testing.bench import Case
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.initialization import no_init_weights

PROMPT, TOKENS, LAYERS = 8192, 16, 2
GROUPS, WIDTH = 8, 128
SMALL, LARGE = "Qwen3-0.6B", "Llama-3.1-8B"
MODELS = {
    SMALL: {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "vocab_size": 10852},
    LARGE: {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 8016},
}
DENSE, QUANTIZED = 1.0, 5.0
AXIS = {"hqq": 1, "quanto": 0}  # groups of 64 neighbouring channels, in both

Build = Callable[[], Callable[[], Any]]


def cases(device: torch.device) -> list[Case]:
    fastok.register_transformers()
    found = []
    for size in MODELS:
        where = f"generate {TOKENS} tokens T={PROMPT} {size}"
        for name in ("kivi-2", "vidkv-1.5/1.58"):
            ours = generating("fastok", size, lambda model, name=name: fastok.PackedCache(name, model), device)
            rival = generating("sdpa", size, lambda model: DynamicCache(config=model.config), device)
            promised = name == "kivi-2"
            found.append(Case(f"{name} {where}", ours, rival, "DynamicCache, sdpa", target=DENSE if promised else None))
        for backend, axis in AXIS.items():
            if importlib.util.find_spec({"hqq": "hqq", "quanto": "optimum"}[backend]) is None:
                continue
            ours = generating("fastok", size, lambda model: fastok.PackedCache("kivi-2", model), device)
            how = {"backend": backend, "nbits": 2, "axis_key": axis, "axis_value": axis, "q_group_size": 64}
            rival = generating("sdpa", size, lambda model, how=how: QuantizedCache(config=model.config, **how), device)
            found.append(Case(f"kivi-2 {where}", ours, rival, f"QuantizedCache, 2-bit {backend}", target=QUANTIZED))
    return found


@cache
def build(size: str, attention: str, device: torch.device) -> Any:
    """The model; both attention implementations have the same weights."""
    config = LlamaConfig(
        **MODELS[size], num_key_value_heads=GROUPS, head_dim=WIDTH, num_hidden_layers=LAYERS,
        max_position_embeddings=2 * PROMPT, attn_implementation=attention, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    with no_init_weights(), torch.device(device):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    if attention == "fastok":
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    else:
        model.load_state_dict(build(size, "fastok", device).state_dict(), assign=True)
    return model


def generating(attention: str, size: str, make: Callable[[Any], Cache], device: torch.device) -> Build:
    """``generate`` goes on behind a filled cache, which grows a little with every call."""

    def ready() -> Callable[[], Any]:
        model = build(size, attention, device)
        held = make(model)
        shape = 1, GROUPS, PROMPT, WIDTH
        for layer in range(LAYERS):
            held.update(*(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)), layer)

        @torch.inference_mode()
        def run() -> Any:
            ids = torch.ones(1, held.get_seq_length() + 1, dtype=torch.int64, device=device)
            return model.generate(ids, past_key_values=held, max_new_tokens=TOKENS, do_sample=False)

        return run

    return ready
