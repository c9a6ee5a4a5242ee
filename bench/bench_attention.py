"""Attention against PyTorch's own, and what its scores cost beside it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import fastok
import torch
from fastok import ScoreSpec
from fastok.testing.bench import Case
from rivals import attention_eager

SHAPES = [  # B, S, H, G, D, causal
    (8, 577, 12, 12, 64, False),
    (1, 2048, 16, 4, 128, True),
]
# What is asked for beside the output, and how much longer than attention alone that may take.
SCORES = [("all rows", ScoreSpec(), 1.6), ("last 64 rows", ScoreSpec(rows=(-64, None)), 1.1),
          ("last row", ScoreSpec(rows="last"), 1.02)]  # fmt: skip

Shape = tuple[int, int, int, int, int, bool]
Build = Callable[[], Callable[[], Any]]


def cases(device: torch.device) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16)
    found = []
    for dtype in dtypes:
        for shape in SHAPES:
            found += cases_of(shape, dtype, device)
    return found + decoding(device)


def decoding(device: torch.device) -> list[Case]:
    """One query of 32 heads against 8 KV heads: bound by reading the keys and values."""
    heads, groups, width, n, dtype = 32, 8, 128, 32768, torch.bfloat16

    def over(function: Callable[..., Any]) -> Build:
        def build() -> Callable[[], Any]:
            q = torch.randn(1, 1, heads, width, device=device).to(dtype)
            k, v = torch.randn(2, 1, n, groups, width, device=device).to(dtype)
            return lambda: function(q, k, v)

        return build

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
        )

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = q.view(1, groups, heads // groups, width) @ k.permute(0, 2, 3, 1) * width**-0.5
        return (logits.softmax(-1) @ v.transpose(1, 2)).view(1, 1, heads, width)

    moved = 2.0 * n * groups * width * dtype.itemsize
    where = f"(1,1,{heads}/{groups},{width}), T {n}, {str(dtype).removeprefix('torch.')}"
    return [
        Case(f"decoding {where}", over(fastok.attention), over(rival), name, bytes_moved=moved, dtype=dtype)
        for name, rival in (("SDPA", sdpa), ("grouped matmul", grouped))
    ]


def cases_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Case]:
    batch, n, heads, groups, width, causal = shape
    flops = 4.0 * batch * heads * n * n * width / (2 if causal else 1)
    where = f"({batch},{n},{heads}/{groups},{width}{',causal' if causal else ''}) {str(dtype).removeprefix('torch.')}"

    def over(function: Callable[..., Any]) -> Build:
        def build() -> Callable[[], Any]:
            q, k, v = (torch.randn(batch, n, h, width, device=device).to(dtype) for h in (heads, groups, groups))
            return lambda: function(q, k, v)

        return build

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=heads != groups
        )

    def gradients(function: Callable[..., torch.Tensor], with_forward: bool = False) -> Build:
        def build() -> Callable[[], Any]:
            q, k, v = (
                torch.randn(batch, n, h, width, device=device).to(dtype).requires_grad_()
                for h in (heads, groups, groups)
            )
            out = function(q, k, v)
            grad = torch.randn_like(out)
            if with_forward:
                return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)
            return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return build

    def ours_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastok.attention(q, k, v, causal=causal)[0]

    ours = over(partial(fastok.attention, causal=causal))
    target = None if device.type != "cpu" else 1.0 if dtype == torch.float32 else 2.5
    found = [
        Case(f"attention {where}", ours, over(sdpa), "SDPA", flops=flops, dtype=dtype, target=target),
        Case(
            f"attention backward {where}", gradients(ours_alone), gradients(sdpa), "SDPA backward", flops=2.5 * flops,
            dtype=dtype, target=1.0 if device.type == "cpu" else None,
        ),
        Case(
            f"attention forward and backward {where}", gradients(ours_alone, True), gradients(sdpa, True), "SDPA",
            flops=3.5 * flops, dtype=dtype, target=1.0 if device.type == "cpu" else None,
        ),
        Case(
            f"attention + column sums {where}",
            over(partial(fastok.attention_with_scores, causal=causal)),
            over(partial(attention_eager.attention_with_column_sums, causal=causal)),
            "eager softmax matrix", flops=flops, dtype=dtype, target=2.5,
        ),
    ]  # fmt: skip
    for title, spec, most in SCORES:
        with_scores = over(partial(fastok.attention_with_scores, causal=causal, scores=(spec,)))
        found.append(
            Case(f"with scores of {title} {where}", with_scores, ours, "our attention alone", dtype=dtype,
                 target=1 / most)
        )  # fmt: skip
    return found
