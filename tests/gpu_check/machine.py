"""Stage 1: what this machine is, and what its memory and matrix units give on random data."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import ROOT
from .record import Record

PACKAGES = ("triton", "numpy", "pytest", "hypothesis", "transformers", "timm")


def run(record: Record) -> None:
    record.update(
        gpu=None,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cpu=bench().cpu_name(),
        threads=torch.get_num_threads(),
        packages={name: version(name) for name in PACKAGES},
        nvcc=first_words(find_tool("nvcc"), "--version"),
        compute_sanitizer=first_words(find_tool("compute-sanitizer"), "--version"),
        driver=driver(),
    )
    if not torch.cuda.is_available():
        if record.facts["driver"] is not None:
            record.fail(f"the driver sees a GPU ({record.facts['driver']}) but torch {torch.__version__} cannot use it")
        record.update("no GPU")
        return
    properties = torch.cuda.get_device_properties(0)
    record.update(
        properties.name,
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        l2_mib=properties.L2_cache_size / 2**20,
    )
    limits = bench().machine(torch.device("cuda"))
    copy, gemm = limits["copy_gb_per_s"], limits["gemm_gflop_per_s"]
    record.update(
        f"{properties.name}: copy {copy:.0f} GB/s, bf16 GEMM {gemm['bfloat16'] / 1e3:.0f} TFLOP/s",
        copy_gb_per_s=copy,
        gemm_gflop_per_s=gemm,
    )


def bench() -> ModuleType:
    """fastok.testing.bench as a file: the package itself needs libraries that may not be built yet."""
    path = ROOT / "python" / "fastok" / "testing" / "bench.py"
    spec = importlib.util.spec_from_file_location("gpu_check_limits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the path or where the toolkit installs itself."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def output_of(command: list[str]) -> str:
    """What a command prints; empty if it cannot run, fails or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def first_words(tool: str | None, *arguments: str) -> str | None:
    """The line with the release in what a tool says about itself."""
    lines = output_of([tool, *arguments]).splitlines() if tool is not None else []
    return next((line.strip() for line in lines if "release" in line or "Version" in line), None)


def driver() -> str | None:
    """The GPUs and driver that nvidia-smi sees, whatever torch thinks."""
    tool = shutil.which("nvidia-smi")
    query: Any = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    text = output_of(query).strip() if tool is not None else ""
    return text.replace("\n", "; ") or None
