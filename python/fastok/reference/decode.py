"""Specification of decode attention: few query rows over dense, paged and packed caches, a chunk of keys at a time."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .kv_layout import Addresses, Layout
from .quantize import CHUNK, read_side

KEYS = 2048  # of a dense cache that are read at a time
Chunk = tuple[Tensor, Tensor, Tensor]  # k, v [B,G,n,D], and each key's place in its sequence [B,G,n], -1: none


def decode(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode``: ``q[B,S,H,D]`` over ``k, v [B,T,G,D]``, or pages ``[n,P,G,D]`` with a table."""
    batch, groups, device = q.shape[0], k.shape[2], q.device
    page = k.shape[1]
    total = page if block_table is None else block_table.shape[1] * page
    lengths = torch.full((batch, groups), total, device=device)
    if seq_lens is not None:
        lengths = (seq_lens if seq_lens.dim() == 2 else seq_lens[:, None]).long().clamp(0, total).expand(batch, groups)

    def chunks() -> Iterator[Chunk]:
        for begin in range(0, total, KEYS):
            place = torch.arange(begin, min(begin + KEYS, total), device=device)
            exists = place < lengths[..., None]
            if block_table is None:
                parts = [x[:, place].transpose(1, 2) for x in (k, v)]
            else:
                block = torch.where(exists.any(1), block_table.long()[:, place // page], 0)
                parts = [x[block, place % page].transpose(1, 2) for x in (k, v)]
            wide = [torch.where(exists[..., None], _wide(x), 0) for x in parts]
            yield wide[0], wide[1], torch.where(exists, place, -1)

    return _over_chunks(q, chunks, lengths, groups, v.shape[3], scale, softcap, key_bias, tokens)


def decode_packed(
    q: Tensor, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], scale: float,
    softcap: float, key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode_packed``: ``q[B,S,H,D]`` over sealed pages and the hot window (see ``kv_unseal``)."""
    layout = Layout.of(fmt, q.shape[3])
    device, length = q.device, counts.long().sum(-1)
    first, sealed = length.cumsum(-1) - length, length.sum(-1)

    def chunks() -> Iterator[Chunk]:
        entry = torch.arange(layout.page, device=device)
        for begin in range(0, offset.shape[2], CHUNK):
            pages = slice(begin, begin + CHUNK)
            at = Addresses.of(layout, offset[:, :, pages], counts[:, :, pages],
                              None if classes is None else classes[:, :, pages])  # fmt: skip
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            k, v = (read_side(data, at, which, channels, dtype).flatten(2, 3)
                    for which, channels in enumerate((key_channels, value_channels)))  # fmt: skip
            yield k, v, torch.where(at.valid, first[:, :, pages, None] + entry, -1).flatten(2)
        entry = torch.arange(hot_k.shape[2], device=device)
        exists = entry < hot_len[..., None]
        k, v = (torch.where(exists[..., None], _wide(x), 0) for x in (hot_k, hot_v))
        yield k, v, torch.where(exists, sealed[..., None] + entry, -1)

    lengths = sealed + hot_len
    return _over_chunks(q, chunks, lengths, offset.shape[1], q.shape[3], scale, softcap, key_bias, tokens)


def _over_chunks(
    q: Tensor, chunks: Callable[[], Iterator[Chunk]], lengths: Tensor, groups: int, v_width: int, scale: float,
    softcap: float, key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, rows, heads, _ = q.shape
    ratio, rows_of = heads // groups, _wide(q).transpose(1, 2).unflatten(1, (groups, heads // groups))
    most = rows_of.new_full((batch, groups, ratio, rows), -math.inf)
    total, out = torch.zeros_like(most), rows_of.new_zeros(*most.shape, v_width)
    last = lengths[:, :, None] - rows + torch.arange(rows, device=q.device)  # the newest key that each row sees
    for k, v, place in chunks():
        if place.shape[-1] == 0:
            continue
        k, v = k.to(rows_of.dtype), v.to(rows_of.dtype)
        logits = (rows_of.flatten(2, 3) @ k.mT).unflatten(2, (ratio, rows)) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        inside = place.clamp(min=0)
        if key_bias is not None and key_bias.shape[-1] > 0:  # none: there is no token, only room for some
            bias = key_bias[:, None] if key_bias.dim() == 2 else key_bias
            bias = bias.expand(batch, heads, -1).unflatten(1, (groups, ratio))
            at = inside.clamp(max=bias.shape[-1] - 1)[:, :, None].expand(-1, -1, ratio, -1)
            logits = logits + bias.gather(-1, at)[:, :, :, None]
        seen = ((place >= 0)[:, :, None] & (place[:, :, None] <= last[..., None]))[:, :, None]
        if tokens is not None:
            seen = seen & _listed(tokens, groups, ratio, place)[:, :, :, None]
        logits = logits.masked_fill(~seen, -math.inf)
        peak = torch.maximum(most, logits.amax(-1))
        shift = torch.where(peak == -math.inf, 0, peak)
        p, fade = (logits - shift[..., None]).exp(), (most - shift).exp()
        total = total * fade + p.sum(-1)
        out = out * fade[..., None] + (p.flatten(2, 3) @ v).unflatten(2, (ratio, rows))
        most = peak
    lse = torch.where(most == -math.inf, -math.inf, most + total.log())
    out = out / torch.where(total == 0, 1, total)[..., None]
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous(), lse.flatten(1, 2)


def _listed(tokens: Tensor, groups: int, ratio: int, place: Tensor) -> Tensor:
    """Bool ``[B,G,ratio or 1,n]``: which of the keys at ``place[B,G,n]`` are in ``tokens[B,G or H,K]``."""
    lists = tokens.long().unflatten(1, (groups, -1)).sort(-1).values
    wanted = place[:, :, None].expand(-1, -1, lists.shape[2], -1).contiguous()
    if lists.shape[-1] == 0:
        return torch.zeros_like(wanted, dtype=torch.bool)
    found = torch.searchsorted(lists, wanted).clamp(max=lists.shape[-1] - 1)
    return lists.gather(-1, found) == wanted


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
