"""Packed caches as a whole: storage, growth, eviction, threads, errors."""

import copy

import fastok
import pytest
import torch
from fastok import Code, KVFormat, PackedKV, kv_pack
from fastok.reference import quantize as reference
from fastok.reference.kv_layout import unpack_bits
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import DTYPES, FORMATS, NAMES, keys_values, packed, same_records, sealed_tokens
from torch import Tensor

over_formats = pytest.mark.parametrize("name", NAMES)


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
    if fmt.two_classes:  # exactly the share that bits_per_element assumes
        of_page = torch.arange(fmt.page) < round(fmt.salient * fmt.page)
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


@pytest.mark.parametrize("width", [64, 80])  # all easy channels of a head are a power of two, or not
@over_formats
@over_backends("kv_unseal", without=("reference",))
def test_unpacking(backend: Backend, name: str, width: int) -> None:
    cache, _, _ = packed(name, 2, 2 * FORMATS[name].page + FORMATS[name].hot + 5, 2, width, torch.float32)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [32, 24])
def test_keys_are_turned_on_their_way(half: int, dtype: torch.dtype) -> None:
    """As products of complex numbers."""
    k, v = torch.randn(2, 2, 130, 3, 64).to(dtype).unbind(0)
    angle = torch.randn(2, 130, half)

    def turned(kind: torch.dtype) -> Tensor:
        x, by = k.to(kind), angle.to(kind)[:, :, None]
        product = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(by), by)
        return torch.cat([product.real, product.imag, x[..., 2 * half :]], -1)

    fmt = KVFormat(Code(4, "channel"), Code(4, "token"), hot=256)
    cache = PackedKV(fmt, 2, 3, 64, dtype=dtype)
    cache.append(k[:, :100], v[:, :100], rope=(angle[:, :100].cos(), angle[:, :100].sin()))
    cache.append(k[:, 100:], v[:, 100:], rope=(angle[:, 100:].cos(), angle[:, 100:].sin()))
    stored_k, stored_v = cache.unpack()
    assert_accurate(stored_k, turned(torch.float64), turned(torch.float32).to(dtype))
    assert_same(stored_v, v)
    alike = PackedKV(fmt, 2, 3, 64, dtype=dtype).append(k, v, rope=(angle[0].cos(), angle[0].sin()))  # for all samples
    assert_same(alike.unpack()[0][0], stored_k[0])


def test_angles_are_checked() -> None:
    cache, k = PackedKV("kivi-2", 2, 3, 64), torch.randn(2, 5, 3, 64)
    cos = torch.ones(5, 32)
    with pytest.raises(TypeError, match=r"rope must be None or \(cos, sin\), got Tensor"):
        cache.append(k, k, rope=cos)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rope\[0\] must have shape .* here \[5, 32\]; got \[4, 32\]"):
        cache.append(k, k, rope=(cos[:4], cos))
    with pytest.raises(ValueError, match=r"rope\[1\] must have shape .* here \[2, 5, 32\]; got \[1, 5, 32\]"):
        cache.append(k, k, rope=(cos, cos[None]))
    with pytest.raises(ValueError, match=r"rope\[0\] must have shape .* here \[5, \*\]; got \[\]"):
        cache.append(k, k, rope=(torch.ones(()), cos))
    with pytest.raises(ValueError, match="rope must turn at most 64 channels, those of a head; got 66"):
        cache.append(k, k, rope=(torch.ones(5, 33), torch.ones(5, 33)))
    assert cache.seq_lens.eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_where_that_is_asked_for(bad: float) -> None:
    k, v = torch.randn(2, 1, 200, 2, 64).unbind(0)
    spoilt = v.clone()
    spoilt[0, 190, 1, 7] = bad
    with pytest.raises(ValueError, match=rf"v must be finite, got {bad} at \[0, 190, 1, 7\]"):
        kv_pack(k, spoilt, "kivi-2", check=True)
    cache = kv_pack(k, spoilt, "kivi-2", seq_lens=torch.tensor([190]), check=True)  # what is not read does not count
    with pytest.raises(ValueError, match=rf"k must be finite, got {bad} at \[0, 0, 1, 7\]"):
        cache.append(spoilt[:, 190:191], v[:, 190:191])
    assert cache.seq_lens.tolist() == [[190, 190]]
    several, lengths = torch.cat([k, v, spoilt]), torch.tensor([30, 200, 191])
    with pytest.raises(ValueError, match=rf"k must be finite, got {bad} at \[2, 190, 1, 7\]"):
        kv_pack(several, several, "kivi-2", seq_lens=lengths, check=True)
    kv_pack(k, spoilt, "kivi-2").append(spoilt[:, 190:191], v[:, :1])  # unless asked, it stays in its group
    with pytest.raises(TypeError, match="check must be True or False, got 1"):
        PackedKV("kivi-2", 1, 2, 64, check=1)  # type: ignore[arg-type]


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


@over_formats
def test_any_number_of_threads_writes_the_same_bytes(name: str) -> None:
    fmt, before = FORMATS[name], torch.get_num_threads()
    total = 5 * fmt.page + fmt.hot + 1
    k, v = keys_values(2, total, 3, 64, torch.bfloat16)
    found = []
    try:
        for threads in (1, 4, 7):
            torch.set_num_threads(threads)
            cache = kv_pack(k, v, fmt)
            found.append((cache.data, *cache.unpack()))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            assert_same(a, b)


# ---- errors, op checks -----------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    k = torch.randn(1, 200, 2, 64)
    with pytest.raises(ValueError, match=r"bits must be one of .* got 3"):
        Code(3, "channel")
    with pytest.raises(ValueError, match=r"axis must be .* got 'row'"):
        Code(2, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel_scale goes with"):
        Code(2, "channel", channel_scale=True)
    with pytest.raises(ValueError, match=r"fmt must be .* got 'kivi-3'"):
        kv_pack(k, k, "kivi-3")
    with pytest.raises(TypeError, match=r"fmt must be .* got int 8"):
        kv_pack(k, k, 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gamma must be a number, got str '0\.7'"):
        Code(1.58, "channel", gamma="0.7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits must be one of .* got True"):
        Code(True, "channel")
    with pytest.raises(TypeError, match=r"compat must be True or False, got 'no'"):
        Code(2, "channel", compat="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hot must be an int >= 0, got True"):
        KVFormat(Code(2, "token"), Code(2, "token"), hot=True)
    with pytest.raises(ValueError, match=r"fmt must be .* got \['int8'\]"):
        KVFormat.preset(["int8"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head dim must be an int, got str '64'"):
        KVFormat.preset("int8").bits_per_element("64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"salient must be within \[0, 1\], got 2.0"):
        KVFormat.preset("zipcache-4/2").bits_per_element(64, salient=2.0)
    for bits, low in ((2, 2), (2, 4), (1.58, 1.58), (1.5, 2), (4, 3)):
        with pytest.raises(ValueError, match=f"low_bits must be one of 4, 2, 1.58 and fewer than .*; got {low}"):
            Code(bits, "channel", low_bits=low)
    with pytest.raises(ValueError, match=r"low_bits 1\.58 goes with axis 'channel', got 'token'"):
        Code(2, "token", low_bits=1.58)
    with pytest.raises(ValueError, match="group must be page, 64, for two classes of tokens; got 32"):
        KVFormat(Code(2, "channel"), Code(2, "channel", low_bits=1.58), group=32)
    with pytest.raises(ValueError, match=r"salient must be within \[0, 1\], got 20"):
        KVFormat(Code(2, "channel"), Code(2, "token"), salient=20)
    with pytest.raises(ValueError, match="later must be 'high' or 'low', got 'hot'"):
        KVFormat(Code(2, "channel"), Code(2, "token"), later="hot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page must be a multiple of group"):
        KVFormat(Code(2, "channel"), Code(2, "token"), group=64, page=32)
    with pytest.raises(ValueError, match="k must have a head dim that is"):
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


@pytest.mark.parametrize(
    ("attribute", "place", "bad", "message"),
    [
        ("_offset", (0, 1, 0), -16, "page 0 of head 1 of sequence 0 is at -16"),
        ("_offset", (0, 1, 0), 8, "offset must be a multiple of 16 .* is at 8"),
        ("_offset", (0, 0, 2), 2**62, "within the [0-9]+ bytes of data; page 2 of head 0 .* is at 4611686018427387904"),
        ("_counts", (0, 0, 0, 0), 200, r"counts must be within \[0, 64\], got 200"),
        ("_counts", (0, 0, 1, 0), -1, r"counts must be within \[0, 64\], got -1"),
        ("hot_len", (0, 0), 10**6, r"hot_len must be within \[0, 192\], got 1000000"),
    ],
)
def test_corrupt_caches_are_not_rewritten(attribute: str, place: tuple[int, ...], bad: int, message: str) -> None:
    cache, _, _ = packed("kivi-2", 1, 450, 2, 64)
    spoilt = getattr(cache, attribute)
    good = spoilt.clone()
    spoilt[place] = bad
    with pytest.raises(RuntimeError, match=message):
        cache.keep(torch.arange(0, 400, 2).expand(1, 2, -1))
    spoilt.copy_(good)
    cache.keep(torch.arange(0, 400, 2).expand(1, 2, -1))


@pytest.mark.parametrize("name", ["kivi-2", "zipcache-4/2"])
def test_truncated_data_is_not_rewritten(name: str) -> None:
    cache, k, v = packed(name, 1, 450, 2, 64)
    cache.data = cache.data[: cache._used - 1]
    for rewrite in (lambda: cache.keep(torch.arange(200).expand(1, 2, -1)), lambda: cache.crop(100)):
        with pytest.raises(RuntimeError, match=r"whole record within .* page [0-9] of head 1 of sequence 0"):
            rewrite()
    with pytest.raises(RuntimeError, match="data is too short: its records end at byte"):
        cache.append(k[:, :200], v[:, :200])


def test_cropping_and_selecting_check_their_arguments() -> None:
    cache, _, _ = packed("kivi-2", 2, 450, 2, 64)
    with pytest.raises(ValueError, match=r"length must be within \[0, .*, got -5"):
        cache.crop(-5)
    with pytest.raises(TypeError, match="length must be an integer tensor, got float32"):
        cache.crop(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"length must have shape \[B\] of the cache, here \[2\]; got \[3\]"):
        cache.crop(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"index must be within \[0, 2\), got 5"):
        cache.select(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"index must have shape \[B'\], here \[\*\]; got \[1, 1\]"):
        cache.select(torch.tensor([[0]]))
    assert cache.seq_lens.tolist() == [[450, 450]] * 2


@settings(max_examples=60)
@given(
    name=st.sampled_from(["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"]), seed=st.integers(0, 10_000),
    cut=st.integers(0, 100), which=st.integers(0, 4),
    value=st.sampled_from([-(2**63), -(2**31), -32768, -16, -1, 0, 1, 16, 63, 64, 255, 32767, 2**31 - 16, 2**62]),
)  # fmt: skip
def test_any_directory_is_read_or_refused(name: str, seed: int, cut: int, which: int, value: int) -> None:
    """One number of it is anything, and data may end anywhere: an error that says so, or a result; never a crash."""
    torch.manual_seed(seed)
    cache, _, _ = packed(name, 1, 400, 2, 64)
    arguments = [None if x is None else x.clone() for x in cache.arguments]
    arguments[0] = cache.data[: cache.data.numel() * cut // 100]
    spoilt = (arguments[1], arguments[2], arguments[8], arguments[3], arguments[5])[which]
    if spoilt is not None:
        place = torch.randint(spoilt.numel(), ())
        spoilt.view(-1)[place] = value if spoilt.dtype == torch.int64 else torch.tensor(value).to(spoilt.dtype)
    q = torch.randn(1, 1, 4, 64)
    for read in (
        lambda: torch.ops.fastok.kv_unseal(*arguments, cache.format.flat, 400),
        lambda: torch.ops.fastok.decode_packed(q, *arguments, cache.format.flat, 0.125, 0.0, None, None),
    ):
        try:
            first = read()[0]
        except RuntimeError as error:
            assert "must" in str(error) or "data is too short" in str(error) or "is at" in str(error)  # noqa: PT017
        else:
            assert first.shape[-1] == 64


@over_formats
def test_selected_sequences_share_bytes_and_go_on_apart(name: str) -> None:
    """As beams do: what was sealed is the same bytes for all, what comes then is each one's own."""
    fmt, index = FORMATS[name], [1, 1, 0, 1]
    total = 2 * fmt.page + fmt.hot + fmt.page // 2
    k, v = keys_values(2, total, 2, 64)
    more_k, more_v = keys_values(4, 2 * fmt.page, 2, 64)
    cache = kv_pack(k, v, fmt)
    used = cache._used
    assert cache.select(torch.tensor(index)) is cache
    assert cache._used == used
    cache.append(more_k, more_v)
    for row, b in enumerate(index):
        both = kv_pack(k[[0, 1]], v[[0, 1]], fmt)
        both.append(more_k[[row, row]], more_v[[row, row]])
        for g in range(2):
            for page in range(cache.n_pages):
                assert torch.equal(cache.record(row, g, page), both.record(b, g, page))
    kept = torch.arange(0, total, 2).expand(4, 2, -1)
    before = cache.unpack()
    for got, was in zip(cache.keep(kept).unpack(), before, strict=True):
        assert_same(got, was[:, 0:total:2])


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"])
def test_opcheck(name: str) -> None:
    fmt = FORMATS[name]
    cache, k, v = packed(name, 2, fmt.page + fmt.hot + 1, 2, 64)
    seal = (cache.data.clone(), cache.offset, k[:, : fmt.page], v[:, : fmt.page], cache.classes, cache.key_channels,
            cache.value_channels, fmt.flat, 0.7, 0.7)  # fmt: skip
    torch.library.opcheck(torch.ops.fastok.kv_seal.default, seal)
    torch.library.opcheck(torch.ops.fastok.kv_unseal.default, (*cache.arguments, fmt.flat, k.shape[1]))


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"])
def test_packing_and_decoding_compile_without_graph_breaks(name: str) -> None:
    k, v = torch.randn(2, 2, 300, 2, 64)

    def pack(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        cache = kv_pack(k, v, name)
        return (*cache.unpack(), *fastok.attention_decode(k[:, -1:], cache))

    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(k, v), pack(k, v), strict=True):
        assert_same(got, wanted)


def test_public_names() -> None:
    assert fastok.KVFormat.presets() == ("int8", "int4", "kivi-4", "kivi-2", "zipcache-4/2", "vidkv-2", "vidkv-1.5",
                                         "vidkv-1.5/1.58", "vidkv-1.5/1.66")  # fmt: skip
    text = KVFormat.preset("vidkv-1.5").describe(80)
    assert "40 channels by signs of their own (40 is no power of two)" in text


def test_no_gradient_flows_through_a_cache() -> None:
    """Part of one (of the hot window) would be worse than none, and a growing graph would hold every token."""
    k = torch.randn(2, 200, 2, 32, requires_grad=True)
    for cache in (kv_pack(k, k, "int8"), kv_pack(k, k, "int8", seq_lens=torch.tensor([200, 150]))):
        cache.append(k[:, :9], k[:, :9])
        assert not cache.hot_k.requires_grad
        assert not cache.unpack()[0].requires_grad
        assert copy.deepcopy(cache).seq_lens.tolist() == cache.seq_lens.tolist()


@pytest.mark.parametrize("later", ["high", "low"])
def test_classes_of_hot_tokens_go_with_them(later: str) -> None:
    """When they are given piece by piece, in heads of different lengths, and when tokens are forgotten again."""
    fmt = KVFormat(Code(4, "token", low_bits=2), Code(4, "channel", low_bits=1.58), 16, 16, 16, later=later)  # type: ignore[arg-type]
    k, v = torch.randn(2, 1, 200, 2, 32).unbind(0)
    high = torch.rand(1, 2, 200) < 0.5
    rest = torch.full((1, 2, 60), later == "high")

    def part(begin: int, end: int) -> tuple[Tensor, Tensor]:
        return k[:, begin:end], v[:, begin:end]

    pieces = kv_pack(*part(0, 40), fmt, salient=high[..., :40]).append(*part(40, 45), salient=high[..., 40:45])
    pieces.append(*part(45, 90), salient=high[..., 45:90]).append(*part(90, 150))
    whole = kv_pack(*part(0, 150), fmt, salient=torch.cat([high[..., :90], rest], -1))
    assert same_records(pieces, whole)
    assert_same(pieces.classes, whole.classes)

    cropped = kv_pack(*part(0, 40), fmt, salient=high[..., :40]).crop(30).append(*part(90, 150))
    fresh = kv_pack(*part(0, 30), fmt, salient=high[..., :30]).append(*part(90, 150))
    assert_same(cropped.classes, fresh.classes)

    kept = torch.stack([torch.arange(40), torch.arange(40) - 4]).clamp(min=-1)[None]  # 4 fewer in the second head
    ragged = (
        kv_pack(*part(0, 40), fmt, salient=high[..., :40]).keep(kept).append(*part(40, 70), salient=high[..., 40:70])
    )
    got = unpack_bits(ragged.classes, 16)
    assert_same(got[0, 0, :3].flatten(), high[0, 0, :48])
    assert_same(got[0, 1, 0], high[0, 1, :16])  # sealed before any was dropped
    hot = torch.cat([high[0, 1, 16:36], high[0, 1, 40:70]])
    assert_same(got[0, 1, 1:3].flatten(), hot[:32])
    with pytest.raises(ValueError, match="salient must be None for a format with one class"):
        kv_pack(*part(0, 40), "kivi-2").append(*part(40, 41), salient=high[..., :1])
