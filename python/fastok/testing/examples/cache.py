"""Examples of packed caches and of decode attention, and how far rounding may move their results."""

from typing import Any

import torch
from torch import Tensor

from ...caches import Code, KVFormat, PackedKV, kv_pack
from ...reference import decode as reference
from .registry import Arguments, example, odd_view

EPS = torch.finfo(torch.float32).eps

FORMATS = {
    "KIVI, 2 bits": KVFormat.preset("kivi-2"),
    "spectrum and trits, small pages": KVFormat(Code(1.5, "channel"), Code(1.58, "channel"), 16, 32, 20),
    "two classes": KVFormat(
        Code(4, "channel", low_bits=2), Code(4, "token", channel_scale=True, low_bits=2), 40, 40, 9
    ),
    "protected values": KVFormat(Code(1.5, "channel"), Code(2, "channel", low_bits=1.58), 40, 40, 9, later="low"),
}


def packed(fmt: KVFormat, batch: int, total: int, groups: int, width: int, dtype: torch.dtype) -> PackedKV:
    """A cache of random tokens, every class of them."""
    k, v = torch.randn(2, batch, total, groups, width).to(dtype).unbind(0)
    # As many in every example, so that shapes do not depend on the seed.
    salient = (torch.arange(total) * 7 % 10 < 6).expand(batch, groups, -1) if fmt.two_classes else None
    return kv_pack(k, v, fmt, salient=salient)


def rounding_of_decode(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """One rounding of each logit and of each probability to fp32."""
    return _rounding(reference.decode, q, rest[1], rest[0], *rest)


def rounding_of_decode_packed(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same, of what the codes stand for: no more than 2048 steps of any scale."""
    return _rounding(reference.decode_packed, q, rest[7], rest[6], *rest)


def _rounding(function: Any, q: Tensor, values: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    doubled = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in rest)
    out, lse = function(q.double(), *doubled)
    largest = [float(x.abs().nan_to_num(0).max()) if x.numel() else 0.0 for x in (q, keys, values)]
    moved = 16 * EPS * (1 + q.shape[3] ** 0.5 * 4 * largest[0] * max(largest[1], 4))
    return torch.full_like(out, moved * max(largest[2], 4)), torch.full_like(lse, moved)


# ---- kv_seal: data, offset, k, v, classes, key_channels, value_channels, fmt, key_gamma, value_gamma -----------------


def _sealed(fmt: KVFormat, batch: int, pages: int, groups: int, width: int, dtype: torch.dtype) -> Arguments:
    cache = packed(fmt, batch, pages * fmt.page + fmt.hot, groups, width, dtype)
    k, v = torch.randn(2, batch, pages * fmt.page, groups, width).to(dtype).unbind(0)
    return (torch.zeros_like(cache.data), cache.offset, k, v, cache.classes, cache.key_channels, cache.value_channels,
            fmt.flat, 0.7, 0.7)  # fmt: skip


def _odd_rows(dtype: torch.dtype) -> Arguments:
    data, offset, k, v, *rest = _sealed(FORMATS["spectrum and trits, small pages"], 1, 3, 1, 72, dtype)
    k, v = (odd_view(x[:, :, 0])[:, :, None] for x in (k, v))
    return data, offset, k, v, *rest


example("kv_seal", "small", "KIVI, 2 bits")(lambda dtype: _sealed(FORMATS["KIVI, 2 bits"], 1, 1, 2, 32, dtype))
example("kv_seal", "awkward", "odd rows, spectrum and trits")(_odd_rows)
example("kv_seal", "awkward", "two classes")(lambda dtype: _sealed(FORMATS["two classes"], 2, 2, 1, 80, dtype))
example("kv_seal", "large", "(1,8192,8,128) KIVI, 2 bits")(
    lambda dtype: _sealed(FORMATS["KIVI, 2 bits"], 1, 128, 8, 128, dtype)
)


# ---- kv_unseal: data, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len, fmt, total -------


def _ragged(fmt: KVFormat, dtype: torch.dtype) -> PackedKV:
    cache = packed(fmt, 2, 3 * fmt.page + fmt.hot, 2, 72, dtype)
    total = int(cache.seq_lens[0, 0])
    kept = torch.arange(0, total, 2).expand(2, 2, -1).clone()
    kept[0, 1, 20:] = -1
    return cache.keep(kept)


def _unsealed(cache: PackedKV) -> Arguments:
    return *cache.arguments, cache.format.flat, int(cache.seq_lens.max())


example("kv_unseal", "small", "KIVI, 2 bits")(
    lambda dtype: _unsealed(packed(FORMATS["KIVI, 2 bits"], 1, 200, 2, 32, dtype))
)
for _title, _fmt in FORMATS.items():
    example("kv_unseal", "awkward", f"heads of different lengths, {_title}")(
        lambda dtype, fmt=_fmt: _unsealed(_ragged(fmt, dtype))
    )
example("kv_unseal", "large", "(1,8192,8,128) KIVI, 2 bits")(
    lambda dtype: _unsealed(packed(FORMATS["KIVI, 2 bits"], 1, 8192, 8, 128, dtype))
)


# ---- decode: q, k, v, seq_lens, block_table, scale, softcap, key_bias, tokens ----------------------------------------


def _dense(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(2, n, h, 32).to(dtype) for n, h in ((2, 4), (50, 2), (50, 2)))
    return q, k, v, None, None, 32**-0.5, 0.0, None, None


def _paged(dtype: torch.dtype) -> Arguments:
    pages = torch.randn(9, 2, 3, 16, 72).to(dtype).transpose(2, 3)
    q, table = torch.randn(2, 16, 6, 72).to(dtype), torch.arange(8, dtype=torch.int32).flip(0).view(2, 4)
    tokens = torch.arange(-1, 59).expand(2, 6, -1)
    return (q, pages[:, 0], pages[:, 1], torch.tensor([61, 7], dtype=torch.int32), table, 0.2, 3.0, torch.randn(2, 64),
            tokens)  # fmt: skip


def _long(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(1, n, h, 128).to(dtype) for n, h in ((1, 32), (8192, 8), (8192, 8)))
    return q, k, v, None, None, 128**-0.5, 0.0, None, None


example("decode", "small", "two rows, GQA")(_dense)
example("decode", "awkward", "pages, sixteen rows, softcap, bias, a list for each query head")(_paged)
example("decode", "large", "(1,1,32/8,128) of 8192")(_long)


# ---- decode_packed: q, data … hot_len (as kv_unseal), fmt, scale, softcap, key_bias, tokens --------------------------


def _over(cache: PackedKV, rows: int, heads: int, extras: bool) -> Arguments:
    batch, groups, _, width = cache.hot_k.shape
    total = int(cache.seq_lens.max())
    q = torch.randn(batch, rows, heads, width).to(cache.hot_k.dtype)
    bias = torch.randn(batch, heads, total) if extras else None
    tokens = torch.arange(-1, total, 3).expand(batch, groups, -1) if extras else None
    return q, *cache.arguments, cache.format.flat, width**-0.5, 5.0 if extras else 0.0, bias, tokens


example("decode_packed", "small", "KIVI, 2 bits, GQA")(
    lambda dtype: _over(packed(FORMATS["KIVI, 2 bits"], 1, 200, 2, 32, dtype), 1, 8, False)
)
for _title, _fmt in FORMATS.items():
    example("decode_packed", "awkward", f"lists, bias, softcap, heads of different lengths, {_title}")(
        lambda dtype, fmt=_fmt: _over(_ragged(fmt, dtype), 3, 6, True)
    )
example("decode_packed", "large", "(1,1,32/8,128) of 8192, KIVI, 2 bits")(
    lambda dtype: _over(packed(FORMATS["KIVI, 2 bits"], 1, 8192, 8, 128, dtype), 1, 32, False)
)
