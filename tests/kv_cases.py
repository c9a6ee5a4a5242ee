"""Formats, caches and truths that the tests of packed caches share."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import fastok
import torch
from fastok import Code, KVFormat, PackedKV, kv_pack
from fastok.testing import Backend
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (8, 4, 2, 1.58, 1.5, 1.25, 1)

# Every code on both axes, released numerics, other groups and scales, odd pages, two classes: small pages.
FORMATS = {name: KVFormat.preset(name) for name in KVFormat.presets()} | {
    "all per token": KVFormat(Code(1.5, "token"), Code(1.58, "token"), group=24, page=40, hot=3),
    # Groups are whole vectors, but the last, where the head dim is none.
    "ternary per token": KVFormat(Code(2, "channel"), Code(1.58, "token"), group=16, page=48, hot=3),
    "compat": KVFormat(Code(1.5, "channel", compat=True), Code(1.58, "channel", gamma=0.5, compat=True), 32, 32, 40),
    "eight bits, bf16": KVFormat(Code(8, "channel"), Code(8, "token"), 16, 48, 0, "bf16"),
    "one bit, fp32": KVFormat(Code(1, "token", compat=True), Code(1, "channel"), 32, 64, 5, "fp32"),
    "1.25": KVFormat(Code(1.25, "channel"), Code(1.25, "token"), 8, 16, 7),
    "channels of each head": KVFormat(
        Code(1.5, "channel", per_head=True), Code(1.25, "token", per_head=True), 16, 32, 9
    ),
    "two classes, per token": KVFormat(Code(8, "token", low_bits=4), Code(8, "channel", low_bits=4), 24, 24, 9),
    "protected values": KVFormat(Code(1, "token"), Code(4, "channel", low_bits=1.58), 24, 24, 9, later="low"),
    "protected keys, compat": KVFormat(
        Code(2, "channel", low_bits=1.58, gamma=0.5, compat=True), Code(4, "token", low_bits=2), 16, 16, 7, "fp32"
    ),
}
NAMES = tuple(FORMATS)


@contextmanager
def through(backend: Backend) -> Iterator[None]:
    """``attention_decode`` runs on ``backend``."""
    dense, packed_ = backend.decode, backend.decode_packed  # made on demand, before they are replaced
    with patch.object(torch.ops.fastok, "decode", dense), patch.object(torch.ops.fastok, "decode_packed", packed_):
        yield


def keys_values(batch: int, total: int, groups: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Channels of very different ranges, as keys have."""
    spread = torch.randn(width).exp()
    return [(torch.randn(batch, total, groups, width) * spread + spread).to(dtype) for _ in range(2)]


def salient(fmt: KVFormat, batch: int, groups: int, total: int) -> Tensor | None:
    """All kinds of pages: of both classes, and, the second ones, of one of them."""
    if not fmt.two_classes:
        return None
    high = torch.rand(batch, groups, total) < 0.6
    second = slice(fmt.page, 2 * fmt.page)
    high[:, 0, second], high[:, 1:, second] = True, False
    return high


def packed(
    name: str, batch: int, total: int, groups: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[PackedKV, Tensor, Tensor]:
    fmt = FORMATS[name]
    k, v = keys_values(batch, total, groups, width, dtype)
    return kv_pack(k, v, fmt, salient=salient(fmt, batch, groups, total)), k, v


def sealed_tokens(fmt: KVFormat, total: int) -> int:
    return max(0, total - fmt.hot) // fmt.page * fmt.page


def same_records(a: PackedKV, b: PackedKV) -> bool:
    """The same bytes in every sealed page, wherever they lie."""
    assert torch.equal(a.counts, b.counts)
    heads = [(i, j) for i in range(a.hot_len.shape[0]) for j in range(a.hot_len.shape[1])]
    return all(torch.equal(a.record(*head, page), b.record(*head, page)) for head in heads for page in range(a.n_pages))


def dense_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, tokens: Tensor | None = None, key_bias: Tensor | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in the dtype of q: ``k, v [B,T,G,D]``, ``lengths[B,G]``."""
    batch, rows, heads, width = q.shape
    total, groups = k.shape[1:3]
    k, v = (x.transpose(1, 2).repeat_interleave(heads // groups, 1) for x in (k, v))
    logits = q.transpose(1, 2) @ k.mT * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if key_bias is not None:
        bias = key_bias if key_bias.dim() == 3 else key_bias[:, None]
        logits = logits + bias[:, :, None, :total].to(logits.dtype)
    place = torch.arange(total)
    lengths = lengths.repeat_interleave(heads // groups, 1)[..., None, None]
    seen = place <= lengths - rows + torch.arange(rows)[:, None]
    seen &= place < lengths
    if tokens is not None:
        listed = torch.zeros(batch, tokens.shape[1], total + 1, dtype=torch.bool)
        listed.scatter_(2, torch.where((tokens < 0) | (tokens >= total), total, tokens).long(), True)
        seen = seen & listed[..., :total].repeat_interleave(heads // tokens.shape[1], 1)[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.double().logsumexp(-1)
    p = (logits - torch.where(lse == -torch.inf, 0, lse)[..., None].to(logits.dtype)).exp()
    v = torch.where((place < lengths[:, :, 0])[..., None], v, 0)
    return (p @ v).transpose(1, 2), lse.to(logits.dtype)


def decode_both(q: Tensor, cache, k: Tensor, v: Tensor, lengths: Tensor, **how):
    """What ``attention_decode`` gives, the truth in fp64, and PyTorch's own answer in the dtype of q."""
    got = fastok.attention_decode(q, cache, **how)
    truth = dense_decode(q.double(), k.double(), v.double(), lengths, **how)
    peer = dense_decode(q, k.to(q.dtype), v.to(q.dtype), lengths, **how)
    return got, truth, (peer[0].to(q.dtype), peer[1].float())
