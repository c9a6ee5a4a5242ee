"""What the tests of attention share: inputs for every kind of mask, the text of api.md §3 as slow dense code, and ways
to run the public functions on a chosen backend."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fastok import ScoreSpec, _library
from fastok.testing import Backend
from fastok.testing.examples import outputs, verify
from fastok.testing.examples.attention import cu, hidden_bias
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("attention", "attention_scores", "attention_with_scores")
SLOW = ("triton-interpreter", "cuda-on-host")  # a handful of cases each


@dataclass(frozen=True)
class Case:
    """Inputs of the public functions."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return self.q.dim() == 3

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.mask)


def sized(
    batch: int = 2, s: int = 17, t: int = 29, heads: int = 4, groups: int = 2, width: int = 32, v_width: int = 0,
    **mask: Any,
) -> Case:  # fmt: skip
    q = torch.randn(batch, s, heads, width)
    return Case(q, torch.randn(batch, t, groups, width), torch.randn(batch, t, groups, v_width or width), mask)


def packed(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], behind: int = 0, heads: int = 4, width: int = 32,
    **mask: Any,
) -> Case:  # fmt: skip
    q = torch.randn(sum(lengths_q) + behind, heads, width)
    k, v = torch.randn(2, sum(lengths_k) + behind, 2, width)
    if "key_bias" in mask:
        mask["key_bias"] = mask["key_bias"](*((heads,) if mask.pop("per_head", False) else ()), k.shape[0])
    return Case(q, k, v, {"cu_seqlens_q": cu(*lengths_q), "cu_seqlens_k": cu(*lengths_k), **mask})


def some_hidden(*shape: int) -> Tensor:
    """A bias that hides keys, and all keys of the first sample."""
    bias = hidden_bias(*shape)
    bias[0] = -math.inf
    return bias


MASKS: dict[str, Callable[[], Case]] = {
    "none": lambda: sized(),
    "causal-S<T": lambda: sized(causal=True),
    "causal-S=T": lambda: sized(s=37, t=37, causal=True, width=24),
    "causal-S>T": lambda: sized(s=29, t=17, causal=True),  # the first rows see nothing
    "window-left": lambda: sized(s=40, t=33, window=(6, -1)),
    "window-right": lambda: sized(s=33, t=40, window=(-1, 3)),
    "window-both": lambda: sized(s=35, t=41, window=(4, 2), width=40),
    "window-diagonal": lambda: sized(s=21, t=19, window=(0, 0)),
    "window-causal": lambda: sized(s=30, t=50, window=(9, 20), causal=True),
    "bias": lambda: sized(key_bias=torch.randn(2, 29)),
    "bias-hidden": lambda: sized(key_bias=some_hidden(2, 29)),
    "bias-heads": lambda: sized(key_bias=hidden_bias(2, 4, 29), causal=True),
    "softcap": lambda: sized(softcap=1.5, scale=0.7),
    "softcap-bias-window": lambda: sized(s=23, t=31, softcap=3.0, key_bias=some_hidden(2, 4, 31), window=(8, -1)),
    "mqa-two-widths": lambda: sized(heads=6, groups=1, width=72, v_width=40, causal=True),
    "one-row": lambda: sized(s=1, t=150, heads=8, width=64, causal=True),
    "several-tiles": lambda: sized(batch=1, s=140, t=203, width=64, causal=True),
    "tiles-bias": lambda: sized(
        batch=1, s=150, t=140, heads=2, width=128, window=(-1, 3), key_bias=torch.randn(1, 140)
    ),
    "wide": lambda: sized(batch=1, s=70, t=65, heads=2, groups=2, width=256, window=(30, 7)),
    "packed": lambda: packed((5, 0, 33, 1), (9, 12, 30, 0)),
    "packed-causal-behind": lambda: packed((0, 5, 20, 7, 0), (3, 9, 12, 7, 0), behind=4, causal=True),
    "packed-window": lambda: packed((40, 3), (35, 11), window=(5, 1), max_seqlen_q=40, max_seqlen_k=35),
    "packed-tiles": lambda: packed((70, 0, 3), (150, 20, 9), behind=3, heads=2, width=64, causal=True),
    "packed-bias": lambda: packed((4, 11), (9, 10), behind=2, key_bias=some_hidden, per_head=True, softcap=2.0),
}
over_masks = pytest.mark.parametrize("mask", MASKS)


def some_masks(backend: Backend, mask: str) -> None:
    """Skip all but a few masks on slow backends."""
    if backend.name in SLOW and mask not in (
        "causal-S>T",
        "window-both",
        "bias-heads",
        "mqa-two-widths",
        "packed-bias",
    ):
        pytest.skip("one of many on a slow backend")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tiny tensors, threads would cost most of the time. That they change nothing has tests of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- running the public functions ------------------------------------------------------------------------------------


@contextmanager
def through(backend: Backend, check: bool = True) -> Iterator[None]:
    """The public functions run on ``backend``; every result of an op is compared with the specification in fp64."""

    def on_backend(op: str) -> Callable[..., Any]:
        if op == "attention_with_scores" and not backend.name.startswith("cpu"):
            return _library.IN_PARTS[op][0]
        # Taken before the ops are replaced: on the CPU, a backend's op is the one of torch.ops.
        function = getattr(backend, op, None)

        def call(*arguments: Any) -> Any:
            if function is None:
                pytest.skip(f"{backend.name} has no {op}")
            result = function(*arguments)
            if check:
                verify(op, arguments, result)
            return result

        return call

    with _ops(on_backend):
        yield


@contextmanager
def in_fp64() -> Iterator[None]:
    """The public functions run the specification on doubled inputs and return fp64."""

    def doubled(op: str) -> Callable[..., Any]:
        specification: Any = _library.REFERENCE[op]

        def call(*arguments: Any) -> Any:
            return specification(
                *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
            )

        return call

    with _ops(doubled):
        yield


@contextmanager
def _ops(make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        made = {op: make(op) for op in OPS}
        for op, function in made.items():
            stack.enter_context(patch.object(torch.ops.fastok, op, function))
        yield


def flat(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The flat arguments with which a public function calls its (last) op."""
    seen: list[tuple[Any, ...]] = []

    def recorder(op: str) -> Callable[..., Any]:
        real = getattr(torch.ops.fastok, op)

        def call(*arguments: Any) -> Any:
            seen.append(arguments)
            return real(*arguments)

        return call

    with _ops(recorder), torch.no_grad():
        function(*args, **kwargs)
    return seen[-1]


def parts(result: Any) -> list[Tensor]:
    """All tensors of a public function's result."""
    return [t for x in (result if isinstance(result, tuple) else (result,)) for t in outputs(x)]


# ---- the text of api.md §3, in fp64, one sequence at a time ----------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """One sequence: ``q[S,H,D]``, ``k[T,H,D]``, ``v[T,H,*]`` (KV heads repeated), ``bias[H,T]``, and the masking."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: dict[str, Any]

    @property
    def visible(self) -> Tensor:
        """``[S,T]`` by position."""
        s, t = self.q.shape[0], self.k.shape[0]
        left, right = self.mask.get("window") or (-1, -1)
        if self.mask.get("causal"):
            right = 0
        rows = [
            [(left < 0 or j >= i + t - s - left) and (right < 0 or j <= i + t - s + right) for j in range(t)]
            for i in range(s)
        ]
        return torch.tensor(rows, dtype=torch.bool).reshape(s, t)

    @property
    def logits(self) -> Tensor:
        """``[H,S,T]``."""
        scale = self.mask.get("scale") or self.q.shape[-1] ** -0.5
        logits = torch.einsum("shd,thd->hst", self.q, self.k) * scale
        if self.mask.get("softcap"):
            logits = self.mask["softcap"] * torch.tanh(logits / self.mask["softcap"])
        return (logits + self.bias[:, None]).masked_fill(~self.visible, -math.inf)

    def attention(self) -> tuple[Tensor, Tensor]:
        """``out [S,H,*]`` and ``lse [H,S]``."""
        logits = self.logits
        hidden = (logits == -math.inf).all(-1)  # where the derivative of the log-sum-exp is not a number
        lse = logits.masked_fill(hidden[..., None], 0).logsumexp(-1).masked_fill(hidden, -math.inf)
        return torch.einsum("hst,thd->shd", softmax(logits), self.v), lse


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; 0 where everything is hidden. Differentiable there too."""
    hidden = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)


def sequences(case: Case, tail: bool = False) -> list[Sequence]:
    """The sequences of a case: its batch, or by ``cu_seqlens``; with ``tail`` the keys behind, which none sees."""
    q, k, v = (x.double() for x in case.qkv)
    ratio = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(ratio, -2), v.repeat_interleave(ratio, -2)
    bias = case.mask.get("key_bias")
    heads = q.shape[-2]
    if not case.packed:
        bias = torch.zeros(k.shape[:2]) if bias is None else bias
        every = [x.double() if x.dim() == 2 else x.double().expand(heads, -1) for x in bias.unbind()]
        return [Sequence(*one, case.mask) for one in zip(q, k, v, every, strict=True)]
    bias = (torch.zeros(len(k)) if bias is None else bias).double().expand(heads, -1)
    bounds_q, bounds_k = (list(pairwise(case.mask[name].tolist())) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    if tail:
        bounds_q, bounds_k = [*bounds_q, (0, 0)], [*bounds_k, (bounds_k[-1][1], len(k))]
    return [
        Sequence(q[a:b], k[c:d], v[c:d], bias[:, c:d], case.mask)
        for (a, b), (c, d) in zip(bounds_q, bounds_k, strict=True)
    ]


def dense_attention(case: Case) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` as :func:`fastok.attention` returns them, in fp64."""
    results = [sequence.attention() for sequence in sequences(case)]
    outs, lses = [out for out, _ in results], [lse for _, lse in results]
    if not case.packed:
        return torch.stack(outs), torch.stack(lses)
    behind = case.q.shape[0] - int(case.mask["cu_seqlens_q"][-1])
    outs.append(outs[0].new_zeros(behind, *outs[0].shape[1:]))
    lses.append(lses[0].new_full((lses[0].shape[0], behind), -math.inf))
    return torch.cat(outs), torch.cat(lses, -1)


def dense_scores(case: Case, spec: ScoreSpec) -> Tensor:
    """What ``spec`` exports, in fp64, from the dense matrix of each sequence."""
    groups = case.k.shape[-2]
    if not case.packed:
        return torch.stack([_export(one, spec, groups, False) for one in sequences(case)])
    return torch.cat([_export(one, spec, groups, True) for one in sequences(case, tail=True)], -1)


def _rows_of(spec: ScoreSpec, s: int, keep_places: bool) -> list[int | None]:
    """The selected rows of a sequence of ``s``; None for those that it does not have."""
    if isinstance(spec.rows, Tensor):
        return [row if row < s else None for row in spec.rows.tolist()]
    if isinstance(spec.rows, tuple):
        start, stop = spec.rows
        rows: list[int | None] = [*range(s)][start:stop]
        if keep_places and spec.reduce == "none":
            rows += [None] * (-start if stop is None else stop - start)
            rows = rows[: -start if stop is None else stop - start]
        return rows
    if spec.rows == "all":
        return [*range(s)]
    row = -1 if spec.rows == "last" else spec.rows
    row = row + s if row < 0 else row
    return [row if 0 <= row < s else None]


def _export(one: Sequence, spec: ScoreSpec, groups: int, in_pack: bool) -> Tensor:
    s, t = one.q.shape[0], one.k.shape[0]
    cols = slice(*spec.cols) if spec.cols else slice(None)
    logits = one.logits
    if spec.logits:
        x = logits[..., cols]
    elif spec.normalize == "cols":
        x = softmax(logits[..., cols])
    else:
        x = softmax(logits)[..., cols]
    nothing = -math.inf if spec.logits else 0.0
    if spec.value_norm:
        norm = one.v.abs().sum(-1) if spec.value_norm == "l1" else one.v.square().sum(-1).sqrt()
        x = torch.where(x == -math.inf, x, x * norm.T[:, None, cols])
    # heads; where rows are summed, hidden logits are left out of both sums
    summed = spec.reduce in ("sum", "mean")
    if spec.heads != "none":
        x = x.unflatten(0, (groups if spec.heads.startswith("group") else 1, -1))
        if spec.heads == "max":
            x = x.amax(1)
        else:
            count = x.shape[1]
            x = (x.masked_fill(x == -math.inf, 0) if summed else x).sum(1)
            x = x / count if spec.heads.endswith("mean") else x
    # rows
    rows = _rows_of(spec, s, in_pack)
    own = [row for row in rows if row is not None]
    if spec.reduce == "none":
        missing = x.new_full((x.shape[0], x.shape[-1]), nothing)
        picked = [missing if row is None else x[:, row] for row in (rows if in_pack else own)]
        x = torch.stack(picked, 1) if picked else x[:, :0]
    else:
        x = x[:, own]
        if spec.reduce == "max":
            x = torch.cat([x, x.new_full((x.shape[0], 1, x.shape[-1]), nothing)], 1).amax(1)
        else:
            x = x.masked_fill(x == -math.inf, 0).sum(1) / (max(len(own), 1) if spec.reduce == "mean" else 1)
    # normalise
    if spec.normalize == "visible":
        x = x / one.visible[own].sum(0)[cols].clamp(min=1)
    elif spec.normalize == "causal":
        x = x / (t - torch.arange(t))[cols]
    if spec.pool:
        half = spec.pool // 2
        padded = torch.cat([x.new_zeros(*x.shape[:-1], half), x, x.new_zeros(*x.shape[:-1], half)], -1)
        x = sum(padded[..., i : i + x.shape[-1]] for i in range(spec.pool)) / spec.pool
    return x[0] if spec.heads in ("mean", "sum", "max") else x
