"""The CUDA library compiles without a warning for every architecture we name, GPU or not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_cuda_library_compiles_without_warnings() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    build = ROOT / "build" / "cuda"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DFASTOK_CUDA=ON", "-DFASTOK_WERROR=ON", "-DFASTOK_CUDA_ARCHS=80;90a;100",
        f"-DFASTOK_TORCH_DIR={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build), "--target", "fastok_cuda"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        assert "warning" not in run.stdout.lower()
    assert (build / "libfastok_cuda.so").stat().st_size > 0
