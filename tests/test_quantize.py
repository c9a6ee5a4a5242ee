"""Packed pages: codes, statistics, bytes, growth and eviction, on every backend."""

import math

import fastok
import pytest
import torch
from fastok import Code, KVFormat, PackedKV, kv_pack
from fastok.reference import quantize as reference
from fastok.reference.kv_layout import Layout, pack_bits
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import BITS, DTYPES, FORMATS, NAMES, keys_values, packed, salient, same_records, sealed_tokens
from torch import Tensor

over_formats = pytest.mark.parametrize("name", NAMES)


def round_trip(x: Tensor, code: Code, group: int = 32, page: int = 32, scale_dtype: str = "fp16") -> Tensor:
    """Keys ``x[T,D]`` packed and unpacked, all of them sealed."""
    fmt = KVFormat(code, Code(8, "token"), group, page, 0, scale_dtype)
    return kv_pack(x[None, :, None], x[None, :, None], fmt).unpack()[0][0, :, 0]


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    codes = torch.tensor([1, 2, 3, 0, 3, 1, 0, 2, 2, 0, 1, 3, 0, 1, 2, 3])
    # 2 bits: 4 bytes a row; byte 0 holds codes 0, 4, 8, 12 = 1, 3, 2, 0 from the lowest bits up: 0b00_10_11_01.
    assert reference.pack_codes(codes, 200).tolist() == [0b00101101, 0b01000110, 0b10010011, 0b11111000]
    # 4 bits: 8 bytes; byte 0 holds codes 0 and 8 = 1, 2.
    assert reference.pack_codes(codes, 400).tolist() == [0x21, 0x02, 0x13, 0x30, 0x03, 0x11, 0x20, 0x32]
    # 1 bit: 2 bytes; byte 0 holds codes 0, 2, 4, …, byte 1 codes 1, 3, 5, ….
    assert reference.pack_codes((codes > 1).int(), 100).tolist() == [0b10010110, 0b10101001]
    # Trits: 4 bytes for 16; byte 0 holds codes 0, 4, 8, 12 and none: 1 + 3·2 + 9·2 + 27·0.
    trits = torch.tensor([1, 2, 0, 0, 2, 1, 0, 2, 2, 0, 1, 1, 0, 1, 2, 2])
    assert reference.pack_codes(trits, 158).tolist() == [1 + 6 + 18, 2 + 3 + 27, 9 + 54, 6 + 9 + 54]
    assert reference.pack_codes(torch.tensor([0, 255]), 800).tolist() == [0, 255]


@settings(max_examples=25)
@given(bits=st.sampled_from([800, 400, 200, 158, 100]), channels=st.integers(1, 256), seed=st.integers(0, 99))
def test_packing_is_invertible(bits: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 3 if bits == 158 else 1 << bits // 100, (3, channels))
    row = reference.pack_codes(codes, bits)
    assert row.shape[-1] == math.ceil(channels / 5 if bits == 158 else channels * bits / 800)
    assert_same(reference.unpack_codes(row, bits, channels), codes.to(torch.uint8))


def test_golden_page() -> None:
    """A whole record by hand: two tokens' worth of keys 0…3 along channels, values along tokens."""
    k = torch.zeros(1, 8, 1, 32)
    k[0, :, 0, 0] = torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0])
    v = torch.zeros(1, 8, 1, 32)
    v[0, 2, 0, :] = torch.arange(32) % 4
    fmt = KVFormat(Code(2, "channel"), Code(2, "token"), group=8, page=8, hot=0)
    record = kv_pack(k, v, fmt).record(0, 0, 0)
    assert record.numel() == 64 + 128 + 64 + 128
    assert record[:64].view(8, 8)[:, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert record[:64].view(8, 8)[:, 1:].sum() == 0
    scales, zeros = record[64:192].view(torch.float16).view(2, 32)
    assert scales.tolist() == [1.0] + [0.0] * 31
    assert zeros.count_nonzero() == 0
    # Row 2: byte i holds channels i, i + 8, i + 16, i + 24, all of code i % 4.
    assert record[192:256].view(8, 8)[2].tolist() == [0b01010101 * (i % 4) for i in range(8)]
    assert record[256:].view(torch.float16).view(2, 8, 4)[0, 2].tolist() == [1.0] * 4


@over_formats
@over_backends("kv_seal", without=("reference", "cuda-on-host"))
def test_bytes_are_those_of_the_specification(backend: Backend, name: str) -> None:
    fmt = FORMATS[name]
    for width, dtype in ((64, torch.float32), (128, torch.bfloat16), (80, torch.float16)):
        k, v = keys_values(2, 2 * fmt.page, 3, width, dtype)
        k[0, 3, 1, 5], v[1, -2, 0, 9] = math.nan, math.inf
        k[:, :, 2, 7] = 0.5
        cache = PackedKV(fmt, 2, 3, width, dtype=dtype)
        cache._choose_channels(k[:, : fmt.page], v[:, : fmt.page])
        high = salient(fmt, 2, 3, 2 * fmt.page)
        classes = None if high is None else pack_bits(high.unflatten(2, (2, fmt.page)))
        offset = cache._take(2, 3, 2, classes)
        # Odd strides, in the middle of NaN.
        k, v = (torch.nn.functional.pad(x, (3, 2, 1, 0, 2, 1), value=math.nan)[:, 2:-1, 1:, 3:-2] for x in (k, v))
        rest = (offset, k, v, classes, cache.key_channels, cache.value_channels, fmt.flat, fmt.key.gamma,
                fmt.value.gamma)  # fmt: skip
        wanted, got = (torch.full_like(cache.data, 77) for _ in range(2))
        reference.kv_seal(wanted, *rest)
        got = backend.kv_seal(got, *rest)
        assert_same(got, wanted, f"{name} {width} {dtype}")


# ---- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_affine_codes_err_at_most_half_a_step(bits: int, axis: str, scale_dtype: str) -> None:
    x = torch.randn(64, 64) * torch.randn(64).exp()
    y = round_trip(x, Code(bits, axis), scale_dtype=scale_dtype)
    grouped = [z.unflatten(0 if axis == "channel" else 1, (2, 32)) for z in (x, y)]
    dim = 1 if axis == "channel" else 2
    span = grouped[0].amax(dim, keepdim=True) - grouped[0].amin(dim, keepdim=True)
    # The parameters are rounded outwards: by one step of their dtype at the range, and at the largest magnitude.
    eps = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[scale_dtype]).eps
    outward = eps * (grouped[0].abs().amax(dim, keepdim=True) + span)
    step = (span + outward) / (2**bits - 1) * (1 + eps)
    assert ((grouped[0] - grouped[1]).abs() <= step / 2 + 1e-6 * grouped[0].abs().amax()).all()
    # The extremes are reached.
    for extreme in (torch.amin, torch.amax):
        reached = (extreme(grouped[1], dim, keepdim=True) - extreme(grouped[0], dim, keepdim=True)).abs()
        assert (reached <= step / 2 + outward).all()


def test_half_steps_go_to_the_even_code_and_none_goes_beyond() -> None:
    x = torch.zeros(32, 32)
    x[:8, 0] = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0])
    y = round_trip(x, Code(2, "channel"))
    assert y[:8, 0].tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert int(reference.unpack_codes(torch.tensor([255]).to(torch.uint8), 200, 4).max()) == 3


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", BITS[:4])
def test_constant_groups_are_exact(bits: float, axis: str) -> None:
    x = torch.full((32, 64), 0.125)
    x[:, 32:] = -3.0
    assert_same(round_trip(x, Code(bits, axis)), x)
    assert (round_trip(torch.zeros(32, 64), Code(bits, axis)) == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_axes(bits: float) -> None:
    """One channel times 1000: per channel the others keep their error, per token they do not; and the other way."""
    x = torch.randn(64, 64)
    for axis, where in (("channel", (slice(None), 5)), ("token", (5, slice(None)))):
        loud = x.clone()
        loud[where] *= 1000
        others = torch.ones(64, 64, dtype=torch.bool)
        others[where] = False
        if bits in (1.5, 1.25, 1):  # the spectrum mixes channels: only tokens stay apart
            if axis == "channel" or bits > 1:  # which channels are hard depends on all tokens
                continue
            code = Code(bits, "token")
            assert_same(round_trip(loud, code, 64, 64)[others], round_trip(x, code, 64, 64)[others])
            continue
        same, mixed = (round_trip(loud, Code(bits, a), 64, 64)[others] for a in
                       (axis, "token" if axis == "channel" else "channel"))  # fmt: skip
        assert_same(same, round_trip(x, Code(bits, axis), 64, 64)[others])
        assert not torch.equal(mixed, x[others])
        before = (round_trip(x, Code(bits, "token" if axis == "channel" else "channel"), 64, 64)[others] - x[others])
        assert (mixed - x[others]).abs().mean() > 1.5 * before.abs().mean()


def test_groups_end_at_heads_pages_and_odd_widths() -> None:
    """A loud token spoils its own group of its own head and nothing else, with a last group that is shorter."""
    fmt = KVFormat(Code(2, "channel"), Code(2, "token"), group=32, page=64, hot=5)
    k, v = torch.randn(2, 2, 133, 3, 40).unbind(0)
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[1, 40, 2], loud_v[1, 40, 2, 33:] = 1e3, 1e3
    quiet, loud = kv_pack(k, v, fmt).unpack(), kv_pack(loud_k, loud_v, fmt).unpack()
    for which, spoilt in ((0, (1, slice(32, 64), 2)), (1, (1, 40, 2, slice(32, 40)))):
        differs = quiet[which] != loud[which]
        outside = differs.clone()
        outside[spoilt] = False
        assert differs.any()
        assert not outside.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@over_formats
def test_what_is_not_finite_stays_in_its_group(name: str, bad: float) -> None:
    fmt = FORMATS[name]
    total, width = fmt.page + fmt.hot, 64
    k, v = keys_values(1, total, 2, width)
    plain = kv_pack(k, v, fmt).unpack()
    k[0, 1, 0, 3] = v[0, 1, 0, 3] = bad
    spoilt = kv_pack(k, v, fmt).unpack()
    for which, code in enumerate((fmt.key, fmt.value)):
        if code.bits in (1.5, 1.25, 1) or code.channel_scale:
            continue  # which channels are hard, or by what they are divided, may change
        differs = (plain[which] != spoilt[which])[0]
        assert bool(spoilt[which][0, 1, 0, 3].isnan())
        assert not differs[:, 1].any()
        if code.axis == "token":
            assert not differs[torch.arange(total) != 1].any()
        else:
            assert not differs[..., torch.arange(width) != 3].any()
            assert not differs[fmt.group if fmt.group < fmt.page else fmt.page :].any()


def test_a_range_that_scales_cannot_hold_is_nan_not_wrong() -> None:
    x = torch.randn(32, 32)
    x[0, 0] = 1e6
    y = round_trip(x, Code(4, "channel"))
    assert y[:, 0].isnan().all()
    assert torch.isfinite(y[:, 1:]).all()
    assert (round_trip(x, Code(4, "channel"), scale_dtype="bf16")[:, 0] - x[:, 0]).abs().max() < 1e5


def test_mean_squared_errors_are_the_known_ones() -> None:
    """spec_kv §18, groups of 32 of N(0,1): a factor in a scale would show at once."""
    x = torch.randn(32 * 512, 128)
    known = {(2, False): 0.154, (4, False): 0.0061, (1.58, False): 0.182}
    for (bits, compat), wanted in known.items():
        error = (round_trip(x, Code(bits, "channel", compat=compat)) - x).square().mean()
        assert abs(float(error) / wanted - 1) < 0.03, (bits, compat, float(error))
    half = round_trip(x, Code(1.58, "channel", gamma=0.5)) - x
    assert abs(float(half.square().mean()) / 0.203 - 1) < 0.03
    for compat, wanted in ((False, 0.352), (True, 0.60)):
        error = (round_trip(x, Code(1, "channel", compat=compat)) - x).square().mean()
        assert abs(float(error) / wanted - 1) < 0.03, (compat, float(error))


@pytest.mark.parametrize("n", [2, 32, 64])
@pytest.mark.parametrize("compat", [False, True])
def test_half_spectrum_is_the_full_fourier_transform(n: int, compat: bool) -> None:
    """Signs of all 2n parts of the full spectrum, {0, s} as released or ±s, real part of the inverse."""
    x = torch.randn(32, n, dtype=torch.float64)
    full = torch.view_as_real(torch.fft.fft(x)).flatten(1)
    s = full.abs().mean(0)
    exactly_real = torch.zeros(n, 2, dtype=torch.bool)
    exactly_real[[0, n // 2], 1] = True
    s = torch.where(exactly_real.flatten(), 0, s)
    y = (full >= 0) * s if compat else torch.where(full >= 0, s, -s)
    wanted = torch.fft.ifft(torch.view_as_complex(y.unflatten(1, (n, 2)))).real
    spectrum = reference.to_spectrum(x)
    torch.testing.assert_close(reference.from_spectrum(spectrum), x, atol=1e-5, rtol=1e-5)
    layout = Layout.of(KVFormat(Code(1, "channel", compat=compat), Code(2, "token"), 32, 32, 0, "fp32").flat, max(n, 32))
    side = layout.key
    if n < 32:
        return
    codes, scale = reference.encode(spectrum.float(), side.parts[0], side, layout, 0.7, None)
    deq = reference.dequantize(codes, side.parts[0], side, [scale.double().expand(32, n)], None)
    torch.testing.assert_close(reference.from_spectrum(deq), wanted, atol=1e-5, rtol=1e-4)


def test_ternary_scales() -> None:
    """The default multiplies by the mean beyond the threshold, the release by nothing."""
    x = torch.randn(32, 32)
    mean = x.abs().mean(0)
    for gamma in (0.5, 0.7):
        beyond = x.abs() > gamma * mean
        s = (x.abs() * beyond).sum(0) / beyond.sum(0)
        wanted = torch.where(beyond, x.sign(), 0)
        torch.testing.assert_close(round_trip(x, Code(1.58, "channel", gamma=gamma)), wanted * s, atol=0, rtol=1e-3)
        assert_same(round_trip(x, Code(1.58, "channel", gamma=gamma, compat=True)), wanted)


def test_hard_channels_are_those_of_the_largest_ranges() -> None:
    """Shared by heads, of each sample (released: of the batch), from the first page, ties to the lowest index."""
    fmt = KVFormat(Code(1.5, "channel"), Code(2, "token"), 32, 32, 0)
    k = torch.randn(2, 64, 3, 64)
    k[0, :32, 1, 40:] *= 50  # one head's channels count for all
    k[1, :32, :, :24] *= 50
    k[:, 32:, :, 30] *= 1e4  # the second page comes too late
    cache = kv_pack(k, k, fmt)
    assert cache.key_channels is not None
    assert cache.key_channels.sum(-1).unique().tolist() == [32]
    assert (cache.key_channels == cache.key_channels[:, :1]).all()
    assert cache.key_channels[0, 0, 40:].all()
    assert cache.key_channels[1, 0, :24].all()
    released = kv_pack(k, k, KVFormat(Code(1.5, "channel", compat=True), Code(2, "token"), 32, 32, 0)).key_channels
    assert released is not None
    assert (released == released[:1]).all()
    ties = kv_pack(torch.arange(32.0)[None, :, None, None].expand(1, 32, 1, 64), k[:1, :32, :1], fmt).key_channels
    assert ties is not None
    assert ties[0, 0].tolist() == [1.0] * 32 + [0.0] * 32


def test_channel_scales_are_divided_out() -> None:
    x = torch.randn(2, 128, 2, 64) * torch.randn(64).mul(2).exp()
    plain, scaled = (KVFormat(Code(4, "token", channel_scale=on), Code(4, "token", channel_scale=on), 64, 64, 0)
                     for on in (False, True))  # fmt: skip
    small = torch.arange(64) != int(x.abs().amax((0, 1, 2)).argmax())
    errors = [(kv_pack(x, x, fmt).unpack()[1] - x)[..., small].square().mean() for fmt in (plain, scaled)]
    assert errors[1] < errors[0] / 2
    factor = kv_pack(x, x, scaled).value_channels
    assert factor is not None
    torch.testing.assert_close(factor.float(), x[:, :64].abs().amax(1).sqrt(), atol=0, rtol=1e-3)


def test_salient_tokens_have_more_bits() -> None:
    fmt = KVFormat.preset("zipcache-4/2")
    k, v = torch.randn(2, 1, 384, 2, 128).unbind(0)
    high = torch.rand(1, 2, 384) < 0.6
    cache = kv_pack(k, v, fmt, salient=high)
    sealed = high.transpose(1, 2)[:, :256]
    for x, y in zip(cache.unpack(), (k, v), strict=True):
        error = (x - y)[:, :256].square().mean(-1)
        assert error[sealed].mean() < error[~sealed].mean() / 8


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_bits_per_element_are_what_is_promised() -> None:
    def bits(name: str, group: int) -> tuple[float, float]:
        fmt = KVFormat.preset(name)
        return KVFormat(fmt.key, fmt.value, group, 64).bits_per_element(128)

    assert bits("vidkv-1.5/1.58", 64) == (1.875, 1.875)
    assert bits("vidkv-1.5/1.58", 32) == (2.25, 2.125)
    assert bits("kivi-2", 32) == (3.0, 3.0)
    assert bits("kivi-2", 64) == (2.5, 2.5)
    assert bits("kivi-4", 64) == (4.5, 4.5)
    assert KVFormat.preset("int8").bits_per_element(128) == (8.25, 8.25)


@over_formats
def test_nbytes_are_bits_per_element_and_the_window(name: str) -> None:
    fmt, width, groups = FORMATS[name], 128, 2
    sealed = 4096 // fmt.page * fmt.page
    k, v = keys_values(1, sealed + fmt.hot, groups, width, torch.float16)
    high = None
    if fmt.low_bits:  # exactly the share that bits_per_element assumes
        of_page = torch.arange(fmt.page) < round(0.6 * fmt.page)
        high = of_page.repeat((sealed + fmt.hot) // fmt.page + 1)[: sealed + fmt.hot].expand(1, groups, -1)
    cache = kv_pack(k, v, fmt, salient=high)
    assert int(cache.counts.sum()) == groups * sealed
    window = 2 * groups * (fmt.hot + fmt.page) * width * 2
    wanted = sum(fmt.bits_per_element(width)) / 8 * sealed * groups * width + window
    assert abs(cache.nbytes / wanted - 1) < 0.02


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES), batch=st.integers(1, 2), groups=st.integers(1, 3), total=st.integers(0, 300),
    eighth=st.integers(4, 20), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(name, batch, groups, total, eighth, dtype, seed) -> None:
    torch.manual_seed(seed)
    fmt = FORMATS[name]
    cache, k, v = packed(name, batch, total, groups, 8 * eighth, dtype)
    sealed = sealed_tokens(fmt, total)
    assert cache.seq_lens.tolist() == [[total] * groups] * batch
    assert cache.n_pages * fmt.page == sealed
    for x, y in zip(cache.unpack(), (k, v), strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all()
        assert_same(x[:, sealed:], y[:, sealed:])


@over_formats
@over_backends("kv_unseal", without=("reference", "cuda-on-host"))
def test_unpacking(backend: Backend, name: str) -> None:
    cache, _, _ = packed(name, 2, 2 * FORMATS[name].page + FORMATS[name].hot + 5, 2, 80, torch.float32)
    cache.keep(torch.arange(0, int(cache.seq_lens.max()), 3).expand(2, 2, -1))
    arguments = (*cache.arguments, cache.format.flat, int(cache.seq_lens.max()) + 2)
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    truth, peer = reference.kv_unseal(*doubled), reference.kv_unseal(*arguments)
    for got, exact, same in zip(backend.kv_unseal(*arguments), truth, peer, strict=True):
        assert_accurate(got, exact, same, floor=1e-6 * exact.abs().amax())


# ---- growth ----------------------------------------------------------------------------------------------------------


@over_formats
def test_one_by_one_is_all_at_once_and_sealed_bytes_never_change(name: str) -> None:
    fmt, width = FORMATS[name], 64
    total = 2 * fmt.page + fmt.hot + 3
    k, v = keys_values(2, total, 2, width)
    bulk = kv_pack(k, v, fmt)
    grown = kv_pack(k[:, :0], v[:, :0], fmt)
    before: list[Tensor] = []
    for t in range(total):
        assert grown.append(k[:, t : t + 1], v[:, t : t + 1]) is grown
        assert grown.n_pages == max(0, t + 1 - fmt.hot) // fmt.page
        for page, old in enumerate(before):
            assert torch.equal(grown.record(1, 1, page), old)
        before = [grown.record(1, 1, page).clone() for page in range(grown.n_pages)]
    assert same_records(bulk, grown)
    chunked = kv_pack(k[:, : total // 3], v[:, : total // 3], fmt)
    chunked.append(k[:, total // 3 :], v[:, total // 3 :])
    assert same_records(bulk, chunked)
    for a, b in zip(bulk.unpack(), grown.unpack(), strict=True):
        assert_same(a, b)


def test_appending_within_capacity_allocates_nothing_that_stays() -> None:
    fmt = KVFormat.preset("kivi-2")
    k, v = torch.randn(2, 1, 600, 2, 64).unbind(0)
    cache = PackedKV(fmt, 1, 2, 64).reserve(600)
    held = [x.data_ptr() for x in (cache.data, cache._offset, cache._counts, cache.hot_k)]
    size = cache.nbytes
    for t in range(600):
        cache.append(k[:, t : t + 1], v[:, t : t + 1])
    assert [x.data_ptr() for x in (cache.data, cache._offset, cache._counts, cache.hot_k)] == held
    assert cache.nbytes == size
    assert same_records(cache, kv_pack(k, v, fmt))


@over_formats
def test_keeping_copies_and_never_quantizes_again(name: str) -> None:
    fmt = FORMATS[name]
    total = 3 * fmt.page + fmt.hot + 2
    cache, _, _ = packed(name, 2, total, 2, 72)
    k, v = cache.unpack()
    rows = []
    for seed in range(4):
        kept = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < (0.2, 0.5, 0.9, 0.05)[seed]
        kept[fmt.page : 2 * fmt.page] &= seed != 1  # a page of which nothing stays
        rows.append(kept.nonzero()[:, 0])
    most = max(map(len, rows))
    index = torch.stack([torch.cat([r, torch.full((most - len(r),), -1)]) for r in rows]).view(2, 2, most)
    index = index[..., torch.randperm(most)]
    assert cache.keep(index) is cache
    assert cache.seq_lens.flatten().tolist() == [len(r) for r in rows]
    for head, kept in enumerate(rows):
        b, g = divmod(head, 2)
        for x, y in zip(cache.unpack(), (k, v), strict=True):
            assert_same(x[b, : len(kept), g], y[b, kept, g])
            assert (x[b, len(kept) :, g] == 0).all()
    # Heads of different lengths go on growing, and can be thinned again.
    new_k, new_v = keys_values(2, 2 * fmt.page + 5, 2, 72)
    for t in range(new_k.shape[1]):
        cache.append(new_k[:, t : t + 1], new_v[:, t : t + 1])
    assert cache.seq_lens.flatten().tolist() == [len(r) + new_k.shape[1] for r in rows]
    window = cache.hot_k.shape[2]
    assert (cache.hot_len < window).all()
    again = cache.unpack()
    for head, kept in enumerate(rows):
        b, g = divmod(head, 2)
        last = len(kept) + new_k.shape[1]
        assert_same(again[0][b, last - 1, g], new_k[b, -1, g])
    cache.keep(torch.full((2, 2, 1), 0))
    assert_same(cache.unpack()[0][:, 0], again[0][:, 0])


def test_keeping_all_or_nothing() -> None:
    cache, _, _ = packed("kivi-2", 1, 300, 2, 64)
    before, records = cache.unpack(), [cache.record(0, 1, page).clone() for page in range(cache.n_pages)]
    cache.keep(torch.arange(300).expand(1, 2, -1))
    for a, b in zip(cache.unpack(), before, strict=True):
        assert_same(a, b)
    assert all(torch.equal(cache.record(0, 1, page), old) for page, old in enumerate(records))
    cache.keep(torch.full((1, 2, 3), -1))
    assert cache.seq_lens.tolist() == [[0, 0]]
    assert cache.n_pages == 0
    assert cache.unpack()[0].shape == (1, 0, 2, 64)
    cache.append(before[0], before[1])
    assert cache.seq_lens.tolist() == [[300, 300]]


# ---- errors, op checks -----------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    k = torch.randn(1, 200, 2, 64)
    with pytest.raises(ValueError, match=r"bits must be one of .* got 3"):
        Code(3, "channel")
    with pytest.raises(ValueError, match=r"axis must be .* got 'row'"):
        Code(2, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel_scale goes with"):
        Code(2, "channel", channel_scale=True)
    with pytest.raises(ValueError, match=r"format must be .* got 'kivi-3'"):
        kv_pack(k, k, "kivi-3")
    with pytest.raises(ValueError, match="page must be a multiple of group"):
        KVFormat(Code(2, "channel"), Code(2, "token"), group=64, page=32)
    with pytest.raises(ValueError, match="head dim must be"):
        kv_pack(k[..., :20], k[..., :20], "kivi-2")
    with pytest.raises(ValueError, match="v must have shape"):
        kv_pack(k, k[:, :3], "kivi-2")
    with pytest.raises(TypeError, match="v must have dtype"):
        kv_pack(k, k.half(), "kivi-2")
    with pytest.raises(ValueError, match="salient must be None"):
        kv_pack(k, k, "kivi-2", salient=torch.ones(1, 2, 200, dtype=torch.bool))
    cache = kv_pack(k, k, "kivi-2")
    with pytest.raises(TypeError, match="k must have dtype float32"):
        cache.append(k.half(), k.half())
    with pytest.raises(ValueError, match="k must have shape"):
        cache.append(k[:, :1, :1], k[:, :1, :1])
    with pytest.raises(ValueError, match=r"index must be within \[-1, 200\), got 200"):
        cache.keep(torch.full((1, 2, 1), 200))
    with pytest.raises(ValueError, match="index must name different tokens"):
        cache.keep(torch.zeros(1, 2, 2, dtype=torch.int64))


def test_corrupt_caches_are_refused() -> None:
    """Whatever the directory says, nothing outside the data is read."""
    cache, _, _ = packed("vidkv-1.5/1.58", 1, 400, 2, 64)
    good = cache.arguments
    spoilers = {
        "data is too short": (0, good[0][: good[0].numel() - 1]),
        "offset must be a multiple of 16": (1, good[1] + 8),
        "page 0 of head 0 of sequence 0 is at": (1, good[1] - 1024),
        "counts must be within": (2, good[2] + 1),
        "hot_len must be within": (8, good[8] + 1000),
        "key_channels must mark 32 channels": (4, good[4] * 0),
        "key_channels must be given": (4, None),
        "fmt is no packed KV format": (9, [7] * 10),
    }
    for message, (place, bad) in spoilers.items():
        arguments = [*good, cache.format.flat, 400]
        arguments[place] = bad
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastok.kv_unseal(*arguments)
    # Any bytes at all are codes and parameters of something.
    noise = torch.randint(0, 256, good[0].shape, dtype=torch.uint8)
    assert torch.ops.fastok.kv_unseal(noise, *good[1:], cache.format.flat, 400)[0].shape == (1, 400, 2, 64)


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"])
def test_opcheck(name: str) -> None:
    fmt = FORMATS[name]
    cache, k, v = packed(name, 2, fmt.page + fmt.hot + 1, 2, 64)
    seal = (cache.data.clone(), cache.offset, k[:, : fmt.page], v[:, : fmt.page], cache.classes, cache.key_channels,
            cache.value_channels, fmt.flat, 0.7, 0.7)  # fmt: skip
    torch.library.opcheck(torch.ops.fastok.kv_seal.default, seal)
    torch.library.opcheck(torch.ops.fastok.kv_unseal.default, (*cache.arguments, fmt.flat, k.shape[1]))


def test_public_names() -> None:
    assert fastok.KVFormat.presets() == ("int8", "int4", "kivi-4", "kivi-2", "zipcache-4/2", "vidkv-2", "vidkv-1.5",
                                         "vidkv-1.5/1.58")  # fmt: skip
    text = KVFormat.preset("vidkv-1.5").describe(80)
    assert "40 channels by signs of their own (40 is no power of two)" in text
