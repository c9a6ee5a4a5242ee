"""Loads the compiled libraries, registers the fallbacks, and knows which backend serves which op and why."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch

from . import reference, triton
from .reference import decode, quantize, sparse
from .reference.attention import attention, attention_backward, attention_scores, attention_with_scores, with_scores

FOLDER = Path(__file__).parent
CPU_LIBRARY = FOLDER / "libfastok_cpu.so"
CUDA_LIBRARY = FOLDER / "libfastok_cuda.so"

# Each op, and the function of fastok.reference with its signature.
REFERENCE = {
    "bipartite_match": reference.match_map,
    "nearest": reference.nearest_rows,
    "top_tokens": reference.top_rows,
    "sample_cdf": reference.sample_map,
    "density_peaks": reference.peak_rows,
    "k_center": reference.k_center_picks,
    "max_coverage": reference.max_coverage_picks,
    "build_map": reference.build_map,
    "merge": reference.merge,
    "merge_backward": reference.merge_backward,
    "unmerge": reference.unmerge,
    "attention": attention,
    "attention_backward": attention_backward,
    "attention_scores": attention_scores,
    "attention_with_scores": attention_with_scores,
    "kv_seal": quantize.kv_seal,
    "kv_unseal": quantize.kv_unseal,
    "decode": decode.decode,
    "decode_packed": decode.decode_packed,
    "label_scores": sparse.label_scores,
    "select_tokens": sparse.select_tokens,
    "label_tokens": sparse.label_tokens,
    "double_sparse_decode": sparse.double_sparse_decode,
}
# Plain PyTorch on every device, autograd included.
COMPOSITE = {"merge_states": reference.merge_states}


def _attention_with_scores(*arguments: Any) -> Any:
    ops = torch.ops.fastok
    return with_scores(ops.attention, ops.attention_scores, *arguments)


def _label_tokens(*arguments: Any) -> Any:
    *labelled, k, sink, recent, seq_lens = arguments
    ops = torch.ops.fastok
    return ops.select_tokens(ops.label_scores(*labelled, seq_lens), k, None, sink, recent, seq_lens)


def _double_sparse_decode(*arguments: Any) -> Any:
    q, k, v, seq_lens, table, scale, softcap, *labelled = arguments
    ops = torch.ops.fastok
    tokens, _ = ops.label_tokens(q, *labelled, seq_lens)
    return *ops.decode(q, k, v, seq_lens, table, scale, softcap, None, tokens), tokens


# Where an op has no kernel of its own: the ops that it consists of, one after the other, and the slowest.
IN_PARTS = {
    "attention_with_scores": (_attention_with_scores, "attention_scores"),
    "label_tokens": (_label_tokens, "select_tokens"),
    "double_sparse_decode": (_double_sparse_decode, "select_tokens"),
}
# Devices without kernels of ours run the specification.
OTHER_DEVICES = ("XPU", "MPS", "HPU", "PrivateUse1")

# The ops that the loaded libraries have kernels for.
NATIVE: dict[str, set[str]] = {"CPU": set(), "CUDA": set()}

_registrations = torch.library.Library("fastok", "IMPL")


def load() -> None:
    """Load the libraries that this machine can use and register what serves the other devices."""
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"{CPU_LIBRARY} is missing: this is a source tree that was not built. "
            "Run `pip install --no-build-isolation -e .` (or `make build`) in it."
        )
    torch.ops.load_library(CPU_LIBRARY)
    if torch.cuda.is_available() and CUDA_LIBRARY.exists():
        torch.ops.load_library(CUDA_LIBRARY)
        NATIVE["CUDA"].update(op for op in REFERENCE if _has_kernel(op, "CUDA"))
    NATIVE["CPU"].update(op for op in REFERENCE if _has_kernel(op, "CPU"))
    for op, specification in REFERENCE.items():
        for device in ("CPU", "CUDA", *OTHER_DEVICES):
            if op in NATIVE.get(device, ()):
                continue
            if op in IN_PARTS:
                _registrations.impl(op, IN_PARTS[op][0], device)
            else:
                on_triton = device == "CUDA" and cuda_backend(op) == "triton"
                _registrations.impl(op, triton.OPS[op] if on_triton else specification, device)
    for op, function in COMPOSITE.items():
        _registrations.impl(op, function, "CompositeImplicitAutograd")


def _has_kernel(op: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastok::{op}", device))


def cuda_backend(op: str) -> str:
    """What serves ``op`` on CUDA tensors here: ``"cuda"``, ``"triton"`` or ``"reference"``."""
    if op in NATIVE["CUDA"]:
        return "cuda"
    if op in IN_PARTS:
        return cuda_backend(IN_PARTS[op][1])
    has_triton = op in triton.OPS and importlib.util.find_spec("triton") is not None
    return "triton" if has_triton else "reference"


def has_hopper_kernels() -> bool:
    """Whether the loaded CUDA library was built with kernels of its own for Hopper (sm_90a)."""
    return bool(NATIVE["CUDA"]) and bool(ctypes.CDLL(str(CUDA_LIBRARY)).fastok_has_sm90())


def attention_kernels(capability: tuple[int, int], has_hopper: bool) -> list[tuple[str, str, str]]:
    """Which kernels of the CUDA library serve which calls of attention on a device: the call, the kernels, and why.

    The same decision as csrc/attention/attention_sm90.h takes for each call (``fastok._native.attention_kernel``).
    """
    if capability != (9, 0):
        why = f"the device is sm_{capability[0]}{capability[1]}, TMA and wgmma kernels are for sm_90"
    else:
        why = "Hopper's own" if has_hopper else "built without Hopper's kernels: CUTLASS or 90a was missing"
    own = "TMA, wgmma" if capability == (9, 0) and has_hopper else "mma.sync"
    return [
        ("fp16, bf16; D 40..64, 104..128; > 64 queries; no softcap", own, why),
        ("column sums of the same, over a range of > 64 rows", own, why),
        ("other fp16 and bf16", "mma.sync", "few queries split the keys; other widths, softcaps, maxima, listed rows"),
        ("fp32", "plain arithmetic", "tensor cores do not round fp32 sums to nearest"),
        ("torch's flash or cuDNN forward", "never", "flash splits keys by the batch: bits of a row would depend on it"),
    ]


def backends() -> list[tuple[str, str, str, str]]:
    """For each op: its name, what serves CPU tensors, what serves CUDA tensors, and why the latter."""
    if not torch.cuda.is_available():
        why = "no GPU: torch.cuda.is_available() is False"
    elif CUDA_LIBRARY.exists():
        why = f"{CUDA_LIBRARY.name} was built"
    else:
        why = f"{CUDA_LIBRARY.name} was not built"
    rows = []
    for op in REFERENCE:
        backend = cuda_backend(op)
        reason = why
        if backend == "reference":
            missing = "Triton is not installed" if op in triton.OPS else "Triton has no kernel for it"
            reason = f"{why}; {missing}"
        rows.append((op, "cpu" if op in NATIVE["CPU"] else "reference", backend, reason))
    return rows
