"""``label_scores`` in Triton. Semantics: ops/sparse.py, reference/sparse.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import readable

_TOKENS = 1024  # per program
_MOST_QUERIES = 16  # that read a label together


def label_scores(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool,
    seq_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.label_scores``: a program has a tile of tokens, and adds up channel by channel."""
    batch, rows, heads, width = q.shape
    labels, n, r = data.shape[1], data.shape[3], channels.shape[1]
    out_heads = kv_heads if shared else heads
    out = q.new_empty(batch, out_heads, n, dtype=torch.float32)
    if out.numel() == 0:
        return out
    q, data, channels = readable(q), readable(data), channels.contiguous()
    scale = None if scale is None else readable(scale)
    lengths = None if seq_lens is None else seq_lens.contiguous()
    group, sharing = heads // out_heads, heads // labels
    together = min(group, sharing)
    tiles = triton.cdiv(n, _TOKENS)
    _label_scores[(batch * out_heads * tiles,)](
        q, data, scale, channels, lengths, out, *q.stride(), *data.stride()[:3],
        0 if scale is None else scale.stride(0), 0 if scale is None else scale.stride(1),
        out_heads, group, together, sharing, heads // channels.shape[0], rows, width, r, data.shape[2], n, tiles,
        PAIRED=data.dtype == torch.uint8, QUERIES=min(triton.next_power_of_2(together * rows), _MOST_QUERIES),
        N=_TOKENS,
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=[
        "out_heads", "group", "together", "sharing", "served", "rows", "width", "r", "data_rows", "n", "tiles",
    ]
)  # fmt: skip
def _label_scores(
    q: tl.tensor,
    data: tl.tensor,
    scale: tl.tensor,
    channels: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    q_channel: tl.int64,
    data_batch: tl.int64,
    data_head: tl.int64,
    data_channel: tl.int64,
    scale_batch: tl.int64,
    scale_head: tl.int64,
    out_heads: int,
    group: int,
    together: int,
    sharing: int,
    served: int,
    rows: int,
    width: int,
    r: int,
    data_rows: int,
    n: int,
    tiles: int,
    PAIRED: tl.constexpr,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Programs are (sample, head of the result, tile of tokens).

    ``group``: query heads of a head of the result, of which ``together`` have the same labels. ``sharing`` and
    ``served``: query heads of a head of labels, and of a list of channels.
    """
    program = tl.program_id(0)
    out_head = program // tiles % out_heads
    sample = (program // tiles // out_heads).to(tl.int64)
    token = program % tiles * N + tl.arange(0, N)
    there = token < n
    if lengths is not None:
        there = there & (token < tl.load(lengths + sample))
    best = tl.full([N], float("-inf"), tl.float32)
    for part in range(0, group // together):
        head = out_head * group + part * together
        label = head // sharing
        codes = data + sample * data_batch + label * data_head + token
        for first in range(0, together * rows, QUERIES):
            query = tl.minimum(first + tl.arange(0, QUERIES), together * rows - 1)
            own = head + query // rows
            chosen = q + sample * q_batch + own * q_head + query % rows * q_row
            acc = tl.zeros([QUERIES, N], tl.float32)
            for c in range(0, r):
                channel = tl.load(channels + own // served * r + c)
                known = (channel >= 0) & (channel < width)
                x = tl.load(chosen + channel * q_channel, mask=known, other=float("nan")).to(tl.float32)
                if PAIRED:
                    code = tl.load(codes + c % data_rows * data_channel, mask=there, other=0).to(tl.int32)
                    y = ((code >> (c // data_rows * 4)) & 15) - 8
                else:
                    y = tl.load(codes + c * data_channel, mask=there, other=0)
                acc += x[:, None] * y.to(tl.float32)[None, :]
            if scale is not None:
                factor = tl.load(scale + sample * scale_batch + label * scale_head + token, mask=there, other=0)
                acc *= factor.to(tl.float32)[None, :]
            # NaN wins, as in torch's amax.
            top = tl.where(tl.max((acc != acc).to(tl.int32), 0) > 0, float("nan"), tl.max(acc, 0))
            best = tl.maximum(best, top, propagate_nan=tl.PropagateNan.ALL)
    best = tl.where(there, best, float("-inf"))
    tl.store(out + (sample * out_heads + out_head) * n + token, best, mask=token < n)
