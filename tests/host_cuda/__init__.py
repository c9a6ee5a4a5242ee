"""The CUDA kernels run on the CPU by the SIMT machine of simt.h, with the op-level signatures of fastok.reference.

Build the module first (see CMakeLists.txt); it is looked for in ``build/host_cuda``. ``seed`` drives the order in which
blocks and threads run; ``capability`` (80, or 90 for Hopper) is that of the device played, which decides on kernels;
``most_shared_bytes`` is what it grants a block from 90 on; ``most_similarities`` is how many of a pair max_coverage
keeps.
What a kernel does wrong is a KernelError, see docs/testing-cuda-without-a-gpu.md.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from fastok.reference.attention import slice_length
from fastok.reference.kv_layout import Addresses, Layout
from fastok.testing import assert_same
from torch import Tensor

from .report import KernelError as KernelError
from .report import locate

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

SOURCE = Path(__file__).parent
BUILD = Path(__file__).parents[2] / "build" / "host_cuda"
seed = 0
capability = 80
most_shared_bytes = 227 << 10
most_similarities = 1 << 27


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


@contextmanager
def races_allowed() -> Iterator[None]:
    """For input that a kernel may answer with anything, as long as it stays within its arrays."""
    native.report_races(False)
    try:
        yield
    finally:
        native.report_races(True)


@contextmanager
def playing(device: int, shared_bytes: int | None = None) -> Iterator[None]:
    """A device of this compute capability, which grants a block so much shared memory."""
    global capability, most_shared_bytes
    before = capability, most_shared_bytes
    capability, most_shared_bytes = device, shared_bytes or most_shared_bytes
    try:
        yield
    finally:
        capability, most_shared_bytes = before


def call(
    op: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], /, **options: float | str | None
) -> None:
    """Run an op of module.cpp. It may read the inputs, and must write all of the outputs before it reads them.

    None stands for an argument that is not there. Results are poisoned. Where there is nothing to write nothing runs,
    as in the bindings: a grid of no blocks is an error.
    """
    if all(x.numel() == 0 for x in outputs.values()):
        return
    for x in outputs.values():
        x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min // 2)
    try:
        native.call(
            op,
            seed,
            {name: _describe(x) for name, x in inputs.items() if x is not None},
            {name: _describe(x) for name, x in outputs.items()},
            {name: x for name, x in options.items() if isinstance(x, int | float)},
            {name: x for name, x in options.items() if isinstance(x, str)},
        )
    except native.Failure as failure:
        raise KernelError(locate(str(failure), Path(native.__file__ or ""))) from None


Index = tuple[int, int, int]


def sample(
    kernel: str,
    x: Tensor,
    out: Tensor,
    *,
    n: int | None = None,
    grid: Index = (1, 1, 1),
    block: Index = (64, 1, 1),
    cluster: int = 1,
    shared_bytes: int = 0,
    zeroed: int = 0,
) -> Tensor:
    """Run a kernel of samples.cpp, after zeroing the first bytes of ``out``. Returns ``out``.

    Of an fp16 matrix ``x`` it can have tiles copied.
    """
    dimensions = {f"{name}_{'xyz'[i]}": size[i] for name, size in (("grid", grid), ("block", block)) for i in range(3)}
    options = dimensions | {"n": out.numel() if n is None else n, "shared_bytes": shared_bytes, "zeroed": zeroed}
    options["cluster"] = cluster
    options["tiled"] = x.dtype == torch.float16 and x.dim() == 2
    call("sample", {"in": x}, {"out": out}, kernel=kernel, **options)
    return out


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
    shapes = {"assign": (batch, n), "counts": (batch,), "offsets": (batch, n_out + 1), "members": (batch, n)}
    results = {name: torch.empty(shape, dtype=torch.int32) for name, shape in shapes.items()}
    call(
        "bipartite_match",
        {"metric": _dense(metric), "bias": bias, "src": _dense(src), "dst": _dense(dst)},
        results,
        dtype=_name(metric),
        r=r,
        protect=protect,
        threshold=threshold,
        sorted_order=sorted_order,
    )
    return results["assign"], results["counts"], results["offsets"], results["members"]


def nearest(
    x: Tensor, y: Tensor, k: int = 1, *, similarity: str = "cosine", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.nearest``."""
    shape = (x.shape[0], x.shape[1], k)
    value, index = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    inputs = {"x": _dense(x), "y": _dense(y), "mask": mask}
    call("nearest", inputs, {"value": value, "index": index}, dtype=_name(x), k=k, similarity=similarity)
    return value, index


def k_center(
    x: Tensor,
    k: int,
    metric: str,
    objective: str,
    start: str,
    first: Tensor | None,
    mask: Tensor | None,
    candidates_scored: int,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.k_center``."""
    batch = x.shape[0]
    results = {"index": torch.empty(batch, k, dtype=torch.int64), "distance": torch.empty(batch, k)}
    options = {"metric": metric, "objective": objective, "start": start}
    call(
        "k_center", {"x": _dense(x), "first": first, "mask": mask}, results, dtype=_name(x), k=k,
        capability=capability, most_shared_bytes=most_shared_bytes, **options,
    )  # fmt: skip
    return results["index"], results["distance"]


def k_center_by_all_plans(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The same as devices without and with clusters do it, where they differ, which must not show."""
    results = []
    for device in (80, 90):
        with playing(device):
            results.append(k_center(*arguments))
    for of_80, of_90 in zip(*results, strict=True):
        assert_same(of_90, of_80, "clusters and other plans")
    return results[-1]


def max_coverage(
    similarity: Tensor | None, y: Tensor | None, x: Tensor | None, k: int, modular: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.max_coverage``, a pair's similarities kept up to ``most_similarities`` numbers."""
    like = x if similarity is None else similarity
    assert like is not None
    results = {"index": torch.empty(like.shape[0], k, dtype=torch.int64), "gain": torch.empty(like.shape[0], k)}
    inputs = {"similarity": similarity, "y": _dense(y), "x": _dense(x), "modular": modular}
    call("max_coverage", inputs, results, dtype=_name(like), k=k, most_similarities=most_similarities)
    return results["index"], results["gain"]


def top_tokens(
    scores: Tensor, k: list[int], protect: int, mask: Tensor | None, segments: Tensor | None, by_score: bool
) -> Tensor:
    """``torch.ops.fastok.top_tokens``."""
    out = torch.empty(scores.shape[0], protect + sum(k), dtype=torch.int64)
    inputs = {"scores": scores, "mask": mask, "segments": segments, "k": torch.tensor(k, dtype=torch.int64)}
    call("top_tokens", inputs, {"out": out}, dtype=_name(scores), protect=protect, by_score=by_score)
    return out


def sample_cdf(scores: Tensor, k: int, protect: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fastok.sample_cdf``."""
    batch, n = scores.shape
    shapes = {"assign": (batch, n), "counts": (batch,), "offsets": (batch, min(k, n) + 1), "members": (batch, n)}
    results = {name: torch.empty(shape, dtype=torch.int32) for name, shape in shapes.items()}
    call("sample_cdf", {"scores": scores}, results, dtype=_name(scores), k=k, protect=protect)
    return results["assign"], results["counts"], results["offsets"], results["members"]


def density_peaks(x: Tensor, k: int, neighbors: int) -> Tensor:
    """``torch.ops.fastok.density_peaks``."""
    out = torch.empty(x.shape[0], k, dtype=torch.int64)
    call("density_peaks", {"x": _dense(x)}, {"out": out}, dtype=_name(x), neighbors=neighbors)
    return out


def build_map(assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.build_map``."""
    offsets = torch.empty((assign.shape[0], n_out + 1), dtype=torch.int32)
    members = torch.empty(assign.shape, dtype=torch.int32)
    call("build_map", {"assign": assign}, {"offsets": offsets, "members": members}, n_out=n_out)
    return offsets, members


def merge(
    x: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.merge``."""
    batch, n_out = x.shape[0], offsets.shape[1] - 1
    y, size_out = torch.empty((batch, n_out, x.shape[2]), dtype=x.dtype), torch.empty((batch, n_out))
    maps = {"assign": assign, "offsets": offsets, "members": members}
    _rows("merge", mode, {"x": x, "size": size, **maps}, {"y": y, "size_out": size_out})
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
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    inputs = {"grad_y": grad_y, "size": size, "size_out": size_out.contiguous()}
    inputs |= {"assign": assign, "offsets": offsets, "members": members}
    if mode == "max":
        _rows("max_backward", mode, {"x": x, "y": y, **inputs}, {"grad_x": grad_x})
    else:
        _rows("backward", mode, inputs, {"grad_x": grad_x})
    return grad_x


def unmerge(y: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
    """``torch.ops.fastok.unmerge``."""
    out = torch.empty((assign.shape[0], assign.shape[1], y.shape[2]), dtype=y.dtype)
    maps = {"assign": assign, "offsets": offsets, "members": members}
    _rows("unmerge", "sum", {"y": y, "residual": residual, **maps}, {"x": out})
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.attention``."""
    lead = q.shape[:-3]
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    lse = torch.empty((*lead, q.shape[-2], q.shape[-3]))
    inputs = {"q": _aligned(q), "k": _aligned(k), "v": _aligned(v), "key_bias": key_bias}
    inputs |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    call(
        "attention", inputs, {"out": out, "lse": lse}, dtype=_name(q), scale=scale, left=left, right=right,
        softcap=softcap, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, capability=capability,
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    left: int, right: int, softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.attention_backward``."""
    results = {f"grad_{name}": torch.empty(x.shape, dtype=x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    results["grad_bias"] = torch.empty(0 if key_bias is None else key_bias.shape)
    inputs = {
        "q": _aligned(q),
        "k": _aligned(k),
        "v": _aligned(v),
        "out": _aligned(out),
        "grad_out": _aligned(grad_out),
    }
    inputs |= {"lse": lse, "grad_lse": grad_lse, "key_bias": key_bias}
    inputs |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    call("attention_backward", inputs, results, dtype=_name(q), scale=scale, left=left, right=right, softcap=softcap)
    return results["grad_q"], results["grad_k"], results["grad_v"], results["grad_bias"]


def attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, key_weight: Tensor | None, scale: float, left: int, right: int,
    softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, rows: Tensor | None, row_begin: int, row_end: int, col_begin: int,
    col_end: int, over_cols: bool, reduce: str, head_group: int, head_max: bool, logits: bool,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.attention_scores``."""
    packed = cu_seqlens_q is not None
    n_rows = rows.shape[0] if rows is not None else slice_length(row_begin, row_end) if packed else row_end - row_begin
    lead, n_cols = q.shape[:-3], col_end - col_begin
    kept = (n_rows,) if reduce == "none" else ()
    out = torch.empty((*lead, q.shape[-2] // head_group, *kept, n_cols))
    inputs = {"q": _aligned(q), "k": _aligned(k), "lse": lse, "key_weight": key_weight, "key_bias": key_bias}
    inputs |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "rows": rows}
    call(
        "attention_scores", inputs, {"scores": out}, dtype=_name(q), scale=scale, left=left, right=right,
        softcap=softcap, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, row_begin=row_begin, row_end=row_end,
        n_rows=min(n_rows, q.shape[-3]) if rows is None and reduce != "none" else n_rows, col_begin=col_begin,
        col_end=col_end, over_cols=over_cols, reduce=reduce, head_group=head_group, head_max=head_max, logits=logits,
        capability=capability,
    )  # fmt: skip
    return out


def label_scores(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool,
    seq_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.label_scores``."""
    out = torch.empty(q.shape[0], kv_heads if shared else q.shape[2], data.shape[3])
    inputs = {"q": q, "data": _dense(data), "scale": _dense(scale), "channels": channels.contiguous()}
    call(
        "label_scores", inputs | {"seq_lens": seq_lens}, {"out": out}, dtype=_name(q), code=_name(data),
        wide=_wide(seq_lens),
    )  # fmt: skip
    return out


def select_tokens(
    scores: Tensor, k: int, mass: float | None, sink: int, recent: int, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.select_tokens``."""
    lead = scores.shape[:2]
    index, count = torch.empty(*lead, k, dtype=torch.int64), torch.empty(lead, dtype=torch.int64)
    call(
        "select_tokens", {"scores": _dense(scores), "seq_lens": seq_lens}, {"index": index, "count": count},
        mass=mass or 0.0, sink=sink, recent=recent, wide=_wide(seq_lens),
    )  # fmt: skip
    return index, count


def decode(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode``."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    integers = {"seq_lens": seq_lens, "block_table": block_table, "tokens": tokens}
    call(
        "decode", {"q": _aligned(q), "k": _aligned(k), "v": _aligned(v), "key_bias": key_bias, **integers},
        {"out": out, "lse": lse}, dtype=_name(q), scale=scale, softcap=softcap,
        **{f"{name}_wide": _wide(x) for name, x in integers.items()},
    )  # fmt: skip
    return out, lse


def decode_packed(
    q: Tensor, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], scale: float,
    softcap: float, key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode_packed``."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    cache = _cache(data, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len)
    call(
        "decode_packed", {"q": _aligned(q), **cache, "key_bias": key_bias, "tokens": tokens},
        {"out": out, "lse": lse}, dtype=_name(q), scale=scale, softcap=softcap, tokens_wide=_wide(tokens),
        **_format(fmt),
    )  # fmt: skip
    return out, lse


def kv_seal(
    data: Tensor, offset: Tensor, k: Tensor, v: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, fmt: list[int], key_gamma: float, value_gamma: float,
) -> None:  # fmt: skip
    """``torch.ops.fastok.kv_seal``, by way of an array that records fill: so every byte of them must be written."""
    layout = Layout.of(fmt, k.shape[3])
    counts = torch.full((*offset.shape, layout.token_groups), layout.page // layout.token_groups)
    size = Addresses.of(layout, offset, counts, classes).size.flatten()
    begin = size.cumsum(0) - size
    records = torch.empty(int(size.sum()), dtype=torch.uint8)
    call(
        "kv_seal", {
            "offset": begin.view_as(offset).contiguous(), "k": _dense(k), "v": _dense(v),
            "classes": _contiguous(classes), "key_channels": _contiguous(key_channels),
            "value_channels": _contiguous(value_channels),
        },
        {"data": records}, dtype=_name(k), key_gamma=key_gamma, value_gamma=value_gamma, **_format(fmt),
    )  # fmt: skip
    for to, at, count in zip(offset.flatten().tolist(), begin.tolist(), size.tolist(), strict=True):
        data[to : to + count] = records[at : at + count]


def kv_unseal(
    data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], total: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.kv_unseal``."""
    batch, groups, _, width = hot_k.shape
    k, v = (torch.empty(batch, total, groups, width, dtype=hot_k.dtype) for _ in range(2))
    cache = _cache(data, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len)
    call("kv_unseal", cache, {"k": k, "v": v}, dtype=_name(hot_k), total=total, **_format(fmt))
    return k, v


def _cache(
    data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor,
) -> dict[str, Tensor | None]:  # fmt: skip
    return {
        "data": data, "offset": offset, "counts": _dense(counts), "classes": _dense(classes),
        "key_channels": _contiguous(key_channels), "value_channels": _contiguous(value_channels),
        "hot_k": _aligned(hot_k), "hot_v": _aligned(hot_v), "hot_len": hot_len.contiguous(),
    }  # fmt: skip


def _format(fmt: list[int]) -> dict[str, int]:
    return {f"fmt_{i}": x for i, x in enumerate(fmt)}


def _contiguous(x: MaybeTensor) -> MaybeTensor:
    return x if x is None else x.contiguous()


def _wide(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.int64


def _aligned(x: Tensor) -> Tensor:
    """``x`` with rows that begin at multiples of 16 bytes, as the binding sees to it."""
    x = _dense(x)
    offsets = [x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:-1])]
    return x if all(offset % 16 == 0 for offset in offsets) else x.clone(memory_format=torch.contiguous_format)


def _rows(op: str, mode: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor]) -> None:
    rows = {name: x if name in ("size", "size_out") else _dense(x) for name, x in inputs.items()}
    example = next(iter(outputs.values()))
    call("rows", rows, outputs, op=op, dtype=_name(example), mode=mode, channels=example.shape[2])


def _dense(x: MaybeTensor) -> MaybeTensor:
    """``x`` with a contiguous last dimension, as the binding sees to it."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _describe(x: Tensor) -> tuple[int, list[int], list[int], int]:
    return x.data_ptr(), list(x.shape), list(x.stride()), x.element_size()
