"""The CUDA kernels run on the CPU by the SIMT machine of simt.h, with the op-level signatures of fastok.reference.

Build the module first (see CMakeLists.txt); it is looked for in ``build/host_cuda``. ``seed`` drives the order in which
blocks and threads run. Results are poisoned before each call.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

BUILD = Path(__file__).parents[2] / "build" / "host_cuda"
seed = 0


def load() -> ModuleType:
    """The compiled module. ImportError if it was not built."""
    paths = sorted(BUILD.glob("_host_cuda*.so"))
    if not paths:
        raise ImportError(f"no _host_cuda module in {BUILD}: build tests/host_cuda")
    spec = importlib.util.spec_from_file_location("_host_cuda", paths[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = load()


def match_map(
    metric: Tensor,
    r: int,
    protect: int,
    threshold: float | None,
    bias: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    sorted_order: bool,
    static_shape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fastok.bipartite_match`` as CUDA does it: the shape never depends on the data."""
    assert static_shape or threshold is not None
    batch, n, _ = metric.shape
    n_src = (n + 1) // 2 if src is None else src.shape[-1]
    n_dst = n // 2 if dst is None else dst.shape[-1]
    n_out = n if threshold is not None or r <= 0 or 0 in (n_src, n_dst) else n - r
    results = tuple(_poisoned(shape) for shape in ((batch, n), (batch,), (batch, n_out + 1), (batch, n)))
    metric, src, dst = _dense(metric), _dense(src), _dense(dst)  # held here: the kernels see only addresses
    native.bipartite_match(
        seed,
        _name(metric),
        _describe(metric),
        r,
        protect,
        threshold,
        *map(_describe, (bias, src, dst)),
        sorted_order,
        *map(_describe, results),
    )
    return results


def nearest(
    x: Tensor, y: Tensor, k: int = 1, *, similarity: str = "cosine", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.nearest``."""
    shape = (x.shape[0], x.shape[1], k)
    value, index = _poisoned(shape, torch.float32), _poisoned(shape, torch.int64)
    x, y = _dense(x), _dense(y)  # held here: the kernels see only addresses
    arrays = map(_describe, (mask, value, index))
    native.nearest(seed, _name(x), _describe(x), _describe(y), k, similarity, *arrays)
    return value, index


def build_map(assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.build_map``."""
    offsets, members = _poisoned((assign.shape[0], n_out + 1)), _poisoned(assign.shape)
    native.build_map(seed, _describe(assign), n_out, _describe(offsets), _describe(members))
    return offsets, members


def merge(
    x: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.merge``."""
    batch, n_out = x.shape[0], offsets.shape[1] - 1
    y, size_out = _poisoned((batch, n_out, x.shape[2]), x.dtype), _poisoned((batch, n_out), torch.float32)
    _rows("merge", mode, assign, offsets, members, x=x, y=y, size=size, size_out=size_out)
    return y, size_out


def merge_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    assign: Tensor,
    offsets: Tensor,
    members: Tensor,
    size: Tensor | None,
    size_out: Tensor,
    mode: str,
) -> Tensor:
    """``torch.ops.fastok.merge_backward``."""
    grad_x = _poisoned(x.shape, x.dtype)
    op = "max_backward" if mode == "max" else "backward"
    size_out = size_out.contiguous()
    used = {"x": x, "y": y} if mode == "max" else {}
    _rows(op, mode, assign, offsets, members, grad_y=grad_y, grad_x=grad_x, size=size, size_out=size_out, **used)
    return grad_x


def unmerge(y: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
    """``torch.ops.fastok.unmerge``."""
    out = _poisoned((assign.shape[0], assign.shape[1], y.shape[2]), y.dtype)
    _rows("unmerge", "sum", assign, offsets, members, x=out, y=y, residual=residual)
    return out


def _rows(op: str, mode: str, assign: Tensor, offsets: Tensor, members: Tensor, **arrays: Tensor | None) -> None:
    tokens = {name: x if name in ("size", "size_out") else _dense(x) for name, x in arrays.items()}
    example = next(x for name, x in tokens.items() if name in ("x", "grad_y") and x is not None)
    if assign.shape[0] == 0:
        return
    native.rows(
        seed,
        op,
        _name(example),
        mode,
        assign.shape[1],
        offsets.shape[1] - 1,
        example.shape[2],
        _describe(assign),
        _describe(offsets),
        _describe(members),
        {name: _describe(x) for name, x in tokens.items()},
    )


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    """What no kernel may leave behind: NaN, or a large negative number."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(10**9), dtype=dtype)


def _dense(x: MaybeTensor) -> MaybeTensor:
    """``x`` with a contiguous last dimension, as the binding sees to it."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _describe(x: Tensor | None) -> tuple[int, list[int], list[int]] | None:
    return None if x is None else (x.data_ptr(), list(x.shape), list(x.stride()))
