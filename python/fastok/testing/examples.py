"""Example inputs of every op, from small to large: what is repeated, captured, compiled, sanitized and timed.

A new op joins by a few :func:`example` functions here. Inputs are made on the CPU, so that a device receives them by
copies alone, and similarities are exact in every dtype, so that results can be compared bitwise however they were
computed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import _library, reference
from .compare import assert_accurate, assert_same

Size = Literal["small", "awkward", "large"]
Arguments = tuple[Any, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Example:
    """Arguments for one op, of the same shapes whatever the seed.

    Attributes:
        op: the op's name.
        size: ``"large"`` fills a GPU; the others are quick enough for a checker that slows kernels down a hundredfold.
        title: what is special about them.
        build: makes the flat arguments of ``torch.ops.fastok.<op>`` for a dtype, from torch's random state.
        copies: the op must copy an input (its last dimension is not contiguous), and so allocates more than outputs.
        flops: of the matrix product in it, if that is what takes the time.
    """

    op: str
    size: Size
    title: str
    build: Callable[[torch.dtype], Arguments]
    copies: bool = False
    flops: float = 0.0

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """The same arguments for the same ``dtype`` and ``seed``, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(dtype)

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"{self.op} {self.size}: {self.title}"


EXAMPLES: dict[str, list[Example]] = {}


def example(op: str, size: Size, title: str, *, copies: bool = False, flops: float = 0.0) -> Callable[[Any], Any]:
    """Decorator: register a function from dtype to arguments as an example of ``op``."""

    def register(build: Callable[[torch.dtype], Arguments]) -> Callable[[torch.dtype], Arguments]:
        EXAMPLES.setdefault(op, []).append(Example(op, size, title, build, copies, flops))
        return build

    return register


def examples(*sizes: Size) -> Iterator[Example]:
    """All examples of all ops, or those of the given sizes."""
    for of_op in EXAMPLES.values():
        yield from (one for one in of_op if not sizes or one.size in sizes)


def moved(arguments: Arguments, device: str | torch.device) -> Arguments:
    """``arguments`` on ``device`` with their strides and offsets: ``Tensor.to`` makes views contiguous."""

    def move(x: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return tuple(move(x) if isinstance(x, Tensor) else x for x in arguments)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An op's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def verify(op: str, arguments: Arguments, result: Tensor | tuple[Tensor, ...]) -> None:
    """AssertionError unless ``result`` is what the specification gives for ``arguments``, all on the CPU."""
    specification = cast(Callable[..., Any], _library.REFERENCE[op])
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    wanted, truth = outputs(specification(*arguments)), outputs(specification(*doubled))
    for place, (got, peer, exact) in enumerate(zip(outputs(result), wanted, truth, strict=True)):
        if got.is_floating_point():
            assert_accurate(got, exact, peer, name=f"{op}'s result {place}")
        else:
            assert_same(got, peer, f"{op}'s result {place}")


def signs(*shape: int) -> Tensor:
    """±1 entries: with a width that is a power of 4 all norms and cosines are exact, so ties are ties everywhere."""
    return torch.randint(0, 2, shape).float() * 2 - 1


def odd_view(x: Tensor) -> Tensor:
    """The values of ``x[B,N,C]`` in the middle of NaN, at an odd offset and with odd strides."""
    batch, n, width = x.shape
    room = torch.full((batch, n + 1, width + 4), math.nan, dtype=x.dtype)
    room[:, 1:, 3 : width + 3] = x
    return room[:, 1:, 3 : width + 3]


def odd_width(*shape: int) -> Tensor:
    """Signs and three columns of zeros: an odd width at which cosines are still exact."""
    return torch.nn.functional.pad(signs(*shape), (0, 3))


def random_map(batch: int, n: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(assign, offsets, members)`` with dropped tokens, empty slots and slots of many members."""
    slots = torch.randint(-1, max(n_out, 1), (batch, n)).clamp(max=n_out - 1)
    assign = torch.where(torch.rand(batch, n) < 0.2, min(2, n_out - 1), slots).int()
    return assign, *reference.build_map(assign, n_out)


# ---- bipartite_match: metric, r, protect, threshold, bias, src, dst, sorted_order, static_shape ----------------------


@example("bipartite_match", "small", "class token")
def _match_small(dtype: torch.dtype) -> Arguments:
    return signs(2, 17, 16).to(dtype), 4, 1, None, None, None, None, False, True


@example("bipartite_match", "awkward", "odd view, bias, NaN tokens, sorted")
def _match_view(dtype: torch.dtype) -> Arguments:
    metric = torch.where(torch.rand(3, 131, 1) < 0.1, math.nan, odd_width(3, 131, 64))
    bias = torch.randint(-2, 3, (3, 131)).float()
    return odd_view(metric.to(dtype)), 40, 2, None, bias, None, None, True, True


@example("bipartite_match", "awkward", "pairs of each sample, threshold")
def _match_pairs(dtype: torch.dtype) -> Arguments:
    order = torch.stack([torch.randperm(90) for _ in range(2)])
    return signs(2, 90, 16).to(dtype), 30, 1, 0.1, None, order[:, :40], order[:, 40:85], False, True


@example("bipartite_match", "awkward", "wide, last dimension not contiguous", copies=True)
def _match_wide(dtype: torch.dtype) -> Arguments:
    return signs(1, 1024, 150).to(dtype).mT, 70, 0, None, None, None, None, False, True


@example("bipartite_match", "awkward", "too many tokens for one block")
def _match_many(dtype: torch.dtype) -> Arguments:
    return signs(1, 4200, 16).to(dtype), 2000, 1, None, None, None, None, False, True


@example("bipartite_match", "large", "(8,197,64), r=16", flops=2 * 8 * 99 * 98 * 64)
def _match_base(dtype: torch.dtype) -> Arguments:
    return signs(8, 197, 64).to(dtype), 16, 1, None, None, None, None, False, True


@example("bipartite_match", "large", "(1,4096,256), r=2048", flops=2 * 2048**2 * 256)
def _match_image(dtype: torch.dtype) -> Arguments:
    return signs(1, 4096, 256).to(dtype), 2048, 0, None, None, None, None, False, True


# ---- nearest: x, y, k, similarity, mask ------------------------------------------------------------------------------


@example("nearest", "small", "cosine, k=1")
def _nearest_small(dtype: torch.dtype) -> Arguments:
    return signs(2, 7, 16).to(dtype), signs(2, 9, 16).to(dtype), 1, "cosine", None


@example("nearest", "awkward", "odd views, euclidean, k=5, a sample without candidates")
def _nearest_list(dtype: torch.dtype) -> Arguments:
    mask = torch.rand(2, 133) < 0.7
    mask[1] = False
    return odd_view(odd_width(2, 70, 64).to(dtype)), odd_view(odd_width(2, 133, 64).to(dtype)), 5, "euclidean", mask


@example("nearest", "awkward", "odd views, dot, k=1, NaN tokens")
def _nearest_dot(dtype: torch.dtype) -> Arguments:
    y = torch.where(torch.rand(2, 140, 1) < 0.1, math.nan, odd_width(2, 140, 256))
    return odd_view(odd_width(2, 66, 256).to(dtype)), odd_view(y.to(dtype)), 1, "dot", None


@example("nearest", "large", "(4,2048,64) in as many, cosine, k=1", flops=2 * 4 * 2048**2 * 64)
def _nearest_large(dtype: torch.dtype) -> Arguments:
    return signs(4, 2048, 64).to(dtype), signs(4, 2048, 64).to(dtype), 1, "cosine", None


@example("nearest", "large", "(4,1024,64) in as many, euclidean, k=8", flops=2 * 4 * 1024**2 * 64)
def _nearest_large_list(dtype: torch.dtype) -> Arguments:
    return signs(4, 1024, 64).to(dtype), signs(4, 1024, 64).to(dtype), 8, "euclidean", None


# ---- build_map: assign, n_out ----------------------------------------------------------------------------------------


@example("build_map", "small", "dropped tokens")
def _map_small(dtype: torch.dtype) -> Arguments:
    return random_map(3, 50, 20)[0], 20


@example("build_map", "awkward", "more slots than tokens")
def _map_sparse(dtype: torch.dtype) -> Arguments:
    return random_map(2, 131, 700)[0], 700


@example("build_map", "awkward", "more slots than shared memory holds")
def _map_many(dtype: torch.dtype) -> Arguments:
    return random_map(1, 3000, 70_000)[0], 70_000


@example("build_map", "large", "(8,4096) to 2048")
def _map_large(dtype: torch.dtype) -> Arguments:
    return random_map(8, 4096, 2048)[0], 2048


# ---- merge: x, assign, offsets, members, size, mode ------------------------------------------------------------------


@example("merge", "small", "mean, sizes")
def _merge_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 37, 24).to(dtype), *random_map(2, 37, 20), torch.randint(0, 4, (2, 37)).float(), "mean"


@example("merge", "awkward", "odd view, max, special values")
def _merge_max(dtype: torch.dtype) -> Arguments:
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[torch.randint(4, (3, 61, 67))]
    x = torch.where(torch.rand(3, 61, 67) < 0.1, special, torch.randn(3, 61, 67))
    return odd_view(x.to(dtype)), *random_map(3, 61, 30), None, "max"


@example("merge", "awkward", "odd view, sum into one slot")
def _merge_sum(dtype: torch.dtype) -> Arguments:
    assign = torch.zeros(2, 133, dtype=torch.int32)
    return odd_view(torch.randn(2, 133, 131).to(dtype)), assign, *reference.build_map(assign, 3), None, "sum"


@example("merge", "awkward", "first, last dimension not contiguous", copies=True)
def _merge_first(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 64, 41).to(dtype).mT, *random_map(2, 41, 12), None, "first"


@example("merge", "large", "(8,197,768) to 181, mean, sizes")
def _merge_base(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 197, 768).to(dtype), *random_map(8, 197, 181), torch.rand(8, 197), "mean"


@example("merge", "large", "(8,4096,1024) to 2048, sum")
def _merge_large(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 4096, 1024).to(dtype), *random_map(8, 4096, 2048), None, "sum"


# ---- merge_backward: grad_y, x, y, assign, offsets, members, size, size_out, mode ------------------------------------


def _backward(x: Tensor, n_out: int, size: Tensor | None, mode: str) -> Arguments:
    token_map = random_map(x.shape[0], x.shape[1], n_out)
    y, size_out = reference.merge(x, *token_map, size, mode)
    return torch.randn(y.shape).to(x.dtype), x, y, *token_map, size, size_out, mode


@example("merge_backward", "small", "mean, sizes")
def _backward_small(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(2, 37, 24).to(dtype), 20, torch.randint(0, 4, (2, 37)).float(), "mean")


@example("merge_backward", "awkward", "odd view, max, ties")
def _backward_max(dtype: torch.dtype) -> Arguments:
    return _backward(odd_view(torch.randint(-2, 3, (3, 61, 67)).to(dtype)), 30, None, "max")


@example("merge_backward", "awkward", "first, odd width")
def _backward_first(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(2, 41, 131).to(dtype), 12, None, "first")


@example("merge_backward", "large", "(8,4096,1024) to 2048, mean")
def _backward_large(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(8, 4096, 1024).to(dtype), 2048, None, "mean")


# ---- unmerge: y, assign, offsets, members, residual ------------------------------------------------------------------


@example("unmerge", "small", "residual")
def _unmerge_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 20, 24).to(dtype), *random_map(2, 37, 20), torch.randn(2, 37, 24).to(dtype)


@example("unmerge", "awkward", "odd views, residual")
def _unmerge_view(dtype: torch.dtype) -> Arguments:
    y, residual = torch.randn(3, 30, 67), torch.randn(3, 61, 67)
    return odd_view(y.to(dtype)), *random_map(3, 61, 30), odd_view(residual.to(dtype))


@example("unmerge", "awkward", "one channel, no residual")
def _unmerge_narrow(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 12, 1).to(dtype), *random_map(2, 41, 12), None


@example("unmerge", "large", "2048 to (8,4096,1024)")
def _unmerge_large(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 2048, 1024).to(dtype), *random_map(8, 4096, 2048), None
