"""Whole models: a ViT with ToMe against the same ViT without it. The target is 95 % of what the saved FLOPs promise."""

from collections.abc import Callable
from typing import Any

import fastok
import torch
from fastok.testing.bench import Case
from transformers import ViTConfig, ViTModel

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
R = 23


def flops(tokens_in: list[int], tokens_out: list[int], width: int, mlp: int) -> float:
    """Of all blocks for one image: attention sees a layer's tokens before merging, the MLP those after."""
    total = 0.0
    for before, after in zip(tokens_in, tokens_out, strict=True):
        total += 2 * before * 4 * width**2 + 4 * before**2 * width + 2 * after * 2 * width * mlp
    return total


def cases(device: torch.device) -> list[Case]:
    config = ViTConfig(**LARGE, image_size=384, patch_size=16, attn_implementation="sdpa")
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    plain = ViTModel(config, add_pooling_layer=False).eval().to(device, dtype)
    merged = ViTModel(config, add_pooling_layer=False).eval().to(device, dtype)
    handle = fastok.apply(merged, fastok.reducers.ToMe(r=R))
    layers, patches = config.num_hidden_layers, (384 // 16) ** 2
    with torch.inference_mode():
        merged(torch.randn(1, 3, 384, 384, device=device, dtype=dtype))
    after = [int(count) for count in handle.stats.tokens]
    before = [patches + 1, *after[:-1]]
    whole = flops([patches + 1] * layers, [patches + 1] * layers, 1024, 4096)
    reduced = flops(before, after, 1024, 4096)

    def forward(model: torch.nn.Module, batch: int) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            pixels = torch.randn(batch, 3, 384, 384, device=device, dtype=dtype)

            @torch.inference_mode()
            def run() -> Any:
                return model(pixels)

            return run

        return build

    ratio = whole / reduced
    models = [
        Case(
            f"ViT-L/16-384 ToMe r={R}, batch {batch}, FLOP ratio {ratio:.2f}",
            forward(merged, batch),
            forward(plain, batch),
            "the same model unreduced",
            flops=batch * reduced,
            dtype=dtype,
            target=0.95 * ratio,
        )
        for batch in (1, 4)
    ]
    return [*models, overhead(device)]


def overhead(device: torch.device) -> Case:
    """What a token-map layer costs when there is nothing to compute: Python and dispatch."""
    metric, x = torch.randn(1, 16, 64, device=device), torch.randn(1, 16, 64, device=device)

    def ours() -> Callable[[], Any]:
        return lambda: fastok.bipartite_match(metric, 4, protect=1).merge(x)

    def layer_norm() -> Callable[[], Any]:
        return lambda: torch.nn.functional.layer_norm(x, (64,))

    return Case(
        "match+merge at N=16: Python, dispatch", ours, layer_norm, "a layer_norm call",
        target_us=60.0 if device.type == "cpu" else None, on_host=True,
    )  # fmt: skip
