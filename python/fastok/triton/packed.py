"""``decode_packed`` in Triton: few query rows over a packed cache. Semantics: ops/decode.py, reference/decode.py.

A program has up to 16 rows of one KV head's queries and a split of its sealed pages, or its hot window. Codes become
numbers in registers, in the order and the basis of the codes: queries are brought into those before, sums back after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.kv_layout import CHANNEL, TRIT, Layout, Side
from ..reference.quantize import channel_order, fourier_basis, fourier_weights, from_coded
from .attention import load_rows, padded
from .common import kernel_dtype, readable
from .decode import attend, combine, store_part

_ROWS = 16
_PAGES = tl.constexpr(4)  # of a split, and more where there would be more splits than these
_SPLITS = tl.constexpr(63)  # and one of the hot window
_LOW_TRITS = tl.constexpr(TRIT // 100)


def decode_packed(
    q: Tensor, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], scale: float,
    softcap: float, key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode_packed``. A record that does not lie within ``data`` is skipped."""
    batch, rows, heads, width = q.shape
    groups, pages, window = offset.shape[1], offset.shape[2], hot_k.shape[2]
    layout = Layout.of(fmt, width)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    out = torch.empty(batch, rows, heads, width, dtype=kernel_dtype(q.dtype), device=q.device)
    if lse.numel() == 0:
        return out.to(q.dtype), lse
    counts = counts.int().clamp(0, layout.page // layout.token_groups).contiguous()
    in_page = counts.sum(-1, dtype=torch.int32)
    first = (in_page.cumsum(-1) - in_page).int()
    sealed = in_page.sum(-1, dtype=torch.int32)
    # Pages of a head, so that those of others do not move its splits.
    used = torch.where(in_page > 0, torch.arange(1, pages + 1, device=q.device), 0)
    used = torch.nn.functional.pad(used, (0, 1)).amax(-1).int()
    capacity = pages * layout.page + window
    chosen = None if tokens is None else _chosen(tokens, capacity)
    units = groups if chosen is None else chosen.shape[1]  # heads with keys of their own
    pack = heads // max(units, groups)
    splits = min(triton.cdiv(pages, _PAGES.value), _SPLITS.value)
    tiles = triton.cdiv(rows * pack, _ROWS)
    parts, part_lse = (torch.empty(splits + 1, *shape, dtype=torch.float32, device=q.device)
                       for shape in ((*lse.shape, width), lse.shape))  # fmt: skip
    plain = q.float().contiguous()
    coded = plain if splits == 0 else _coded_queries(plain, layout.key, key_channels)
    hot_k, hot_v = readable(hot_k), readable(hot_v)
    bias = None if key_bias is None or key_bias.shape[-1] == 0 else key_bias.contiguous()
    _decode_pages[(batch * (heads // pack) * tiles, splits + 1)](
        plain, coded, data, _as_parameters(data, layout.scale_dtype), data.numel(), offset.contiguous(), counts, first,
        used, None if classes is None else classes.contiguous(), hot_k, hot_v, hot_len.int().contiguous(), sealed, bias,
        chosen, parts, part_lse,
        *hot_k.stride()[:3], *hot_v.stride()[:3], 0 if bias is None else bias.stride(0),
        bias.stride(1) if bias is not None and bias.dim() == 3 else 0, 0 if bias is None else bias.shape[-1],
        units, capacity, heads, groups, pack, rows, tiles, pages, splits, window,
        scale / softcap if softcap > 0 else scale, softcap if softcap > 0 else None,
        **_described("KEY", layout.key), **_described("VALUE", layout.value), PAGE=layout.page,
        GROUPS=layout.token_groups, GROUPS_BLOCK=triton.next_power_of_2(layout.token_groups),
        PAGE_BLOCK=triton.next_power_of_2(layout.page), GROUP=layout.group, SCALE_BYTES=layout.scale_dtype.itemsize,
        D=width, D_BLOCK=padded(width), M=_ROWS, N=32 if padded(width) <= 128 else 16, num_warps=4,
        num_stages=1,  # more would not fit the shared memory of smaller GPUs, where the window is fp32
    )  # fmt: skip
    if splits and (layout.value.parts[0].fourier or (value_channels is not None and layout.value.needs_channels)):
        sums = parts[:splits].unflatten(2, (groups, heads // groups)).permute(1, 2, 0, 3, 4, 5)
        parts[:splits] = from_coded(sums, layout.value, value_channels).permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    combine(parts, part_lse, out, lse)
    return out.to(q.dtype), lse


def _described(name: str, side: Side) -> dict[str, int]:
    """A side as the kernel has it: bits of the first part's codes (0: trits), and of the low class (0: none)."""
    easy = side.parts[0]
    return {
        f"{name}_BITS": 0 if easy.bits == TRIT else easy.bits // 100,
        f"{name}_SIGNS": int(easy.kind == "sign"),
        f"{name}_FOURIER": int(easy.fourier),
        f"{name}_COMPAT": int(side.compat),
        f"{name}_BY_CHANNEL": int(side.axis == CHANNEL),
        f"{name}_LOW": side.low_bits // 100,  # _LOW_TRITS of trits, which no affine code has
        f"{name}_EASY": easy.channels,
    }


def _as_parameters(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as kernels read parameters; bf16, which Triton's interpreter lacks, as integers."""
    whole = data[: data.numel() // dtype.itemsize * dtype.itemsize]
    return whole.view(torch.int16 if dtype == torch.bfloat16 else dtype)


def _chosen(tokens: Tensor, capacity: int) -> Tensor:
    """uint8 ``[B,units,capacity]``: 1 for the places that are listed."""
    inside = (tokens >= 0) & (tokens < capacity)
    chosen = torch.zeros(*tokens.shape[:2], capacity + 1, dtype=torch.uint8, device=tokens.device)
    return chosen.scatter_(-1, torch.where(inside, tokens, capacity).long(), 1)[..., :capacity].contiguous()


def _coded_queries(q: Tensor, side: Side, channels: Tensor | None) -> Tensor:
    """``q[B,S,H,D]`` so that its products with coded keys are those with the keys."""
    if channels is not None and side.needs_channels:
        of_head = channels.float().repeat_interleave(q.shape[2] // channels.shape[1], 1)[:, None]
        q = q * of_head if side.channel_scale else q.gather(-1, channel_order(of_head).expand(q.shape))
    easy = side.parts[0]
    if easy.fourier:  # Parseval: the inner product of the spectra
        n = easy.channels
        spectrum = q[..., :n] @ fourier_basis(n).to(q.device) * fourier_weights(n).to(q.device)
        q = torch.cat([spectrum, q[..., n:]], -1)
    return q.contiguous()


@triton.jit
def _low_row(D: tl.constexpr, LOW: tl.constexpr, HIGH_ROW: tl.constexpr) -> int:
    """Bytes of a row of codes of the low class."""
    if LOW == 0:
        return HIGH_ROW
    elif LOW == _LOW_TRITS:
        return (D + 4) // 5
    else:
        return (D * LOW + 7) // 8


@triton.jit
def _trit(byte: tl.tensor, plane: tl.tensor) -> tl.tensor:
    """The trit of each byte that is in that plane."""
    power = tl.where(plane == 0, 1, tl.where(plane == 1, 3, tl.where(plane == 2, 9, tl.where(plane == 3, 27, 81))))
    return byte // power % 3


@triton.jit
def _side_sizes(
    n: tl.tensor,
    n_high: tl.tensor,
    filled: tl.tensor,
    BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    LOW: tl.constexpr,
    EASY: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Bytes of a page's codes, and of its codes and parameters."""
    row: tl.constexpr = ((EASY + 4) // 5 if BITS == 0 else (EASY * BITS + 7) // 8) + ((D - EASY) * 2 + 7) // 8
    codes = (n_high * row + (n - n_high) * _low_row(D, LOW, row) + 15) // 16 * 16
    easy: tl.constexpr = EASY if BY_CHANNEL else (EASY + GROUP - 1) // GROUP
    hard: tl.constexpr = D - EASY if BY_CHANNEL else (D - EASY + GROUP - 1) // GROUP
    width: tl.constexpr = easy * (1 if SIGNS or BITS == 0 else 2) + hard * 2
    if LOW == _LOW_TRITS:  # classes have arrays of their own, along channels
        numbers = tl.where(n_high > 0, width, 0) + tl.where(n > n_high, D, 0)
    else:
        numbers = (filled if BY_CHANNEL else n) * width
    return codes, codes + (numbers * SCALE_BYTES + 15) // 16 * 16


@triton.jit
def _parameters(params: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """In fp32; integers are the bits of bf16 numbers."""
    x = tl.load(params + at, mask=mask, other=0)
    if params.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _coded_rows(
    data: tl.tensor,
    params: tl.tensor,
    start: tl.tensor,
    codes_size: tl.tensor,
    rank: tl.tensor,
    slot: tl.tensor,
    high: tl.tensor,
    n: tl.tensor,
    n_high: tl.tensor,
    filled: tl.tensor,
    there: tl.tensor,
    BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    FOURIER: tl.constexpr,
    COMPAT: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    LOW: tl.constexpr,
    EASY: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
) -> tl.tensor:
    """Rows of a page as its codes have them, in fp32; 0 for tokens that are not ``there`` and beyond ``D`` channels."""
    HARD: tl.constexpr = D - EASY
    PER_BYTE: tl.constexpr = 5 if BITS == 0 else 8 // BITS
    EASY_BYTES: tl.constexpr = (EASY + PER_BYTE - 1) // PER_BYTE
    HARD_BYTES: tl.constexpr = (HARD * 2 + 7) // 8 if HARD > 0 else 1
    d = tl.arange(0, D_BLOCK)[None, :]
    mask = there[:, None] & (d < D)
    is_hard = d >= EASY
    own = tl.where(is_hard, d - EASY, d)

    byte_at = tl.where(is_hard, EASY_BYTES + own % HARD_BYTES, own % EASY_BYTES)
    plane = tl.where(is_hard, own // HARD_BYTES, own // EASY_BYTES)
    row_at = rank * (EASY_BYTES + (HARD * 2 + 7) // 8)
    if LOW > 0:
        LOW_BYTES: tl.constexpr = (D + 4) // 5 if LOW == _LOW_TRITS else (D * LOW + 7) // 8
        low_at = n_high * EASY_BYTES + (rank - n_high) * LOW_BYTES
        row_at = tl.where(high, row_at, low_at)
        byte_at = tl.where(high[:, None], byte_at, d % LOW_BYTES)
        plane = tl.where(high[:, None], plane, d // LOW_BYTES)
    byte = tl.load(data + start + row_at[:, None] + byte_at, mask=mask, other=0).to(tl.int32)
    if BITS == 0:
        code = _trit(byte, plane)
    else:
        bits = tl.where(is_hard, 2, BITS)
        if LOW > _LOW_TRITS:
            bits = tl.where(high[:, None], BITS, LOW)
        code = (byte >> (bits * plane)) & ((1 << bits) - 1)
        if LOW == _LOW_TRITS:
            code = tl.where(high[:, None], code, _trit(byte, plane))
    code = code.to(tl.float32)

    AFFINE: tl.constexpr = not SIGNS and BITS > 0
    EASY_WIDTH: tl.constexpr = EASY if BY_CHANNEL else (EASY + GROUP - 1) // GROUP
    HARD_WIDTH: tl.constexpr = HARD if BY_CHANNEL else (HARD + GROUP - 1) // GROUP
    row = (slot if BY_CHANNEL else rank)[:, None]
    rows = filled if BY_CHANNEL else n
    if LOW == _LOW_TRITS:  # the one row of the high class; behind its arrays, that of the low one
        rows = tl.where(n_high > 0, 1, 0)
    column = own if BY_CHANNEL else own // GROUP
    first = (start + codes_size) // SCALE_BYTES
    behind = first + rows * (EASY_WIDTH * (2 if AFFINE else 1))
    scale_at = tl.where(is_hard, behind + row * HARD_WIDTH + column, first + row * EASY_WIDTH + column)
    if LOW == _LOW_TRITS:
        scale_at = tl.where(high[:, None], scale_at, behind + column)
    scale = _parameters(params, scale_at, mask)
    if LOW > _LOW_TRITS and BY_CHANNEL:  # classes share the range
        scale = scale / tl.where(high[:, None], ((1 << BITS) - 1) * 1.0, ((1 << LOW) - 1) * 1.0)
    if AFFINE and LOW == _LOW_TRITS:
        zero = _parameters(params, scale_at + rows * EASY_WIDTH, mask & high[:, None])
        x = tl.where(high[:, None], code * scale + zero, code - 1 + 0 * scale if COMPAT else (code - 1) * scale)
    elif AFFINE:
        x = code * scale + _parameters(params, scale_at + rows * EASY_WIDTH, mask)
    elif SIGNS:
        if COMPAT and FOURIER:
            x = tl.where(d <= EASY // 2, code, code - 0.5) * scale
        else:
            x = tl.where(code > 0, scale, -scale)
    else:
        x = code - 1 + 0 * scale if COMPAT else (code - 1) * scale
    if HARD > 0:
        zero = _parameters(params, scale_at + rows * HARD_WIDTH, mask & is_hard)
        x = tl.where(is_hard, code * scale + zero, x)
    return tl.where(mask, x, 0.0)


@triton.jit(
    do_not_specialize=[
        "bytes_", "bias_places", "units", "capacity", "heads", "groups", "pack", "rows", "tiles", "pages",
        "splits", "window",
    ]
)  # fmt: skip
def _decode_pages(
    plain: tl.tensor,
    coded: tl.tensor,
    data: tl.tensor,
    params: tl.tensor,
    bytes_: int,
    offset: tl.tensor,
    counts: tl.tensor,
    first: tl.tensor,
    used: tl.tensor,
    classes: tl.tensor,
    hot_k: tl.tensor,
    hot_v: tl.tensor,
    hot_lengths: tl.tensor,
    sealed_lengths: tl.tensor,
    bias: tl.tensor,
    chosen: tl.tensor,
    parts: tl.tensor,
    part_lse: tl.tensor,
    hot_k_batch: tl.int64,
    hot_k_head: tl.int64,
    hot_k_row: tl.int64,
    hot_v_batch: tl.int64,
    hot_v_head: tl.int64,
    hot_v_row: tl.int64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_places: int,
    units: int,
    capacity: int,
    heads: int,
    groups: int,
    pack: int,
    rows: int,
    tiles: int,
    pages: int,
    splits: int,
    window: int,
    factor: float,
    cap: float | None,
    KEY_BITS: tl.constexpr,
    KEY_SIGNS: tl.constexpr,
    KEY_FOURIER: tl.constexpr,
    KEY_COMPAT: tl.constexpr,
    KEY_BY_CHANNEL: tl.constexpr,
    KEY_LOW: tl.constexpr,
    KEY_EASY: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_SIGNS: tl.constexpr,
    VALUE_FOURIER: tl.constexpr,
    VALUE_COMPAT: tl.constexpr,
    VALUE_BY_CHANNEL: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    VALUE_EASY: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Programs are (sample, heads that share keys, tile of rows) and splits, the last of the hot window."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    item = program % tiles * M + tl.arange(0, M)
    first_head = program // tiles % (heads // pack) * pack
    sample = (program // tiles // (heads // pack)).to(tl.int64)
    group = first_head // (heads // groups)
    inside = item < rows * pack
    query = item // pack
    head = first_head + item % pack
    of_head = sample * groups + group
    sealed = tl.load(sealed_lengths + of_head)
    hot = tl.minimum(tl.maximum(tl.load(hot_lengths + of_head), 0), window)
    last = sealed + hot - rows + query
    if chosen is not None:
        chosen += (sample * units + first_head // (heads // units)) * capacity
    own_bias = None
    if bias is not None:
        own_bias = bias + sample * bias_batch + head * bias_head

    peak = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_BLOCK], tl.float32)
    q_row = (sample * rows + query) * heads + head
    if split == splits:
        q_tile = load_rows(plain, q_row, D, inside, D, D_BLOCK)
        for begin in range(0, hot, N):
            entry = begin + tl.arange(0, N)
            there = entry < hot
            if chosen is not None:
                there = there & (tl.load(chosen + sealed + entry, mask=there, other=0) > 0)
            k_tile = load_rows(hot_k + sample * hot_k_batch + group * hot_k_head, entry, hot_k_row, there, D, D_BLOCK)
            v_tile = load_rows(hot_v + sample * hot_v_batch + group * hot_v_head, entry, hot_v_row, there, D, D_BLOCK)
            peak, norm, acc = attend(
                q_tile, k_tile.to(tl.float32), v_tile.to(tl.float32), there, sealed + entry, last, own_bias,
                bias_places, inside, peak, norm, acc, factor, cap, M, N,
            )  # fmt: skip
    else:
        q_tile = load_rows(coded, q_row, D, inside, D, D_BLOCK)
        token_group = tl.arange(0, GROUPS_BLOCK)
        position = tl.arange(0, PAGE_BLOCK)
        own_pages = tl.load(used + of_head)
        each = tl.maximum((own_pages + _SPLITS - 1) // _SPLITS, _PAGES)
        for page in range(split * each, tl.minimum((split + 1) * each, own_pages)):
            of_page = of_head * pages + page
            in_group = tl.load(counts + of_page * GROUPS + token_group, mask=token_group < GROUPS, other=0)
            until = tl.cumsum(in_group, 0)
            n = tl.sum(in_group, 0)
            filled = tl.sum((in_group > 0).to(tl.int32), 0)
            begin = tl.load(first + of_page)
            flags = tl.zeros([PAGE_BLOCK], tl.int32)
            n_high = n
            if classes is not None:
                byte = tl.load(classes + of_page * ((PAGE + 7) // 8) + position // 8, mask=position < n, other=0)
                flags = (byte.to(tl.int32) >> (position % 8)) & 1
                n_high = tl.sum(flags, 0)
            key_codes, key_size = _side_sizes(
                n, n_high, filled, KEY_BITS, KEY_SIGNS, KEY_BY_CHANNEL, KEY_LOW, KEY_EASY, D, GROUP, SCALE_BYTES,
            )  # fmt: skip
            value_codes, value_size = _side_sizes(
                n, n_high, filled, VALUE_BITS, VALUE_SIGNS, VALUE_BY_CHANNEL, VALUE_LOW, VALUE_EASY, D, GROUP,
                SCALE_BYTES,
            )  # fmt: skip
            start = tl.load(offset + of_page)
            # Directories may hold anything; no index leaves the data.
            sound = (start >= 0) & (start % 16 == 0) & (start + key_size + value_size <= bytes_)
            for at in range(0, tl.where(sound, n, 0), N):
                entry = at + tl.arange(0, N)
                there = entry < n
                passed = (entry[:, None] >= until[None, :]) & (in_group > 0)[None, :]
                slot = tl.minimum(tl.sum(passed.to(tl.int32), 1), filled - 1)
                rank = entry
                high = there
                if classes is not None:
                    before = tl.sum(tl.where(position[None, :] < entry[:, None], flags[None, :], 0), 1)
                    high = tl.sum(tl.where(position[None, :] == entry[:, None], flags[None, :], 0), 1) > 0
                    rank = tl.where(high, before, n_high + entry - before)
                if chosen is not None:
                    there = there & (tl.load(chosen + begin + entry, mask=there, other=0) > 0)
                k_tile = _coded_rows(
                    data, params, start, key_codes, rank, slot, high, n, n_high, filled, there,
                    KEY_BITS, KEY_SIGNS, KEY_FOURIER, KEY_COMPAT, KEY_BY_CHANNEL, KEY_LOW, KEY_EASY, D, D_BLOCK, GROUP,
                    SCALE_BYTES,
                )  # fmt: skip
                v_tile = _coded_rows(
                    data, params, start + key_size, value_codes, rank, slot, high, n, n_high, filled, there,
                    VALUE_BITS, VALUE_SIGNS, VALUE_FOURIER, VALUE_COMPAT, VALUE_BY_CHANNEL, VALUE_LOW, VALUE_EASY,
                    D, D_BLOCK, GROUP, SCALE_BYTES,
                )  # fmt: skip
                peak, norm, acc = attend(
                    q_tile, k_tile, v_tile, there, begin + entry, last, own_bias, bias_places, inside, peak, norm, acc,
                    factor, cap, M, N,
                )  # fmt: skip

    store_part(parts, part_lse, split, tl.num_programs(0) // tiles // (heads // pack) * heads * rows,
               (sample * heads + head) * rows + query, inside, peak, norm, acc, D, D_BLOCK)  # fmt: skip
