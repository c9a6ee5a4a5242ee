"""What the tests of caches for transformers share: a small random model, prompts, padding, and what every cache can."""

from collections.abc import Callable
from typing import Any

import fastok
import torch
from fastok import Code, KVFormat, PackedCache
from fastok.sparse import (
    Calibration,
    DoubleSparseCache,
    EMASinkCache,
    H2OCache,
    PyramidKVCache,
    RazorCache,
    SnapKVCache,
    StreamingCache,
    TidalCache,
)
from fastok.testing import assert_same
from torch import Tensor

LAYERS, H, G, D = 4, 4, 2, 16
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": H * D, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Make = Callable[[Any], Any]
"""From a model to a cache for it."""

FORMAT = KVFormat(Code(4, "channel"), Code(4, "token"), group=8, page=8, hot=8)
CHANNELS = Calibration(torch.arange(4).expand(LAYERS, G, 4).contiguous(), "qk", "", "")
HEADS = torch.tensor([[True, False], [False, False], [False, True], [True, True]])

CACHES: dict[str, Make] = {
    "packed": lambda model: PackedCache(FORMAT, model),
    "double sparsity": lambda model: DoubleSparseCache(CHANNELS, 8, recent=2),
    "offloaded": lambda model: DoubleSparseCache(CHANNELS, 8, recent=2, offload=True),
    "tidal": lambda model: TidalCache(8, select_layers=(1,)),
    "snapkv": lambda model: SnapKVCache(16, window=4),
    "pyramidkv": lambda model: PyramidKVCache(16, LAYERS, window=4, beta=4),
    "h2o": lambda model: H2OCache(6, 5),
    "razor": lambda model: RazorCache(HEADS, sink=2, recent=6),
    "streaming": lambda model: StreamingCache(2, 8, model),
    "streaming without model": lambda model: StreamingCache(2, 8),
    "ema": lambda model: EMASinkCache(2, 8, 0.9, model),
}


def build(attention: str = "fastok", kind: str = "Llama", **changes: Any) -> Any:
    """A random model, always the same one for the same arguments."""
    import transformers

    fastok.register_transformers()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes, attn_implementation=attention)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens, no padding."""
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, cache: Any, tokens: Tensor, cuts: tuple[int, ...] = (), mask: Tensor | None = None) -> Tensor:
    """Logits of ``tokens`` given in pieces that end at ``cuts``, after what the cache holds."""
    logits = []
    done = cache.get_seq_length()
    for begin, end in zip((0, *cuts), (*cuts, tokens.shape[1]), strict=True):
        options: dict[str, Any] = {}
        if mask is not None:
            position = (mask.cumsum(1) - 1).clamp(min=0)
            options = {
                "attention_mask": mask[:, : done + end], "position_ids": position[:, done + begin : done + end],
            }  # fmt: skip
        logits.append(model(tokens[:, begin:end], past_key_values=cache, **options).logits)
    return torch.cat(logits, 1)


def turned(x: Tensor, place: Tensor) -> Tensor:
    """``x[…,T,D]`` with Llama's rotary embedding at ``place[T]``."""
    angle = place[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def emulated(model: Any, tokens: Tensor, cuts: tuple[int, ...], attend: Attend, rope: bool = True) -> Tensor:
    """Logits of one stream ``[T]`` given to a Llama in pieces, with another attention, in plain PyTorch.

    ``attend(layer, q[H,S,D], k[H,S,D], v[H,S,D]) -> [H,S,D]`` keeps what it needs of earlier pieces.
    """
    logits = []
    for begin, end in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        x = model.model.embed_tokens(tokens[begin:end])
        for index, layer in enumerate(model.model.layers):
            states, own = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                project(states).view(end - begin, -1, D).transpose(0, 1)
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            if rope:
                q, k = (turned(y, torch.arange(begin, end, dtype=x.dtype)) for y in (q, k))
            k, v = k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)
            x = x + own.o_proj(attend(index, q, k, v).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(model.lm_head(model.model.norm(x)))
    return torch.cat(logits)


def left_padding(tokens: Tensor, *missing: int) -> Tensor:
    """A mask that hides the first so many tokens of each sample."""
    return (torch.arange(tokens.shape[1]) >= torch.tensor(missing)[:, None]).long()


def check_room_for_everything_changes_nothing(make: Make, **options: Any) -> None:
    """Greedy and beam search give what they give without a cache of ours."""
    model, prompt = build(**options), ids(2, 20)
    for beams in (1, 3):
        how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert_same(model.generate(prompt, past_key_values=make(model), **how), model.generate(prompt, **how))


def check_batches(make: Make) -> None:
    """Batches repeated, selected and reordered go on as the samples would have."""
    model, tokens, more = build(), ids(3, 40), ids(6, 5, seed=2)
    cache = make(model)
    run(model, cache, tokens)
    cache.batch_repeat_interleave(2)
    got = run(model, cache, more, (1, 2))
    cache.reorder_cache(torch.tensor([3, 3, 0, 5, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    last = run(model, cache, ids(2, 1, seed=3))
    for row in range(6):
        alone = make(model)
        run(model, alone, tokens[row // 2 : row // 2 + 1])
        same = run(model, alone, more[row : row + 1], (1, 2))
        assert_close(got[row : row + 1], same)
        if row in (0, 3):
            place = int(row == 0)
            assert_close(last[place : place + 1], run(model, alone, ids(2, 1, seed=3)[place : place + 1]))


def check_sampling_and_conversation(make: Make) -> None:
    """``generate`` samples, and goes on where it was; `reset` forgets."""
    model = build()
    cache = make(model)
    first = model.generate(ids(2, 30), past_key_values=cache, max_new_tokens=6, do_sample=True)
    assert first.shape == (2, 36)
    assert cache.get_seq_length() == 35
    second = model.generate(torch.cat([first, ids(2, 12, seed=3)], 1), past_key_values=cache, max_new_tokens=4)
    assert second.shape == (2, 52)
    assert cache.get_seq_length() == 51
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = make(model)
    assert_same(run(model, cache, ids(1, 30), (20, 21)), run(model, fresh, ids(1, 30), (20, 21)))


def assert_close(got: Tensor, wanted: Tensor, error: float = 2e-6) -> None:
    """Equal up to a few roundings of fp32 (logits of these models are below 1)."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max().item() <= error
