"""fastok.flash: FlashAttention 2's functions, against the plain formula sequence by sequence."""

import inspect
from typing import Any

import pytest
import torch
from fastok.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastok.testing import assert_accurate, assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounter


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``out[S,H,D]`` and ``lse[H,S]`` of one sequence ``q[S,H,D]``, ``k[T,G,D]``, with the mask written as a matrix."""
    (n_q, heads, width), n_k = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = torch.einsum("shd,thd->hst", q, k) * (width**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    i, j = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(n_q, n_k, dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    logits = logits.masked_fill(hidden, -torch.inf)
    p = logits.softmax(-1).masked_fill(hidden.all(1)[:, None], 0)
    return torch.einsum("hst,thd->shd", p, v), logits.logsumexp(-1)


def check(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **masking: Any) -> None:
    """One sequence against the formula in fp64; the formula in the same dtype bounds the error."""
    truth, peer = formula(q.double(), k.double(), v.double(), **masking), formula(q, k, v, **masking)
    assert_accurate(out, truth[0], peer[0], factor=3)
    if lse is not None:
        assert_accurate(lse, truth[1], formula(q.float(), k.float(), v.float(), **masking)[1], factor=4)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left window, causal": {"window_size": (4, -1), "causal": True},
    "softcap and scale": {"softcap": 2.0, "softmax_scale": 0.7},
}
over_masks = pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The formula's names for the options."""
    names = {"window_size": "window", "softmax_scale": "scale"}
    return {names.get(name, name): value for name, value in options.items()}


# ---- the signatures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            flash_attn_func,
            "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None "
            "deterministic=False return_attn_probs=False",
        ),
        (
            flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None causal=False "
            "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False "
            "block_table=None",
        ),
        (
            flash_attn_with_kvcache,
            "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
            "cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
            "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
        ),
    ],
)
def test_arguments_are_those_of_flash_attention(function: Any, arguments: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    ours = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(", ", ",") for p in parameters]
    assert ours == arguments.split()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


# ---- flash_attn_func -------------------------------------------------------------------------------------------------


@over_masks
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 9), (5, 12), (12, 5), (1, 7)])
def test_batches(options: dict[str, Any], n_q: int, n_k: int) -> None:
    q, k, v = draw(2, n_q, 6, 16), draw(2, n_k, 2, 16), draw(2, n_k, 2, 16)
    out, lse, probabilities = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert lse.shape == (2, 6, n_q)
    assert probabilities.numel() == 0
    for b in range(2):
        check(out[b], lse[b], q[b], k[b], v[b], **plain(options))
    assert_same(flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 20, 2, 32, dtype=dtype) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True)
    assert out.dtype == dtype
    check(out[0], None, q[0], k[0], v[0], causal=True)


def test_head_dims_that_are_no_multiple_of_8() -> None:
    q, k, v = draw(1, 7, 2, 20), draw(1, 9, 2, 20), draw(1, 9, 2, 20)
    out = flash_attn_func(q, k, v)
    assert out.shape == q.shape
    check(out[0], None, q[0], k[0], v[0])


def test_gradients() -> None:
    inputs = [draw(2, 6, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)]
    results = []
    for dtype, ours in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        if ours:
            out = flash_attn_func(*leaves, causal=True, window_size=(5, 0), deterministic=True)
        else:
            out = torch.stack([formula(*(x[b] for x in leaves), causal=True, window=(5, 0))[0] for b in range(2)])
        out.square().sum().backward()
        results.append(torch.cat([x.grad.flatten() for x in leaves]))
    assert_accurate(results[0], results[1], results[2], factor=4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, fullgraph=True, dynamic=dynamic, backend="eager")
    for batch, n in ((2, 9), (3, 12)):
        q, k, v = draw(batch, 6, 4, 16), draw(batch, n, 2, 16), draw(batch, n, 2, 16)
        assert_same(compiled(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))


def test_a_cache_of_any_size_is_compiled_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def step(q: Tensor, k: Tensor, v: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch, n in ((2, 9), (3, 12), (4, 17), (5, 11)):
        q, new, k, v = draw(batch, 1, 4, 16), draw(batch, 1, 2, 16), draw(batch, n, 2, 16), draw(batch, n, 2, 16)
        lengths = torch.randint(0, n, (batch,), dtype=torch.int32)
        expected = step(q, k.clone(), v.clone(), new, lengths)
        assert_same(compiled(q, k, v, new, lengths), expected)
    assert counter.frame_count == 2  # the second for all that follow


# ---- flash_attn_varlen_func ------------------------------------------------------------------------------------------


@over_masks
def test_packed_sequences(options: dict[str, Any]) -> None:
    lengths_q, lengths_k = [4, 0, 7, 1], [6, 3, 5, 9]
    q, k, v = draw(12, 4, 16), draw(23, 2, 16), draw(23, 2, 16)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9, **options, return_attn_probs=True)
    assert lse.shape == (4, 12)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for piece, of_lse, part in zip(out.split(lengths_q), lse.split(lengths_q, 1), parts, strict=True):
        check(piece, of_lse, *part, **plain(options))


# ---- flash_attn_with_kvcache -----------------------------------------------------------------------------------------


@over_masks
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lengths", [6, [6, 9, 3], None], ids=["int", "tensor", "full"])
def test_cache_without_new_tokens(options: dict[str, Any], rows: int, lengths: Any) -> None:
    q, k_cache, v_cache = draw(3, rows, 4, 16), draw(3, 10, 2, 16), draw(3, 10, 2, 16)
    if lengths is not None:
        k_cache[:, 9:], v_cache[:, 9:] = 1e6, 1e6  # nobody must look there
    seqlens = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    before = k_cache.clone(), v_cache.clone()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=seqlens, num_splits=4, return_softmax_lse=True, **options
    )
    assert lse.shape == (3, 4, rows)
    for b in range(3):
        n = lengths[b] if isinstance(lengths, list) else lengths or 10
        check(out[b], lse[b], q[b], k_cache[b, :n], v_cache[b, :n], **plain(options))
    assert_same(k_cache, before[0])
    assert_same(v_cache, before[1])


@pytest.mark.parametrize("lengths", [5, [5, 0, 7]], ids=["int", "tensor"])
@pytest.mark.parametrize("entries", [None, [4, 0, 2]], ids=["all", "cache_batch_idx"])
def test_new_tokens_are_written_in_place_and_seen(lengths: Any, entries: list[int] | None) -> None:
    q, k, v = draw(3, 2, 4, 16), draw(3, 2, 2, 16), draw(3, 2, 2, 16)
    k_cache, v_cache = (draw(3 if entries is None else 5, 9, 2, 16) for _ in range(2))
    before = k_cache.clone(), v_cache.clone()
    seqlens = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    index = None if entries is None else torch.tensor(entries, dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, cache_batch_idx=index, causal=True)
    wanted = [x.clone() for x in before]
    for b in range(3):
        n, entry = lengths[b] if isinstance(lengths, list) else lengths, b if entries is None else entries[b]
        wanted[0][entry, n : n + 2], wanted[1][entry, n : n + 2] = k[b], v[b]
        check(out[b], None, q[b], wanted[0][entry, : n + 2], wanted[1][entry, : n + 2], causal=True)
    assert_same(k_cache, wanted[0])
    assert_same(v_cache, wanted[1])


def test_a_larger_cache_serves_its_first_sequences() -> None:
    q, k_cache, v_cache = draw(2, 1, 4, 16), draw(5, 8, 2, 16), draw(5, 8, 2, 16)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
    for b in range(2):
        check(out[b], None, q[b], k_cache[b, :7], v_cache[b, :7])


@pytest.mark.parametrize("lengths", [8, [8, 5, 10]], ids=["int", "tensor"])
def test_left_padding(lengths: Any) -> None:
    q, k_cache, v_cache = draw(3, 2, 4, 16), draw(3, 10, 2, 16), draw(3, 10, 2, 16)
    seqlens = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    pads = [0, 3, 1]
    leftpad = torch.tensor(pads, dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, cache_leftpad=leftpad, causal=True)
    for b in range(3):
        n = lengths[b] if isinstance(lengths, list) else lengths
        check(out[b], None, q[b], k_cache[b, pads[b] : n], v_cache[b, pads[b] : n], causal=True)


def rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """``x[S,H,D]`` turned by ``angles[S,R/2]``, as complex numbers."""
    half = angles.shape[1]
    turning = x[..., : 2 * half].double()
    pairs = turning.unflatten(-1, (half, 2)) if interleaved else turning.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles.double())[:, None])
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned.float(), x[..., 2 * half :]], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [4, [4, 6]], ids=["int", "tensor"])
def test_rotary_embedding(interleaved: bool, causal: bool, lengths: Any) -> None:
    angles = torch.rand(12, 8) * 6
    q, k, v = draw(2, 3, 4, 24), draw(2, 3, 2, 24), draw(2, 3, 2, 24)
    k_cache, v_cache = draw(2, 12, 2, 24), draw(2, 12, 2, 24)
    seqlens = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), cache_seqlens=seqlens, causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    for b in range(2):
        n = lengths[b] if isinstance(lengths, list) else lengths
        at = angles[n : n + 3]
        torch.testing.assert_close(k_cache[b, n : n + 3], rotated(k[b], at, interleaved))
        turned = rotated(q[b], at if causal else angles[n].expand(3, -1), interleaved)
        torch.testing.assert_close(out[b], formula(turned, k_cache[b, : n + 3], v_cache[b, : n + 3], causal=causal)[0])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_served_is_refused_by_name() -> None:
    q, cu = draw(1, 4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"dropout_p: required, dropout_p=0.1; supported, 0.0; missing"):
        flash_attn_func(q, q, q, 0.1)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, 0.1)
    slopes = torch.ones(2)
    for call in (
        lambda: flash_attn_func(q, q, q, alibi_slopes=slopes),
        lambda: flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, alibi_slopes=slopes),
        lambda: flash_attn_with_kvcache(q, q, q, alibi_slopes=slopes),
    ):
        with pytest.raises(NotImplementedError, match="alibi_slopes: required, ALiBi"):
            call()
    for name in ("cache_batch_idx", "cache_leftpad"):
        with pytest.raises(NotImplementedError, match=f"{name}: required, {name} of pages"):
            flash_attn_with_kvcache(q, q, q, block_table=cu[None, :1], **{name: cu[:1]})


def test_bad_arguments() -> None:
    q, cache, table = draw(2, 1, 2, 16), draw(2, 8, 2, 16), torch.zeros(8, 4)
    wide = torch.zeros(8, 16)
    for message, options in (
        ("given together", {"k": q}),
        ("cache_seqlens must say where", {"k": q, "v": q}),
        ("must fit the cache's 8 tokens", {"k": q, "v": q, "cache_seqlens": 8}),
        ("need k and v", {"rotary_cos": table, "rotary_sin": table}),
        ("rotary_cos and rotary_sin must be", {"k": q, "v": q, "cache_seqlens": 1, "rotary_cos": table}),
        ("rotary_cos must be", {"k": q, "v": q, "cache_seqlens": 1, "rotary_cos": wide, "rotary_sin": wide}),
        ("cache_seqlens must have shape", {"cache_seqlens": torch.ones(3, dtype=torch.int32)}),
        (r"cache_seqlens must be within \[0, 9\), got 9", {"cache_seqlens": torch.tensor([9, 2])}),
        (r"cache_seqlens must be within \[0, 8\), got 8", {"k": q, "v": q, "cache_seqlens": torch.tensor([8, 2])}),
        (r"cache_batch_idx must be within \[0, 2\), got 2", {"cache_batch_idx": torch.tensor([0, 2])}),
        (r"cache_leftpad must be within \[0, 9\), got -1", {"cache_leftpad": torch.tensor([0, -1])}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(q, cache, cache.clone(), **options)
    with pytest.raises(ValueError, match="k_cache must have an entry for each of 2"):
        flash_attn_with_kvcache(q, cache[:1], cache[:1])
    with pytest.raises(TypeError, match="q must be a tensor, got NoneType"):
        flash_attn_func(None, q, q)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k_cache"):
        flash_attn_with_kvcache(q, cache.half(), cache.half())
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        flash_attn_with_kvcache(
            q, cache, cache.clone(), q, q, table, table, 1, cache_leftpad=torch.zeros(2, dtype=torch.int32)
        )
