"""attention_decode over packed, dense and paged caches, on every backend: against the formula in fp64."""

import math
import resource
from collections.abc import Iterator

import fastok
import pytest
import torch
from fastok import Code, KVFormat, PagedKV, attention_decode, kv_pack
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import DTYPES, FORMATS, NAMES, decode_both, dense_decode, keys_values, packed, through
from torch import Tensor

over_formats = pytest.mark.parametrize("name", NAMES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_packed = over_backends("decode_packed")
over_dense = over_backends("decode")
EPS = torch.finfo(torch.float32).eps


def check(q: Tensor, cache, k: Tensor, v: Tensor, lengths: Tensor, **how) -> tuple[Tensor, Tensor]:
    """No less accurate than PyTorch, beside one rounding of each logit and of the result."""
    (out, lse), truth, peer = decode_both(q, cache, k, v, lengths, **how)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    logits = largest(q.double().abs().sum(-1)) * largest(k) * (how.get("scale") or q.shape[-1] ** -0.5)
    moved = 2 * EPS * logits
    assert_accurate(out, truth[0], peer[0], floor=torch.tensor((moved + EPS) * largest(v)), name="out")
    assert_accurate(lse, truth[1], peer[1], floor=torch.tensor(moved + 4 * EPS), name="lse")
    return out, lse


def largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def uniform(batch: int, groups: int, total: int) -> Tensor:
    return torch.full((batch, groups), total)


def exactly(cache) -> list[Tensor]:
    """What a packed cache stands for, in fp64: keys and values that need not be representable in its dtype."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in cache.arguments]
    return list(fastok.reference.quantize.kv_unseal(*wide, cache.format.flat, int(cache.seq_lens.max())))


# ---- packed ----------------------------------------------------------------------------------------------------------


@over_dtypes
@over_formats
@over_packed
def test_packed_is_unpacked_attention(backend: Backend, name: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    cache, _, _ = packed(name, 2, 2 * fmt.page + fmt.hot + 7, 2, 64, dtype)
    k, v = exactly(cache)
    q = torch.randn(2, 2, 6, 64).to(dtype)
    with through(backend):
        check(q, cache, k, v, cache.seq_lens)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("ratio", [1, 2, 4, 7, 8])
@over_packed
def test_query_groups_and_rows(backend: Backend, ratio: int, rows: int) -> None:
    cache, _, _ = packed("vidkv-1.5/1.58", 1, 300, 2, 128)
    q = torch.randn(1, rows, 2 * ratio, 128)
    with through(backend):
        check(q, cache, *exactly(cache), cache.seq_lens)


@over_formats
@over_packed
def test_every_option_at_once(backend: Backend, name: str) -> None:
    """Ragged heads, token lists, biases that hide keys, softcap."""
    fmt = FORMATS[name]
    total = 2 * fmt.page + fmt.hot + 3
    cache, _, _ = packed(name, 2, total, 2, 72)
    kept = torch.rand(2, 2, total).argsort(-1)[..., : total // 2].clone()
    kept[0, 1, total // 4 :] = -1
    cache.keep(kept)
    k, v = exactly(cache)
    longest = k.shape[1]
    q = torch.randn(2, 3, 6, 72)
    for lists in (2, 6):
        tokens = torch.randint(-1, longest, (2, lists, longest // 2))
        for shape in ((2, longest), (2, 6, longest + 4)):
            bias = torch.where(torch.rand(shape) < 0.2, -math.inf, torch.randn(shape))
            with through(backend):
                check(q, cache, k, v, cache.seq_lens, tokens=tokens, key_bias=bias, softcap=3.0, scale=0.3)


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES), batch=st.integers(0, 2), groups=st.integers(1, 3), ratio=st.integers(1, 5),
    rows=st.integers(0, 16), total=st.integers(0, 260), eighth=st.integers(4, 32), dtype=st.sampled_from(DTYPES),
    listed=st.sampled_from([None, 0, 7]), seed=st.integers(0, 1000),
)  # fmt: skip
@over_backends("decode_packed", without=("reference", "cuda", "cuda-on-host"))
def test_any_packed_cache(
    backend: Backend, name, batch, groups, ratio, rows, total, eighth, dtype, listed, seed
) -> None:
    torch.manual_seed(seed)
    cache, _, _ = packed(name, batch, total, groups, 8 * eighth, dtype)
    k, v = exactly(cache) if batch else torch.zeros(2, 0, 0, groups, 8 * eighth)
    q = torch.randn(batch, rows, groups * ratio, 8 * eighth).to(dtype)
    how = {} if listed is None else {"tokens": torch.randint(-1, max(total, 1), (batch, groups, listed))}
    with through(backend):
        check(q, cache, k, v, cache.seq_lens, **how)


@over_packed
def test_a_constant_added_to_one_group_of_keys_shifts_its_logits(backend: Backend) -> None:
    """Catches a zero point that is dropped or applied to the wrong group."""
    fmt = KVFormat(Code(2, "channel"), Code(8, "channel"), 32, 64, 0, "fp32")
    k, v = torch.randn(2, 1, 128, 1, 64).unbind(0)
    k = k * 0 + (k > 0) * 1.0  # exactly coded
    q = torch.randn(1, 1, 4, 64)
    for group in range(4):
        part = torch.arange(32 * group, 32 * group + 32)[None, None]
        shifted = k.clone()
        shifted[:, part[0, 0]] += 0.5
        with through(backend):
            before, after = (attention_decode(q, kv_pack(x, v, fmt), tokens=part)[1] for x in (k, shifted))
        torch.testing.assert_close(after - before, 0.5 * q.sum(-1).mT * 64**-0.5, atol=1e-5, rtol=1e-5)


@over_formats
@over_packed
def test_huge_logits_do_not_overflow(backend: Backend, name: str) -> None:
    cache, _, _ = packed(name, 1, FORMATS[name].page + FORMATS[name].hot + 2, 1, 64, torch.float16)
    k, v = exactly(cache)
    q = torch.randn(1, 8, 8, 64)  # many rows, as PyTorch may round the lse of one without error
    q = (q * 200 / (q @ k[0, :, 0].mT.float()).abs().amax()).half()  # |q k| up to 200
    with through(backend):
        check(q, cache, k, v, cache.seq_lens, scale=1.0)
        out, lse = attention_decode((q.float() * 300).half(), cache, scale=1.0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("width", [40, 72, 88, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@over_packed
def test_ternary_values_whose_last_group_is_half_a_vector(backend: Backend, dtype: torch.dtype, width: int) -> None:
    cache, _, _ = packed("ternary per token", 1, 150, 1, width, dtype)
    q = torch.randn(1, 2, 2, width).to(dtype)
    with through(backend):
        check(q, cache, *exactly(cache), cache.seq_lens)


def test_decoding_while_the_cache_grows_is_continuous() -> None:
    """T = 1 … 300: at the seal the output moves by no more than the codes err."""
    k, v = keys_values(1, 300, 1, 64)
    cache = kv_pack(k[:, :0], v[:, :0], KVFormat(Code(8, "channel"), Code(8, "token"), 32, 32, 32))
    q = torch.randn(1, 1, 2, 64)
    for t in range(300):
        cache.append(k[:, t : t + 1], v[:, t : t + 1])
        out, lse = attention_decode(q, cache)
        exact = dense_decode(q, k[:, : t + 1], v[:, : t + 1], uniform(1, 1, t + 1))
        torch.testing.assert_close(out, exact[0], atol=0.05 * float(v.abs().max()), rtol=0)
        torch.testing.assert_close(lse, exact[1], atol=0.1, rtol=0)


def test_decode_makes_no_copy_of_the_cache() -> None:
    """Over 128 MB of unpacked keys and values the process grows by a few."""
    k, v = torch.randn(2, 1, 2048, 1, 128).half().expand(-1, -1, -1, 8, -1).unbind(0)
    cache = fastok.PackedKV("kivi-2", 1, 8, 128, dtype=torch.float16)
    for _ in range(16):
        cache.append(k, v)
    q = torch.randn(1, 1, 32, 128).half()
    attention_decode(q, cache)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention_decode(q, cache)
    attention_decode(q, cache, tokens=torch.arange(0, 32768, 3).expand(1, 8, -1))
    unpacked = 2 * 32768 * 8 * 128 * 2 // 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < unpacked / 8


# ---- dense and paged -------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize(("total", "ratio", "rows", "width", "v_width"), [
    (1, 1, 1, 64, 64), (70, 7, 3, 128, 64), (333, 4, 16, 72, 136), (2500, 8, 1, 32, 256), (4100, 2, 2, 8, 8),
])  # fmt: skip
@over_dense
def test_dense(backend: Backend, total: int, ratio: int, rows: int, width: int, v_width: int, dtype) -> None:
    total = min(total, 300) if "triton" in backend.name else total  # the interpreter is slow
    k = torch.randn(2, 3, total, width).to(dtype).transpose(1, 2)  # heads first, as Hugging Face has it
    v = torch.randn(2, total + 1, 4, v_width + 3).to(dtype)[:, 1:, 1:, 3:]
    q = torch.randn(2, rows, 3 * ratio, width).to(dtype)
    with through(backend):
        out, _ = check(q, (k, v, None), k, v, uniform(2, 3, total))
        lengths = torch.tensor([total, total // 2])
        check(q, (k, v, lengths), k, v, lengths[:, None].expand(2, 3))
        ragged = torch.randint(0, total + 1, (2, 3), dtype=torch.int32)
        check(q, (k, v, ragged), k, v, ragged, softcap=2.0, key_bias=torch.randn(2, total),
              tokens=torch.randint(-1, total, (2, 3, 40)))  # fmt: skip
    if rows == 1:
        torch.testing.assert_close(out, fastok.attention(q, k, v)[0], atol=4e-2 if dtype == torch.bfloat16 else 4e-3,
                                   rtol=0)  # fmt: skip


@pytest.mark.parametrize("page", [1, 16, 48])
@over_dense
def test_paged_is_contiguous(backend: Backend, page: int) -> None:
    """Shuffled tables, either order of heads and tokens, one tensor for both; what lies behind the end is not read."""
    lengths = torch.tensor([0, 5, 97, 144], dtype=torch.int32)
    most = 144 // page
    pages = torch.randperm(4 * most + 3)
    table = pages[: 4 * most].view(4, most).int()
    k, v = torch.randn(2, 4, 144, 2, 64).unbind(0)
    q = torch.randn(4, 2, 6, 64)
    both = torch.full((len(pages), 2, 2, page, 64), math.nan)  # [pages, k or v, G, P, D]
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            both[table[b, t // page], :, :, t % page] = torch.stack([k[b, t], v[b, t]])
        table[b, -(-length // page) :] = 10**6  # of no page
    paged = PagedKV(both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2), table, lengths)
    nhd = PagedKV(paged.k_pages.contiguous(), paged.v_pages.contiguous(), table.long(), lengths.long())
    tokens = torch.randint(-1, 144, (4, 2, 60))
    with through(backend):
        for how in ({}, {"tokens": tokens, "key_bias": torch.randn(4, 6, 144)}):
            wanted = attention_decode(q, (k, v, lengths), **how)
            for cache in (paged, nhd):
                for got, same in zip(attention_decode(q, cache, **how), wanted, strict=True):
                    assert_same(got, same)
    assert (wanted[0][0] == 0).all()
    assert (wanted[1][0] == -math.inf).all()


@given(
    batch=st.integers(0, 3), groups=st.integers(1, 3), ratio=st.integers(1, 8), rows=st.integers(0, 16),
    total=st.integers(0, 200), width=st.integers(1, 32), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@over_backends("decode", without=("reference", "cuda", "cuda-on-host", "triton-interpreter"))
def test_any_dense_cache(backend: Backend, batch, groups, ratio, rows, total, width, dtype, seed) -> None:
    torch.manual_seed(seed)
    k, v = (torch.randn(batch, total, groups, 8 * width).to(dtype) for _ in range(2))
    q = torch.randn(batch, rows, groups * ratio, 8 * width).to(dtype)
    with through(backend):
        check(q, (k, v, None), k, v, uniform(batch, groups, total))


@over_dense
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_lists_in_any_order(backend: Backend, dtype: torch.dtype) -> None:
    """More places than are taken together: unordered, twice, beyond the end, none at all."""
    q, k, v = torch.randn(2, 2, 4, 32).to(dtype), *torch.randn(2, 2, 2600, 2, 32).to(dtype)
    lengths, bias = torch.tensor([[2600, 2600], [1500, 1300]]), torch.randn(2, 2600)
    for lists in (2, 4):
        tokens = torch.randint(-1, 2600, (2, lists, 2300))
        tokens[0, 1] = -1
        with through(backend):
            check(q, (k, v, lengths), k, v, lengths, tokens=tokens, key_bias=bias)
            check(q, (k, v, lengths), k, v, lengths, tokens=tokens.sort().values.int(), key_bias=bias)


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["several-streams", "one-stream"])
def streams(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory is read as it suits either kind of machine."""
    native = pytest.importorskip("fastok._native")
    before = native.reads_one_stream()
    native.set_one_stream(request.param)
    yield
    native.set_one_stream(before)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_backends("decode", without=("reference", "cuda", "cuda-on-host", "triton-interpreter"))
def test_heads_read_side_by_side_give_what_each_gives_alone(backend: Backend, dtype: torch.dtype) -> None:
    """However many there are to a thread: by layout, by lists of all tokens, by lengths, by the number of threads."""
    q, (k, v) = torch.randn(2, 2, 10, 72).to(dtype), torch.randn(2, 2, 2200, 5, 72).to(dtype)
    lengths = torch.tensor([[2200, 2200, 2049, 2048, 0], [3, 700, 700, 700, 2200]])
    how = {"key_bias": torch.randn(2, 10, 2200), "softcap": 3.0}
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    threads = torch.get_num_threads()
    with through(backend):
        wanted = check(q, (k, v, lengths), k, v, lengths, **how)
        others = [attention_decode(q, (*heads_first, lengths), **how),
                  attention_decode(q, (k, v, lengths), tokens=torch.arange(2200).expand(2, 5, -1), **how)]  # fmt: skip
        try:
            for count in range(1, 5):
                torch.set_num_threads(count)
                others.append(attention_decode(q, (k, v, lengths), **how))
        finally:
            torch.set_num_threads(threads)
    for other in others:
        for got, same in zip(other, wanted, strict=True):
            assert_same(got, same)


@over_packed
def test_results_do_not_depend_on_batch_threads_or_the_order_of_lists(backend: Backend) -> None:
    total = 1000 if "triton" in backend.name else 5000  # the interpreter is slow
    cache, k, v = packed("kivi-2", 3, total, 2, 64)
    q = torch.randn(3, 1, 8, 64)
    tokens = torch.randperm(total)[: total // 5].expand(3, 2, -1)
    threads = torch.get_num_threads()
    with through(backend):
        out, lse = attention_decode(q, cache)
        listed = attention_decode(q, cache, tokens=tokens)
        again = attention_decode(q, cache, tokens=tokens.flip(-1).int())
        one = kv_pack(k[1:2], v[1:2], "kivi-2")
        torch.set_num_threads(1)
        try:
            alone = attention_decode(q[1:2], one)
        finally:
            torch.set_num_threads(threads)
    assert_same(alone[0][0], out[1])
    assert_same(alone[1][0], lse[1])
    for a, b in zip(listed, again, strict=True):
        assert_same(a, b)


@over_packed
def test_rows_that_see_nothing(backend: Backend) -> None:
    cache, k, v = packed("kivi-2", 1, 5, 1, 64)
    q = torch.randn(1, 8, 2, 64)
    nothing = torch.full((1, 1, 4), -1)
    hidden = torch.full((1, 5), -math.inf)
    with through(backend):
        out, lse = check(q, cache, k, v, cache.seq_lens)
        assert (out[:, :3] == 0).all()
        assert (lse[..., :3] == -math.inf).all()
        for how in ({"tokens": nothing}, {"tokens": nothing[..., :0]}, {"key_bias": hidden}):
            out, lse = attention_decode(q, cache, **how)
            assert (out == 0).all()
            assert (lse == -math.inf).all()


@over_backends("decode", without=("reference",))
def test_nan_is_seen(backend: Backend) -> None:
    k, v = torch.randn(2, 1, 100, 1, 64).unbind(0)
    q = torch.randn(1, 1, 2, 64)
    for x in (k, v):
        spoilt = x.clone()
        spoilt[0, 50, 0, 3] = math.nan
        with through(backend):
            out, _ = attention_decode(q, (spoilt, v, None) if x is k else (k, spoilt, None))
        assert out[..., 3].isnan().all()


def test_errors_name_the_argument() -> None:
    k = torch.randn(1, 200, 2, 64)
    cache = kv_pack(k, k, "kivi-2")
    q = torch.randn(1, 1, 4, 64)
    with pytest.raises(ValueError, match="q must have at most 16 rows, got 17"):
        attention_decode(torch.randn(1, 17, 4, 64), cache)
    with pytest.raises(TypeError, match="q must have dtype float32; got float16"):
        attention_decode(q.half(), cache)
    with pytest.raises(ValueError, match="q must have shape"):
        attention_decode(torch.randn(2, 1, 4, 64), cache)
    with pytest.raises(ValueError, match="q must have a number of heads that 2 KV heads divide; got 3"):
        attention_decode(torch.randn(1, 1, 3, 64), cache)
    with pytest.raises(ValueError, match=r"tokens must be \[B,G,K\]"):
        attention_decode(q, cache, tokens=torch.zeros(1, 3, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="tokens must have dtype"):
        attention_decode(q, cache, tokens=torch.zeros(1, 2, 5))
    with pytest.raises(TypeError, match="key_bias must have dtype float32"):
        attention_decode(q, cache, key_bias=torch.zeros(1, 200).half())
    with pytest.raises(ValueError, match="key_bias must have T = 200 places"):
        attention_decode(q, (k, k, None), key_bias=torch.zeros(1, 199))
    with pytest.raises(ValueError, match="key_bias must have T >= 200 places, as many as there are tokens; got 199"):
        attention_decode(q, cache, key_bias=torch.zeros(1, 199))
    with pytest.raises(ValueError, match="softcap must be finite and >= 0"):
        attention_decode(q, cache, softcap=-1.0)
    with pytest.raises(TypeError, match="scale must be a number, got str '1'"):
        attention_decode(q, cache, scale="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        attention_decode(q, cache, scale=math.nan)
    with pytest.raises(TypeError, match="cache must be a PackedKV, a PagedKV or"):
        attention_decode(q, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seq_lens must be within \[0, 201\), got 300"):
        attention_decode(q, (k, k, torch.tensor([300])))
    with pytest.raises(ValueError, match="cache must be a PackedKV, a PagedKV or"):
        attention_decode(q, (k, k))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="v must have shape"):
        attention_decode(q, (k, k[:, :3], None))
    pages = PagedKV(k, k, torch.tensor([[1]], dtype=torch.int32), torch.tensor([200]))
    with pytest.raises(ValueError, match=r"block_table must be within \[0, 1\), got 1"):
        attention_decode(q, pages)
    pages = PagedKV(k, k, torch.tensor([[0, 9]], dtype=torch.int32), torch.tensor([200]))
    with pytest.raises(ValueError, match="key_bias must have T >= 200 places"):
        attention_decode(q, pages, key_bias=torch.zeros(1, 199))
    with pytest.raises(ValueError, match="key_bias must have T = 400 places"):
        attention_decode(q, pages, key_bias=torch.zeros(1, 401))


def test_a_softcap_of_0_is_none_and_a_bias_may_end_with_the_longest_sequence() -> None:
    k, q, bias = torch.randn(3, 16, 2, 64), torch.randn(1, 1, 4, 64), torch.randn(1, 40)
    pages = PagedKV(k, k, torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([37]))
    wanted, _ = attention_decode(q, pages, key_bias=torch.nn.functional.pad(bias, (0, 8), value=9.0))
    assert_same(attention_decode(q, pages, key_bias=bias, softcap=0.0)[0], wanted)


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"])
def test_packed_opcheck_and_compile(name: str) -> None:
    cache, _, _ = packed(name, 2, 400, 2, 64)
    q = torch.randn(2, 3, 4, 64)
    rest = (cache.format.flat, 0.125, 0.0, torch.randn(2, 400), torch.randint(-1, 400, (2, 2, 9)))
    arguments = (q, *cache.arguments, *rest)
    torch.library.opcheck(torch.ops.fastok.decode_packed.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, *arguments) -> Tensor:
        return torch.ops.fastok.decode_packed(q * 2, *arguments)[0] + 1

    assert_same(compiled(*arguments), torch.ops.fastok.decode_packed(q * 2, *arguments[1:])[0] + 1)


def test_dense_opcheck_and_compile() -> None:
    q, k = torch.randn(2, 1, 4, 64), torch.randn(5, 16, 2, 64)
    table = torch.randint(0, 5, (2, 3), dtype=torch.int32)
    arguments = (q, k, k, torch.tensor([40, 3]), table, 0.125, 0.0, None, None)
    torch.library.opcheck(torch.ops.fastok.decode.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor) -> Tensor:
        return attention_decode(q, (k, k, None))[0]

    k = k[:2]
    assert_same(compiled(q, k), attention_decode(q, (k, k, None))[0])


# ---- numbers and bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "kivi-4", "kivi-2", "vidkv-2"])
@over_packed
def test_integer_products_err_no_more_than_stated(backend: Backend, name: str) -> None:
    """Queries and probabilities in 15 bits and a sign: 2^-16 of the largest term of a group, for every term."""
    fmt = KVFormat.preset(name)
    k, v = (x.half() for x in keys_values(1, fmt.page, 2, 128))
    cache = kv_pack(k, v, KVFormat(fmt.key, fmt.value, fmt.group, fmt.page, 0))
    q = torch.randn(1, 1, 8, 128).half()
    wide_k, wide_v = exactly(cache)
    truth = dense_decode(q.double(), wide_k, wide_v, cache.seq_lens)
    with through(backend):
        out, lse = attention_decode(q, cache)
    of_keys, of_values = (2 * float(x.abs().amax()) for x in (wide_k, wide_v))
    of_logits = 2**-16 * 128 * float(q.abs().amax()) * of_keys * 128**-0.5
    assert float((lse - truth[1]).abs().max()) <= of_logits + 1e-5
    bound = (2 * of_logits + 2**-16 * fmt.page) * of_values + 2**-11 * truth[0].abs() + 1e-6
    assert (out.double() - truth[0]).abs().le(bound).all()


@over_backends("decode_packed", without=("reference", "cuda", "cuda-on-host", "triton-interpreter"))
def test_directories_that_contradict_the_data_are_errors(backend: Backend) -> None:
    cache, _, _ = packed("kivi-2", 1, 400, 2, 64)
    q = torch.randn(1, 1, 4, 64)
    data, offset, counts, *rest = cache.arguments
    spoilt = [
        ((data[: data.numel() // 2], offset, counts), "data is too short|within data"),
        ((data, offset + 8, counts), "multiple of 16"),
        ((data, offset - 1024 * 1024, counts), "offset must be"),
        ((data, offset + 16 * 1024 * 1024, counts), "offset must be"),
        ((data, offset, counts + 1), "counts must be within"),
        ((data, offset, -counts), "counts must be within"),
    ]
    for arguments, message in spoilt:
        with pytest.raises(RuntimeError, match=message):
            backend.decode_packed(q, *arguments, *rest, cache.format.flat, 0.125, 0.0, None, None)


def test_triton_skips_records_outside_the_data() -> None:
    """It cannot say so, as nobody waits for it."""
    pytest.importorskip("triton")
    cache, _, _ = packed("kivi-2", 1, 400, 1, 64)
    q = torch.randn(1, 1, 4, 64)
    data, offset, *rest = cache.arguments
    hot = cache.hot_k[0, :, : int(cache.hot_len)], cache.hot_v[0, :, : int(cache.hot_len)]
    wanted = torch.nn.functional.scaled_dot_product_attention(q[0].transpose(0, 1), *hot, enable_gqa=True)[:, 0]
    for outside in (offset + 8, offset - 2**40, offset + 2**40, torch.full_like(offset, data.numel() - 16)):
        arguments = q, data, outside, *rest, cache.format.flat, 0.125, 0.0, None, None
        out, _ = fastok.triton.OPS["decode_packed"](*arguments)
        torch.testing.assert_close(out[0, 0], wanted)


@over_formats
@over_backends("decode_packed", without=("reference", "cuda", "cuda-on-host"))
def test_any_bytes_can_be_read(backend: Backend, name: str) -> None:
    cache, _, _ = packed(name, 1, 2 * FORMATS[name].page + FORMATS[name].hot, 2, 128, torch.bfloat16)
    cache.data.random_(0, 256)
    with through(backend):
        out, lse = attention_decode(torch.randn(1, 2, 4, 128).bfloat16(), cache)
    assert out.shape == (1, 2, 4, 128)
    assert lse.shape == (1, 4, 2)


def test_no_gradient_flows() -> None:
    """So that a backward pass that needs one fails, rather than leaving it out."""
    q, k = torch.randn(1, 1, 4, 32, requires_grad=True), torch.randn(1, 40, 2, 32, requires_grad=True)
    for cache in ((k, k, None), kv_pack(k, k, "int8")):
        assert not attention_decode(q, cache)[0].requires_grad


@over_backends("decode_packed")
def test_a_bias_for_no_tokens(backend: Backend) -> None:
    cache, q = kv_pack(torch.randn(2, 0, 2, 32), torch.randn(2, 0, 2, 32), "int8"), torch.randn(2, 3, 4, 32)
    out, lse = backend.decode_packed(q, *cache.arguments, cache.format.flat, 0.2, 0.0, torch.zeros(2, 0), None)
    assert_same(out, torch.zeros_like(q))
    assert (lse == -torch.inf).all()
