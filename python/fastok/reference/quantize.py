"""Specification of packed pages: codecs, ``kv_seal`` and ``kv_unseal``. Plain PyTorch, statistics in fp32.

Bytes are the same on every backend, so every sum here has a stated order and nothing is fused.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .kv_layout import CHANNEL, TRIT, Addresses, Layout, Part, Side, code_bytes

CHUNK = 64  # pages that are worked on at a time


# ---- codes in bytes --------------------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[…,n]`` as bytes ``[…,m]``: byte i holds codes i, i + m, i + 2m, … from the lowest bits up.

    ``bits`` are hundredths; 158 are trits 0, 1, 2, five a byte in base 3.
    """
    m, per_byte = code_bytes(bits, codes.shape[-1]), 5 if bits == TRIT else 800 // bits
    planes = torch.nn.functional.pad(codes.int(), (0, m * per_byte - codes.shape[-1])).unflatten(-1, (per_byte, m))
    weight = [3**j if bits == TRIT else 1 << (bits // 100 * j) for j in range(per_byte)]
    return (planes * torch.tensor(weight, dtype=torch.int32, device=codes.device)[:, None]).sum(-2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, channels: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 ``[…,channels]``."""
    wide = packed.int()[..., None, :]
    if bits == TRIT:
        power = torch.tensor([3**j for j in range(5)], dtype=torch.int32, device=packed.device)
        planes = wide // power[:, None] % 3
    else:
        step = bits // 100
        planes = wide >> torch.arange(0, 8, step, dtype=torch.int32, device=packed.device)[:, None] & ((1 << step) - 1)
    return planes.flatten(-2)[..., :channels].to(torch.uint8)


# ---- the spectrum of the easy channels -------------------------------------------------------------------------------


@lru_cache
def fourier_basis(n: int) -> Tensor:
    """fp32 ``[n,n]``: row i times its column j, summed over i, is component j of the half spectrum of n reals.

    Components are Re F_0 … Re F_{n/2}, then Im F_1 … Im F_{n/2-1}.
    """

    def cosine(turn: int) -> float:  # cos(2 pi turn / n), by symmetry from the first eighth of a turn
        turn %= n
        turn = min(turn, n - turn)
        sign = 1.0
        if 4 * turn > n:
            turn, sign = n // 2 - turn, -1.0
        angle = 2 * math.pi * turn / n
        return sign * (math.cos(angle) if 8 * turn <= n else math.sin(2 * math.pi * (n / 4 - turn) / n))

    # -sin(x) = cos(x + quarter turn); n = 2 has no imaginary components.
    rows = [[cosine(i * j) for j in range(n // 2 + 1)] + [cosine(i * j + n // 4) for j in range(1, n // 2)]
            for i in range(n)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).float()


def fourier_weights(n: int) -> Tensor:
    """fp32 ``[n]``: what each component counts in an inner product (1/n, or 2/n where its mirror image counts too)."""
    weight = torch.full((n,), 2.0 / n)
    weight[0] = weight[n // 2] = 1.0 / n
    return weight


def to_spectrum(x: Tensor) -> Tensor:
    """Half spectrum of the last dimension, each component summed in ascending order of channels, unfused."""
    basis = fourier_basis(x.shape[-1]).to(x)
    y = x[..., :1] * basis[0]
    for i in range(1, x.shape[-1]):
        y = y + x[..., i : i + 1] * basis[i]
    return y


def from_spectrum(y: Tensor) -> Tensor:
    """The inverse of :func:`to_spectrum`, up to rounding."""
    n = y.shape[-1]
    return (y * fourier_weights(n).to(y)) @ fourier_basis(n).to(y).mT


# ---- groups ----------------------------------------------------------------------------------------------------------


def round_to(x: Tensor, dtype: torch.dtype, toward: float | None = None) -> Tensor:
    """fp32 ``x`` in ``dtype``: to the nearest, or to the next one ``toward`` -inf or inf. NaN where out of range."""
    y = x.to(dtype)
    if toward is not None:
        beyond = y.float() > x if toward < 0 else y.float() < x
        y = torch.where(beyond, torch.nextafter(y, torch.full_like(y, toward)), y)
    return torch.where(torch.isfinite(y), y, torch.nan)


def _grouped(x: Tensor, side: Side, page: int) -> Tensor:
    """``x[…,P,n]`` with the members of each group last: ``[…,groups of tokens,n,group]`` or ``[…,P,groups,group]``.

    The last group of channels is padded with NaN.
    """
    if side.axis == CHANNEL:
        return x.unflatten(-2, (page // side.group, side.group)).transpose(-1, -2)
    pad = -x.shape[-1] % side.group
    return torch.nn.functional.pad(x, (0, pad), value=torch.nan).unflatten(-1, (-1, side.group))


def _members(part: Part, side: Side) -> Tensor:
    """Bool ``[groups,group]`` (or ``[1,group]``): which places of :func:`_grouped` are members."""
    if side.axis == CHANNEL:
        return torch.ones(1, side.group, dtype=torch.bool)
    places = torch.arange(side.groups_of(part) * side.group)
    return (places < part.channels).view(-1, side.group)


def _ungrouped(x: Tensor, part: Part, side: Side) -> Tensor:
    if side.axis == CHANNEL:
        return x.transpose(-1, -2).flatten(-3, -2)
    return x.flatten(-2)[..., : part.channels]


def _ascending_sum(x: Tensor) -> Tensor:
    """Of the last dimension, one after the other."""
    total = x[..., 0]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i]
    return total


def encode(
    x: Tensor, part: Part, side: Side, layout: Layout, gamma: float, low: Tensor | None, only: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes uint8 ``[…,P,n]`` of ``x[…,P,n]`` (fp32), and the parameter arrays ``[…,rows,groups]`` in the scale dtype.

    ``low`` bool ``[…,P]``: tokens of the low class. ``only`` bool ``[…,P]``: the tokens that parameters along channels
    are of, others do not count.
    """
    dtype, member = layout.scale_dtype, _members(part, side).to(x.device)
    if only is not None:
        member = only[..., None, None, :]
    grouped = _grouped(x, side, layout.page)
    finite = (torch.isfinite(grouped) | ~member).all(-1)
    if part.kind == "affine":
        least = torch.where(member, grouped, math.inf).amin(-1)
        most = torch.where(member, grouped, -math.inf).amax(-1)
        zero = round_to(torch.where(finite, least + 0.0, 0), dtype, -math.inf)  # zeros and ranges of -0 are 0
        top = float((1 << part.bits // 100) - 1)
        tops = torch.full((*x.shape[:-1], 1), top, device=x.device)
        if low is not None and side.low is not None and not side.own_arrays:
            tops = torch.where(low[..., None], float((1 << side.low.bits // 100) - 1), tops)
        span = torch.where(finite, most - zero.float() + 0.0, torch.nan)
        # Two classes share the channels' ranges, so the range is what is stored; a token's scale is its own.
        shares = side.shares_ranges
        scale = round_to(span if shares else span / (tops if side.axis != CHANNEL else top), dtype, math.inf)
        zero = torch.where(scale.isnan(), 0, zero)
        wide = [_spread(parameter.float(), part, side) for parameter in (scale, zero)]
        step = wide[0] / tops if shares else wide[0]
        codes = ((x - wide[1]) / torch.where(step == 0, 1, step)).round().clamp(min=0).minimum(tops)
        return torch.where(step > 0, codes, 0).to(torch.uint8), scale, zero
    size = torch.where(member & finite[..., None], grouped.abs(), 0)
    mean = _ascending_sum(size) / member.sum(-1).clamp(min=1)
    mean = torch.where(finite, mean, torch.nan)
    if part.kind == "sign":
        scale = round_to(mean, dtype)
        return torch.where(_spread(scale.float(), part, side).isnan(), 0, x >= 0).to(torch.uint8), scale
    threshold = mean * torch.tensor(gamma, dtype=torch.float32)
    outside = (size > threshold[..., None]) & member
    total, count = _ascending_sum(torch.where(outside, size, 0)), outside.sum(-1)
    scale = mean if side.compat else torch.where(finite, total / count.clamp(min=1), torch.nan)
    scale = round_to(scale, dtype)
    trit = torch.where(_ungrouped(outside, part, side), torch.where(x > 0, 2, 0), 1)
    return torch.where(_spread(scale.float(), part, side).isnan(), 0, trit).to(torch.uint8), scale


def _spread(parameter: Tensor, part: Part, side: Side) -> Tensor:
    """A parameter array ``[…,rows,groups]`` for each element of ``[…,P,n]``."""
    if side.axis == CHANNEL:
        return parameter.repeat_interleave(side.group, -2)
    return parameter.repeat_interleave(side.group, -1)[..., : part.channels]


def dequantize(codes: Tensor, part: Part, side: Side, parameters: list[Tensor], low: Tensor | None) -> Tensor:
    """``[…,P,n]`` in the dtype of ``parameters``, which are ``[…,P,n]`` already."""
    c, scale = codes.to(parameters[0].dtype), parameters[0]
    if part.kind == "affine":
        if side.low is not None and side.shares_ranges:
            high_top, low_top = ((1 << bits // 100) - 1 for bits in (part.bits, side.low.bits))
            scale = scale / (high_top if low is None else torch.where(low[..., None], low_top, high_top).to(scale))
        return c * scale + parameters[1]
    if part.kind == "trit":
        return c - 1 + 0 * scale if side.compat else (c - 1) * scale
    if not (side.compat and part.fourier):
        return torch.where(c > 0, scale, -scale)
    # As released: 0 or s; seen from the half spectrum the imaginary parts are +-s/2.
    real = torch.arange(part.channels, device=c.device) <= part.channels // 2
    return torch.where(real, c, c - 0.5) * scale


# ---- channels --------------------------------------------------------------------------------------------------------


def channel_order(channels: Tensor) -> Tensor:
    """``[…,D]`` int64: the easy channels (0) ascending, then the hard ones."""
    return (channels > 0).to(torch.int8).argsort(dim=-1, stable=True)


def to_coded(x: Tensor, side: Side, channels: Tensor | None) -> Tensor:
    """``x[B,G,…,D]`` in the order and the basis of the codes; ``channels[B,G,D]``."""
    if channels is not None and side.needs_channels:
        of_channel = channels.to(x.dtype).view(*channels.shape[:2], *[1] * (x.dim() - 3), -1)
        x = x / of_channel if side.channel_scale else x.gather(-1, channel_order(of_channel).expand(x.shape))
    easy = side.parts[0]
    return torch.cat([to_spectrum(x[..., : easy.channels]), x[..., easy.channels :]], -1) if easy.fourier else x


def from_coded(x: Tensor, side: Side, channels: Tensor | None) -> Tensor:
    """The inverse of :func:`to_coded`."""
    easy = side.parts[0]
    if easy.fourier:
        x = torch.cat([from_spectrum(x[..., : easy.channels]), x[..., easy.channels :]], -1)
    if channels is None or not side.needs_channels:
        return x
    of_channel = channels.to(x.dtype).view(*channels.shape[:2], *[1] * (x.dim() - 3), -1)
    if side.channel_scale:
        return x * of_channel
    return torch.empty_like(x).scatter(-1, channel_order(of_channel).expand(x.shape), x)


# ---- pages -----------------------------------------------------------------------------------------------------------


def gather_bytes(data: Tensor, start: Tensor, count: int) -> Tensor:
    """uint8 ``[…,count]`` from each ``start`` on."""
    return data[start[..., None] + torch.arange(count, device=data.device)]


def scatter_bytes(data: Tensor, start: Tensor, source: Tensor) -> None:
    """Write ``source[…,count]`` to each ``start``."""
    data[start[..., None] + torch.arange(source.shape[-1], device=data.device)] = source


def kv_seal(
    data: Tensor, offset: Tensor, k: Tensor, v: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, fmt: list[int], key_gamma: float, value_gamma: float,
) -> None:  # fmt: skip
    """``torch.ops.fastok.kv_seal``: write the pages of ``k, v [B,n*P,G,D]`` into ``data`` at ``offset[B,G,n]``.

    ``classes`` uint8 ``[B,G,n,ceil(P/8)]``: bits of the high-class tokens. ``*_channels`` fp16 ``[B,G,D]``.
    """
    layout = Layout.of(fmt, k.shape[3])
    for begin in range(0, offset.shape[2], CHUNK):
        pages = slice(begin, begin + CHUNK)
        where = offset[:, :, pages]
        counts = torch.full((*where.shape, layout.token_groups), layout.page // layout.token_groups,
                            device=data.device)  # fmt: skip
        at = Addresses.of(layout, where, counts, None if classes is None else classes[:, :, pages])
        place = torch.arange(int(at.size.max()) if at.size.numel() else 0, device=data.device)
        data[(where[..., None] + place)[place < at.size[..., None]]] = 0  # what aligns the parts
        tokens = slice(begin * layout.page, (begin + CHUNK) * layout.page)
        low = None if at.high is None else ~at.high
        sides = ((layout.key, k, key_channels, key_gamma), (layout.value, v, value_channels, value_gamma))
        for which, (side, x, channels, gamma) in enumerate(sides):
            rows = x[:, tokens].float().transpose(1, 2).unflatten(2, (-1, layout.page))
            _write_side(data, at, which, side, to_coded(rows, side, channels), gamma, low)


def _write_side(
    data: Tensor, at: Addresses, which: int, side: Side, x: Tensor, gamma: float, low: Tensor | None
) -> None:
    layout, arrays, rows = at.layout, [], []
    apart = ~low if side.own_arrays and low is not None else None  # the high class, of which parameters are alone
    for part, xs in zip(side.parts, x.split([part.channels for part in side.parts], -1), strict=True):
        codes, *parameters = encode(xs, part, side, layout, gamma, low, apart)
        rows.append(codes)
        arrays += parameters
    of_low = rows[0]
    if side.low is not None and apart is not None:
        of_low, *parameters = encode(x, side.low, side, layout, gamma, low, low)
        arrays += parameters
    packed = torch.cat([pack_codes(codes, part.bits) for part, codes in zip(side.parts, rows, strict=True)], -1)
    if low is None or side.low is None:
        scatter_bytes(data, at.codes[which], packed)
    else:
        scatter_bytes(data, at.codes[which][~low], packed[~low])
        scatter_bytes(data, at.codes[which][low], pack_codes(of_low[low], side.low.bits))
    for start, values, array in zip(at.arrays[which], arrays, side.arrays, strict=True):
        raw = values.contiguous().view(torch.uint8)
        if side.axis == CHANNEL:
            start = start[..., :: side.group]
        if array.high is not None and low is not None:  # a class without tokens has no row
            there = (low != array.high).any(-1)
            start, raw = start[there], raw[there]
        scatter_bytes(data, start, raw)


def read_side(
    data: Tensor, at: Addresses, which: int, channels: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dequantized rows ``[B,G,n,P,D]``; those that do not exist are 0."""
    layout = at.layout
    side = layout.value if which else layout.key
    low = None if at.high is None else ~at.high
    start = torch.where(at.valid, at.codes[which], 0)
    rows = _read_parts(data, at, which, side.parts, start, low, 0, dtype)
    if side.low is not None and side.own_arrays and low is not None:
        first = sum(part.arrays for part in side.parts)
        of_low = _read_parts(data, at, which, (side.low,), start, low, first, dtype)
        rows = torch.where(low[..., None], of_low, rows)
    x = from_coded(rows, side, channels)
    return torch.where(at.valid[..., None], x, 0)


def _read_parts(
    data: Tensor, at: Addresses, which: int, parts: tuple[Part, ...], start: Tensor, low: Tensor | None, array: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows of all entries as if they were coded so; their parameters begin with that array."""
    layout = at.layout
    side, rows, place = layout.value if which else layout.key, [], 0
    for part in parts:
        size = code_bytes(part.bits, part.channels)
        codes = _read_codes(data, start + place, part, side, low)
        parameters = []
        for _ in range(part.arrays):
            of_entry = torch.where(at.valid, at.arrays[which][array], 0)
            parameter = _read_bytes(data, of_entry, side.groups_of(part) * side.scale_bytes)
            parameter = parameter.contiguous().view(layout.scale_dtype).to(dtype)
            if side.axis != CHANNEL:
                parameter = parameter.repeat_interleave(side.group, -1)[..., : part.channels]
            parameters.append(parameter)
            array += 1
        rows.append(dequantize(codes, part, side, parameters, low))
        place += size
    return torch.cat(rows, -1)


def _read_bytes(data: Tensor, start: Tensor, count: int) -> Tensor:
    """As `gather_bytes`; of what entries do not have, whatever is there."""
    return gather_bytes(data, start.clamp(max=max(data.numel() - count, 0)), count)


def _read_codes(data: Tensor, start: Tensor, part: Part, side: Side, low: Tensor | None) -> Tensor:
    def read(bits: int) -> Tensor:
        return unpack_codes(_read_bytes(data, start, code_bytes(bits, part.channels)), bits, part.channels)

    codes = read(part.bits)
    if low is None or side.low is None or side.own_arrays:
        return codes
    return torch.where(low[..., None], read(side.low.bits), codes)


def kv_unseal(
    data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], total: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.kv_unseal``: ``k, v [B,total,G,D]`` in the dtype of ``hot_k``, 0 behind a head's last token.

    ``offset[B,G,n]``, ``counts`` int16 ``[B,G,n,token groups]``, ``hot_*[B,G,W,D]``, ``hot_len`` int32 ``[B,G]``.
    """
    batch, groups, window, width = hot_k.shape
    layout = Layout.of(fmt, width)
    out = hot_k.new_zeros(2, batch, groups, total + 1, width)  # the last place takes what does not exist
    length = counts.long().sum(-1)
    first = length.cumsum(-1) - length
    entry = torch.arange(layout.page, device=data.device)
    for begin in range(0, offset.shape[2], CHUNK):
        pages = slice(begin, begin + CHUNK)
        at = Addresses.of(layout, offset[:, :, pages], counts[:, :, pages],
                          None if classes is None else classes[:, :, pages])  # fmt: skip
        place = torch.where(at.valid, first[:, :, pages, None] + entry, total).flatten(2)[..., None]
        for which, channels in enumerate((key_channels, value_channels)):
            rows = read_side(data, at, which, channels).to(hot_k.dtype).flatten(2, 3)
            out[which].scatter_(2, place.expand(rows.shape), rows)
    entry = torch.arange(window, device=data.device)
    place = torch.where(entry < hot_len[..., None], length.sum(-1, keepdim=True) + entry, total)[..., None]
    for which, hot in enumerate((hot_k, hot_v)):
        out[which].scatter_(2, place.expand(hot.shape), hot)
    k, v = (x[..., :total, :].transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in out)
    return k, v
