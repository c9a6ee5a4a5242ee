"""A LLaVA-1.5-7B-shaped model of fewer layers: 576 image tokens, 64 kept, prefill against the same model unreduced.

Widths, heads and MLPs are those of the 7B model and its CLIP-L/14-336 tower. Of the decoder's layers and of the
vocabulary, which costs the same however long a prompt is, there is a sixteenth; of the tower a twelfth. Weights are
random. The FLOPs are those of a whole projector, though reducers that go by scores leave less to project. The promises:
90 % of what the saved FLOPs promise, and a reducer (with merging) that takes 1 % of the unreduced prefill.
"""

import copy
from collections.abc import Callable
from typing import Any

import fastok
import torch
from fastok.reducers import TokenContext
from fastok.testing.bench import Case, time_us
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

DECODER, TOWER, IMAGE = 2, 2, 2000
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 2004}
N, KEEP, BEFORE, BEHIND = 576, 64, 35, 25
METHODS = [
    fastok.reducers.FasterVLM(keep=KEEP),
    fastok.reducers.DivPrune(keep=KEEP),
    fastok.reducers.ToDRE(keep=KEEP),
    fastok.reducers.VTCCLS(keep=KEEP, start=0),
    fastok.reducers.FoPru(keep=KEEP),
    fastok.reducers.HiRED(keep=KEEP),
    fastok.reducers.GlobalCom2(keep=KEEP),
    fastok.reducers.HiPrune(keep=KEEP),
    fastok.reducers.VisionZip(dominant=KEEP - 10, contextual=10),
    fastok.reducers.MMTok(keep=KEEP),
    fastok.reducers.RecoverableCompression(),
    fastok.reducers.TokenCorr(),
    fastok.reducers.AveragePool(stride=N // KEEP),
    fastok.reducers.FourierPool(keep=KEEP),
]


class Noting:
    """Another reducer, and what it was shown last."""

    def __init__(self, reducer: Any) -> None:
        self.reducer = reducer
        self.needs = reducer.needs
        self.ctx: TokenContext | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "reducer":
            raise AttributeError(name)
        return getattr(self.reducer, name)

    def __call__(self, ctx: TokenContext) -> Any:
        self.ctx = ctx
        return self.reducer(ctx)


def prefill_flops(tokens: int) -> float:
    """Of vision tower, projector and language model for a prompt of ``tokens``, image included."""
    width, mlp = VISION["hidden_size"], VISION["intermediate_size"]
    patches = N + 1
    total = TOWER * (2.0 * patches * (4 * width**2 + 2 * width * mlp) + 4 * patches**2 * width)
    hidden = TEXT["hidden_size"]
    total += 2.0 * N * (width * hidden + hidden**2)
    per_layer = 2.0 * tokens * (4 * hidden**2 + 3 * hidden * TEXT["intermediate_size"]) + 2 * tokens**2 * hidden
    return total + DECODER * per_layer + 2.0 * hidden * TEXT["vocab_size"]


def build(device: torch.device, dtype: torch.dtype) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, num_hidden_layers=TOWER),
        text_config=LlamaConfig(**TEXT, num_hidden_layers=DECODER),
        image_token_index=IMAGE,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the weights are never there in a wider one
    try:
        with device, no_init_weights():
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    return model


def sharing_weights(model: nn.Module) -> Any:
    """A copy of the modules with the same parameters."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters()})


def cases(device: torch.device) -> list[Case]:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    plain = build(device, dtype)
    ids = torch.randint(3, IMAGE, (1, BEFORE + N + BEHIND), device=device)
    ids[:, BEFORE : BEFORE + N] = IMAGE
    pixels = torch.randn(1, 3, 336, 336, device=device, dtype=dtype)

    def prefill(model: Any) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            return model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

        return run

    prefill(plain)()
    whole_us = time_us(prefill(plain), device)
    whole, left = (prefill_flops(BEFORE + BEHIND + count) for count in (N, KEEP))
    methods = []
    for reducer in METHODS:
        noting = Noting(reducer)
        with fastok.apply(plain, noting):
            prefill(plain)()
        methods.append(alone(type(reducer).__name__, noting, whole_us))
    models = []
    for reducer in METHODS[:2]:
        reduced = sharing_weights(plain)
        fastok.apply(reduced, reducer)
        models.append(
            Case(
                f"LLaVA-1.5-7B shape, {DECODER} layers, {type(reducer).__name__}, FLOP ratio {whole / left:.2f}",
                lambda model=reduced: prefill(model),
                lambda: prefill(plain),
                "the same model unreduced",
                flops=left,
                dtype=dtype,
                target=0.9 * whole / left,
            )
        )
    return [*models, *methods]


def alone(name: str, noting: Noting, whole_us: float) -> Case:
    """The reducer and merging, without the model: as much as 1 % of the prefill."""
    ctx = noting.ctx
    assert ctx is not None

    def ours() -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            return noting.reducer(ctx).merge(ctx.hidden)

        return run

    def copying() -> Callable[[], Any]:
        return lambda: ctx.hidden.clone()

    return Case(
        f"{name} on {' x '.join(map(str, ctx.hidden.shape[1:]))}, alone",
        ours,
        copying,
        "a copy of the tokens",
        target_us=whole_us / 100,
    )
