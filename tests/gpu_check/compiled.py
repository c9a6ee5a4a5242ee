"""Stage 7: torch.compile(fullgraph=True) of every op, and of a small ViT of each family with its tokens merged."""

import importlib
import time
from collections.abc import Callable
from functools import partial

import fastok
import torch
from fastok.testing import assert_same
from fastok.testing.examples import Example, examples, moved, outputs
from torch import Tensor, nn

from .device import attempt
from .record import Record, one_line

BACKEND = "inductor"
SIZE, PATCH, WIDTH = 64, 8, 64


def run(record: Record, device: str = "cuda") -> None:
    checks: dict[str, Callable[[], None]] = {}
    for example in examples("small"):
        checks[example.op] = partial(check_op, example, device)
    for name, build in (("timm ViT", timm_vit), ("transformers ViT", transformers_vit)):
        try:
            model = build()
        except ImportError as error:
            record.append("not_here", f"{name}: {one_line(error)}")
            continue
        checks[f"{name} with ToMe"] = partial(check_model, *model, device)
    done = 0
    for name, check in checks.items():
        start = time.monotonic()
        torch.compiler.reset()  # what was compiled for one does not count against another's recompilations
        done += attempt(record, name, check)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        record.update(f"{done} compiled, {len(record.failures)} problems")


def check_op(example: Example, device: str) -> None:
    """Compiled and eager give the same bits."""
    op = getattr(torch.ops.fastok, example.op)
    arguments = moved(example.arguments(torch.float16), device)
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend=BACKEND)
    for got, wanted in zip(outputs(compiled(*arguments)), outputs(op(*arguments)), strict=True):
        assert_same(got, wanted, example.op)


def timm_vit() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    importlib.import_module("torchvision_shim")
    vision_transformer = importlib.import_module("timm.models.vision_transformer")
    model = vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0
    )
    return model, lambda model, pixels: model(pixels)


def transformers_vit() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    transformers = importlib.import_module("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        image_size=SIZE, patch_size=PATCH, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return model, lambda model, pixels: model(pixels).last_hidden_state


def check_model(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], device: str) -> None:
    """A patched model compiles without a graph break and gives what it gives uncompiled, to rounding."""
    torch.manual_seed(0)
    model = model.eval().to(device)
    pixels = torch.randn(2, 3, SIZE, SIZE, device=device)
    with fastok.apply(model, fastok.reducers.ToMe(r=8)) as handle, torch.inference_mode():
        wanted = call(model, pixels)
        assert handle.stats.tokens == [57, 49], handle.stats.tokens
        got = call(torch.compile(model, fullgraph=True, backend=BACKEND), pixels)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
