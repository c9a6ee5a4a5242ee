"""What attention promises besides its results: opcheck, compilation, memory, errors."""

import subprocess
import sys
from typing import Any

import fastok
import pytest
import torch
from attention_cases import DTYPES, MASKS, flat, parts, sized
from fastok import ScoreSpec, _library
from fastok.reference.attention import CHUNK
from fastok.testing import assert_same
from fastok.testing.examples import examples
from fastok.testing.examples.attention import cu
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

# ---- opcheck ---------------------------------------------------------------------------------------------------------

OPS = ("attention", "attention_backward", "attention_scores", "attention_with_scores")
EXAMPLES = [one for one in examples("small", "awkward") if one.op in OPS]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_opcheck(example: Any) -> None:
    op = getattr(torch.ops.fastok, example.op).default
    torch.library.opcheck(op, example.arguments(torch.bfloat16 if "packed" in example.name else torch.float32))


def test_opcheck_with_gradients() -> None:
    case = sized(s=5, t=7, width=8, causal=True, softcap=2.0, key_bias=torch.randn(2, 7).requires_grad_())
    q, k, v = (x.requires_grad_() for x in case.qkv)
    torch.library.opcheck(torch.ops.fastok.attention.default, flat(fastok.attention, q, k, v, **case.mask))
    both = flat(fastok.attention_with_scores, q, k, v, **case.mask)
    torch.library.opcheck(torch.ops.fastok.attention_with_scores.default, both)
    out, lse = (x.detach().requires_grad_() for x in fastok.attention(*case.qkv))
    torch.library.opcheck(torch.ops.fastok.merge_states.default, (out, lse, out, lse))


# ---- torch.compile ---------------------------------------------------------------------------------------------------

IN_PACKS = (
    ScoreSpec(),
    ScoreSpec("last", heads="none"),
    ScoreSpec((-3, None), normalize="visible", pool=3),
    ScoreSpec(torch.tensor([0, 3, 3]), reduce="none"),
    ScoreSpec(normalize="causal", heads="group_mean", value_norm="l2"),
)
SPECS = (
    *IN_PACKS,
    ScoreSpec((2, -1), (-9, None), "max", logits=True),
    ScoreSpec((-8, None), (3, None), "mean", normalize="cols"),
    ScoreSpec(-2, reduce="none", heads="max"),
)
SHAPES = ((2, 17, 29), (2, 23, 31), (2, 40, 40), (2, 9, 70))


def run_all(q: Tensor, k: Tensor, v: Tensor) -> Any:
    out, lse, scores = fastok.attention_with_scores(q, k, v, scores=SPECS, causal=True, window=(20, -1))
    merged = fastok.merge_states(out, lse, *fastok.attention(q, k.flip(1), v, softcap=3.0))
    return *merged, *scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole_with_changing_lengths(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_all, fullgraph=True, dynamic=True, backend=counter)
    for batch, s, t in SHAPES:
        case = sized(batch, s, t).to(dtype)
        for got, wanted in zip(parts(compiled(*case.qkv)), parts(run_all(*case.qkv)), strict=True):
            assert_same(got, wanted)
    assert counter.frame_count <= 2


def test_compiles_whole_with_gradients() -> None:
    torch.compiler.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out, lse, (scores,) = fastok.attention_with_scores(q, k, v, scores=(ScoreSpec("last"),), key_bias=bias)
        return out.square().sum() + lse.sum() + scores.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, s, t in SHAPES[:3]:
        inputs = [*sized(batch, s, t).qkv, torch.randn(batch, t)]
        leaves = [x.requires_grad_() for x in inputs]
        for got, wanted in zip(
            torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
        ):
            assert_same(got, wanted)
    assert counter.frame_count <= 2


def test_compiles_whole_with_packed_sequences() -> None:
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
        return fastok.attention_with_scores(q, k, v, scores=IN_PACKS, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for lengths_q, lengths_k in (((3, 0, 9), (4, 5, 20)), ((8, 7, 2), (9, 9, 3)), ((21, 1, 1), (30, 1, 2))):
        q = torch.randn(sum(lengths_q), 4, 32)
        k, v = torch.randn(2, sum(lengths_k), 2, 32)
        arguments = q, k, v, cu(*lengths_q), cu(*lengths_k)
        for got, wanted in zip(parts(compiled(*arguments)), parts(run(*arguments)), strict=True):
            assert_same(got, wanted)
    assert counter.frame_count <= 2


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("op", OPS)
def test_specification_never_holds_the_matrix(op: str) -> None:
    """Memory of the specification, which serves devices without kernels, grows with S + T."""
    chunk = CHUNK
    for n in (1024, 4096):
        q, k, v, grad = torch.randn(4, 1, n, 1, 8)
        mask = flat(fastok.attention, q[:, :1], k, v, causal=True)[3:]
        out, lse = torch.zeros_like(q), torch.zeros(1, 1, n)
        which = None, 0, n, 0, n, False, "sum", 1, False, False
        arguments = {
            "attention": (q, k, v, *mask),
            "attention_backward": (grad, None, q, k, v, out, lse, *mask),
            "attention_scores": (q, k, None, None, *mask, *which),
            "attention_with_scores": (q, k, v, None, *mask, *which[:-3], "mean", False),
        }
        with Largest() as largest:
            _library.REFERENCE[op](*arguments[op])
        assert largest.elements <= chunk * n


def test_peak_memory_at_16384() -> None:
    """Of what serves the CPU: one head's S x T matrix alone would be 1 GiB."""
    code = """
import resource, torch, fastok
n = 16384
q, k, v = torch.randn(3, 1, n, 1, 32)
run = lambda n: fastok.attention_with_scores(q[:, :n], k[:, :n], v[:, :n], causal=True)
run(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 128 * 1024  # KiB: an eighth of the matrix


# ---- errors ----------------------------------------------------------------------------------------------------------


def wrong(**changed: Any) -> dict[str, Any]:
    """Keyword arguments of attention with something changed."""
    case = sized()
    return {"q": case.q, "k": case.k, "v": case.v, **changed}


HALF = torch.float16
PACK = {"cu_seqlens_q": cu(5, 4), "cu_seqlens_k": cu(5, 4)}
NINE = {"q": torch.zeros(9, 2, 8), "k": torch.zeros(9, 2, 8), "v": torch.zeros(9, 2, 8)}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype of q": ({"q": torch.zeros(2, 17, 4, 32, dtype=torch.int32)}, TypeError, "q must have dtype float32.*int32"),
    "fp64": ({"q": torch.zeros(2, 17, 4, 32).double()}, TypeError, "q must have dtype .*got float64"),
    "dtype of k": ({"k": torch.zeros(2, 29, 2, 32, dtype=HALF)}, TypeError, "k must have dtype float32; got float16"),
    "dtype of v": ({"v": torch.zeros(2, 29, 2, 32, dtype=HALF)}, TypeError, "v must have dtype float32; got float16"),
    "dimensions of q": ({"q": torch.zeros(17, 32)}, ValueError, r"q must be \[B,S,H,D\].*got \[17, 32\]"),
    "batch of k": ({"k": torch.zeros(3, 29, 2, 32)}, ValueError, r"k must have shape .*got \[3, 29, 2, 32\]"),
    "width of k": ({"k": torch.zeros(2, 29, 2, 24)}, ValueError, r"k must have shape .*got \[2, 29, 2, 24\]"),
    "length of v": ({"v": torch.zeros(2, 28, 2, 32)}, ValueError, r"v must have shape .*got \[2, 28, 2, 32\]"),
    "heads": ({"k": torch.zeros(2, 29, 3, 32)}, ValueError, "k must have a number of heads that divides.*4; got 3"),
    "no heads": ({"k": torch.zeros(2, 29, 0, 32)}, ValueError, "k must have a number of heads.*got 0"),
    "head dim": (
        {"q": torch.zeros(2, 17, 4, 20), "k": torch.zeros(2, 29, 2, 20)}, ValueError, "q must .*multiple of 8.*got 20",
    ),
    "wide head dim": (
        {"q": torch.zeros(2, 17, 4, 264), "k": torch.zeros(2, 29, 2, 264)}, ValueError, "q must .*to 256; got 264",
    ),
    "width of v": ({"v": torch.zeros(2, 29, 2, 12)}, ValueError, "v must .*multiple of 8.*got 12"),
    "window": ({"window": (-2, 0)}, ValueError, "window left must be >= 0, or -1.*got -2"),
    "window of floats": ({"window": (1, 0.5)}, TypeError, "window right must be an int, got float 0.5"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be finite and >= 0 .*got -1.0"),
    "infinite softcap": ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    "softcap of text": ({"softcap": "3"}, TypeError, "softcap must be a number, got str '3'"),
    "scale of text": ({"scale": "3"}, TypeError, "scale must be a number, got str '3'"),
    "infinite scale": ({"scale": -float("inf")}, ValueError, "scale must be finite, got -inf"),
    "window of one": ({"window": 3}, TypeError, r"window must be None or \(left, right\), got 3"),
    "no tensor": ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "dtype of key_bias": ({"key_bias": torch.zeros(2, 29, dtype=HALF)}, TypeError, "key_bias must have dtype float32"),
    "shape of key_bias": ({"key_bias": torch.zeros(2, 28)}, ValueError, r"key_bias must have shape .*got \[2, 28\]"),
    "heads of key_bias": ({"key_bias": torch.zeros(2, 2, 29)}, ValueError, "key_bias must have shape .*2, 4, 29"),
    "device of k": ({"k": torch.zeros(2, 29, 2, 32, device="meta")}, ValueError, "k must be on the same device as q"),
    "one cu_seqlens": ({**NINE, "cu_seqlens_q": cu(9)}, ValueError, "cu_seqlens_q and cu_seqlens_k must be given"),
    "cu_seqlens of a batch": (PACK, ValueError, r"q must be \[total,H,D\] with cu_seqlens"),
    "packed without cu_seqlens": (NINE, ValueError, r"q must be \[total,H,D\] with cu_seqlens"),
    "dtype of cu_seqlens": (
        {**NINE, "cu_seqlens_q": cu(9), "cu_seqlens_k": cu(9).long()}, TypeError, "cu_seqlens_k must have dtype int32",
    ),
    "length of cu_seqlens": (
        {**NINE, "cu_seqlens_q": cu(9), "cu_seqlens_k": cu(5, 4)}, ValueError, r"cu_seqlens_k must .*got \[3\]",
    ),
    "end of cu_seqlens": (
        {**NINE, "cu_seqlens_q": cu(9), "cu_seqlens_k": cu(10)}, ValueError,
        r"cu_seqlens_k must ascend within \[0, 9\], got \[0, 10\]",
    ),
    "order of cu_seqlens": (
        {**NINE, "cu_seqlens_q": cu(9, -4, 4), "cu_seqlens_k": cu(3, 3, 3)}, ValueError, "cu_seqlens_q must ascend",
    ),
    "no cu_seqlens": ({**NINE, "cu_seqlens_q": cu()[:0], "cu_seqlens_k": cu()[:0]}, ValueError, "cu_seqlens_q must be"),
    "max_seqlen of floats": (
        {**NINE, "cu_seqlens_q": cu(9), "cu_seqlens_k": cu(9), "max_seqlen_k": 9.0}, TypeError, "max_seqlen_k must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    changed, error, message = ERRORS[case]
    arguments = wrong(**changed)
    for function in (fastok.attention, fastok.attention_with_scores, fastok.attention_scores):
        if function is fastok.attention_scores:
            arguments["spec"] = ScoreSpec(value_norm="l2")
        with pytest.raises(error, match=message):
            function(**arguments)


SPEC_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduce": ({"reduce": "median"}, ValueError, "reduce must be one of 'sum', 'mean', 'max', 'none'; got 'median'"),
    "normalize": ({"normalize": "rows"}, ValueError, "normalize must be one of None, 'visible', .*got 'rows'"),
    "heads": ({"heads": "group"}, ValueError, "heads must be one of .*got 'group'"),
    "value_norm": ({"value_norm": "max"}, ValueError, "value_norm must be one of .*got 'max'"),
    "logits": ({"logits": True, "normalize": "cols"}, ValueError, "normalize='cols'.*logits=True"),
    "even pool": ({"pool": 4}, ValueError, "pool must be an odd .*got 4"),
    "no pool": ({"pool": 0}, ValueError, "pool must be an odd .*got 0"),
    "rows": ({"rows": "first"}, ValueError, "rows must be 'all', 'last', .*got 'first'"),
    "rows of floats": ({"rows": (0, 2.5)}, TypeError, "rows must be an int, got float 2.5"),
    "three rows": ({"rows": (0, 2, 1)}, ValueError, r"rows must be \(start, stop\), got \(0, 2, 1\)"),
    "dtype of rows": ({"rows": torch.zeros(3, dtype=torch.int32)}, TypeError, r"rows must be int64 \[R\], got int32"),
    "shape of rows": ({"rows": torch.zeros(3, 1).long()}, TypeError, r"rows must be int64 \[R\], got int64 \[3, 1\]"),
    "pool of floats": ({"pool": 3.0}, TypeError, "pool must be an int, got float 3.0"),
    "cols": ({"cols": 3}, TypeError, r"cols must be None or \(start, stop\), got int"),
    "cols of None": ({"cols": (None, 3)}, TypeError, "cols must be an int, got NoneType"),
}


@pytest.mark.parametrize("case", SPEC_ERRORS)
def test_errors_of_specs_name_the_field(case: str) -> None:
    fields, error, message = SPEC_ERRORS[case]
    with pytest.raises(error, match=message):
        ScoreSpec(**fields)


def test_errors_of_scores_name_the_argument() -> None:
    case, pack = sized(), MASKS["packed"]()

    def scores(spec: ScoreSpec, **more: Any) -> Tensor:
        return fastok.attention_scores(case.q, case.k, spec=spec, **more)

    for rows in (17, -18):
        with pytest.raises(ValueError, match=rf"rows must be within \[-17, 17\), got {rows}"):
            scores(ScoreSpec(rows))
    for row in (17, -1):
        with pytest.raises(ValueError, match=rf"rows must be within \[0, 17\), got {row}"):
            scores(ScoreSpec(torch.tensor([3, row])))
    with pytest.raises(TypeError, match=r"spec must be of fastok\.ScoreSpec, got str 'last'"):
        scores("last")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scores must be a tuple of fastok\.ScoreSpec"):
        fastok.attention_with_scores(*case.qkv, scores=ScoreSpec())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scores must be of fastok\.ScoreSpec, got int 3"):
        fastok.attention_with_scores(*case.qkv, scores=(3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="v must be given for value_norm='l2', got None"):
        scores(ScoreSpec(value_norm="l2"))
    with pytest.raises(TypeError, match="lse must have dtype float32; got float64"):
        scores(ScoreSpec(), lse=torch.zeros(2, 4, 17).double())
    with pytest.raises(ValueError, match=r"lse must have shape .*2, 4, 17.*got \[2, 17, 4\]"):
        scores(ScoreSpec(), lse=torch.zeros(2, 17, 4))
    with pytest.raises(ValueError, match="lse must be on the same device as q"):
        scores(ScoreSpec(), lse=torch.zeros(2, 4, 17, device="meta"))
    with pytest.raises(ValueError, match="rows must be a known number for reduce='none' and packed"):
        fastok.attention_scores(pack.q, pack.k, spec=ScoreSpec(reduce="none"), **pack.mask)
    with pytest.raises(
        NotImplementedError, match="cols of packed sequences: required, one slice of all; supported, cols=None"
    ):
        fastok.attention_scores(pack.q, pack.k, spec=ScoreSpec(cols=(0, 3)), **pack.mask)


def test_errors_of_merge_states_name_the_argument() -> None:
    out, lse = fastok.attention(*sized().qkv)
    for arguments, error, message in (
        ((out.double(), lse, out, lse), TypeError, "out_a must have dtype"),
        ((out, lse, out.half(), lse), TypeError, "out_b must have dtype float32; got float16"),
        ((out, lse, out[:, 1:], lse), ValueError, r"out_b must have shape .*got \[2, 16, 4, 32\]"),
        ((out, lse.half(), out, lse), TypeError, "lse_a must have dtype float32; got float16"),
        ((out, lse, out, lse.mT), ValueError, r"lse_b must have shape .*got \[2, 17, 4\]"),
        ((out, lse, out.to("meta"), lse), ValueError, "out_b must be on the same device as out_a"),
        ((out, lse.to("meta"), out, lse), ValueError, "lse_a must be on the same device as out_a"),
    ):
        with pytest.raises(error, match=message):
            fastok.merge_states(*arguments)
