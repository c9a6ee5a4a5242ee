"""Packed pages: codes, statistics, bytes, growth and eviction, on every backend."""

import math

import pytest
import torch
from fastok import Code, KVFormat, PackedKV, kv_pack
from fastok.reference import quantize as reference
from fastok.reference.kv_layout import Layout, pack_bits
from fastok.testing import Backend, assert_same, over_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import BITS, FORMATS, NAMES, keys_values, salient
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
@over_backends("kv_seal", without=("reference",))
def test_bytes_are_those_of_the_specification(backend: Backend, name: str) -> None:
    fmt = FORMATS[name]
    for width, dtype in ((64, torch.float32), (128, torch.bfloat16), (80, torch.float16)):
        k, v = keys_values(2, 2 * fmt.page, 3, width, dtype)
        k[0, 3, 1, 5], v[1, -2, 0, 9] = math.nan, math.inf
        k[:, :, 2, 7] = 0.5
        # Zeros of either sign, alone and as the least of a group.
        k[:, ::2, 0, 11], k[:, 1::2, 0, 11], k[:, :, 1, 3] = 0.0, -0.0, k[:, :, 1, 3].relu()
        v[:, 4], v[:, 5], v[:, 6, 0] = 0.0, -0.0, v[:, 6, 0].relu()
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


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
@over_backends("kv_seal", without=("reference",))
def test_two_bit_codes_next_to_half_steps(backend: Backend, scale_dtype: str) -> None:
    """Groups whose elements are half steps and their neighbours in fp32; steps of any size, subnormal ones too."""
    fmt = KVFormat(Code(2, "channel"), Code(2, "token"), 64, 64, 0, scale_dtype)
    if scale_dtype == "fp32":
        step = torch.logspace(-44, 37, 64, dtype=torch.float64) * (1 + torch.rand(64))
        least = (step * torch.randn(64)).float().double()
    else:  # exact in few bits
        step, least = torch.randint(1, 40, (64,)) / 8, torch.randint(-40, 40, (64,)) / 8
    x = (least + step * (torch.arange(64)[:, None] % 4 + 0.5)).float()
    x[3::8], x[7::8] = least.float(), (least + 3 * step).float()
    for row in range(64):
        for _ in range(row // 8 if row % 4 < 3 else 0):
            x[row] = x[row].nextafter(torch.tensor(math.inf if row % 8 < 4 else -math.inf))
    k, v = x[None, :, None], x.mT.contiguous()[None, :, None]
    offset = torch.zeros(1, 1, 1, dtype=torch.int64)
    rest = (offset, k, v, None, None, None, fmt.flat, 0.0, 0.0)
    wanted = torch.zeros(fmt.layout(64).full_record(), dtype=torch.uint8)
    got = backend.kv_seal(wanted.clone(), *rest)
    reference.kv_seal(wanted, *rest)
    assert_same(got, wanted)


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@over_backends("kv_seal", without=("reference",))
def test_two_bit_codes_of_any_16_bit_numbers(backend: Backend, dtype: torch.dtype, scale_dtype: str) -> None:
    """Any bits at all; steps and their halves with their neighbours, around zero and far from it."""
    bits = torch.randint(-(2**15), 2**15, (128, 64), dtype=torch.int16)
    finite = bits.where(bits.view(dtype).isfinite(), 0)
    small = finite.where(torch.rand(128, 64) < 0.5, finite & ~0x6000)  # exponents that a scale can hold
    step = torch.logspace(-30, 12, 64, base=2) * (1 + torch.rand(64))
    least = step * torch.randint(-4, 5, (64,)) * (torch.rand(64) < 0.8).float()
    halves = (least + step * (torch.arange(128)[:, None] % 7 / 2)).to(dtype).view(torch.int16)
    halves += torch.randint(-1, 2, halves.shape, dtype=torch.int16)
    zeros = torch.where(torch.rand(128, 64) < 0.5, -0.0, 0.0).to(dtype).view(torch.int16)
    for case in (bits, finite, small, halves, zeros, zeros.where(torch.rand(128, 64) < 0.9, 1)):
        for width in (64, 128):  # tokens are 128, of which the first 64 are of one group
            columns = case if width == 64 else torch.cat([case, case.roll(3, 1)], 1)
            rows = case.mT.repeat(2, 1) if width == 128 else torch.cat([case[:64].mT, case[64:].mT])
            k, v = (x.contiguous().view(dtype)[None, :, None] for x in (columns, rows))
            fmt = KVFormat(Code(2, "channel"), Code(2, "token"), 64, 64, 0, scale_dtype)
            record = fmt.layout(width).full_record()
            offset = torch.tensor([[[0, record]]])
            rest = (offset, k, v, None, None, None, fmt.flat, 0.0, 0.0)
            wanted = torch.full((2 * record,), 77, dtype=torch.uint8)
            got = backend.kv_seal(wanted.clone(), *rest)
            reference.kv_seal(wanted, *rest)
            assert_same(got, wanted)


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
        before = round_trip(x, Code(bits, "token" if axis == "channel" else "channel"), 64, 64)[others] - x[others]
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
    if n < 32:
        return
    layout = Layout.of(KVFormat(Code(1, "channel", compat=compat), Code(2, "token"), 32, 32, 0, "fp32").flat, n)
    side = layout.key
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


def test_heads_may_have_hard_channels_of_their_own() -> None:
    fmt = KVFormat(Code(1.25, "channel", per_head=True), Code(2, "token"), 32, 32, 0)  # 16 of 64
    k = torch.randn(2, 64, 3, 64)
    wanted = torch.zeros(2, 3, 64)
    for b in range(2):
        for g in range(3):
            first = 16 * g + 8 * b
            k[b, :32, g, first : first + 16] *= 50
            wanted[b, g, first : first + 16] = 1
    k[:, 32:, :, 60] *= 1e4  # the second page comes too late
    bulk = kv_pack(k, k, fmt)
    assert bulk.key_channels is not None
    assert_same(bulk.key_channels.float(), wanted)
    lengths = kv_pack(k, k, fmt, seq_lens=torch.tensor([64, 40])).append(k[:, :24], k[:, :24])  # in their own time
    assert lengths.key_channels is not None
    assert_same(lengths.key_channels.float(), wanted)
    for bad in (lambda: Code(2, "channel", per_head=True), lambda: Code(1.5, "channel", per_head=True, compat=True)):
        with pytest.raises(ValueError, match=r"per_head goes with bits 1\.5 or 1\.25 and without compat"):
            bad()


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


def test_classes_with_parameters_of_their_own_are_coded_apart() -> None:
    """Each as if the page had no other tokens, whatever those are; the bytes follow docs/kv-format.md."""
    fmt = KVFormat(Code(2, "channel"), Code(2, "channel", low_bits=1.58), 16, 16, 0, "fp32")
    k, v = torch.randn(2, 1, 16, 1, 32).unbind(0)
    high = torch.arange(16) % 3 == 1  # 5 of 16
    cache = kv_pack(k, v, fmt, salient=high.view(1, 1, 16))
    own, others = v[0, high, 0], v[0, ~high, 0]
    zero, scale = own.amin(0), (own.amax(0) - own.amin(0)) / 3
    codes = ((own - zero) / torch.nextafter(scale, torch.tensor(torch.inf))).round()  # scales are rounded up
    beyond = others.abs() > 0.7 * others.abs().mean(0)
    mean = (others.abs() * beyond).sum(0) / beyond.sum(0)
    wanted = torch.zeros(16, 32)
    wanted[high], wanted[~high] = codes * scale + zero, others.sign() * beyond * mean
    torch.testing.assert_close(cache.unpack()[1][0, :, 0], wanted, rtol=1e-5, atol=1e-6)

    record = cache.record(0, 0, 0)
    half = record[16 * 8 + 2 * 32 * 4 :]  # behind 16 rows of key codes, scales and zeros
    assert len(half) == 128 + 3 * 32 * 4  # 5 rows of 8 bytes and 11 of 7, aligned; then the arrays
    numbers = half[128:].view(torch.float32).view(3, 32)
    torch.testing.assert_close(numbers, torch.stack([scale, zero, mean]), rtol=1e-5, atol=0)
    other = v.clone()
    other[:, high] *= 100
    again = kv_pack(k, other, fmt, salient=high.view(1, 1, 16)).record(0, 0, 0)[16 * 8 + 2 * 32 * 4 :]
    assert_same(again[40:117], half[40:117])  # codes of the low class
    assert_same(again[-128:], half[-128:])
