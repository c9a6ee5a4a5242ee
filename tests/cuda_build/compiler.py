"""nvcc, from the system or from PyPI, and what is built with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90a", "100")
FROM_PYPI = Path(sys.prefix) / "cuda" / "nvidia" / "cu13" / "bin" / "nvcc"  # where the Makefile puts it
CUTLASS = ROOT / ".venv" / "cutlass" / "cutlass_library" / "source" / "include"  # there too
# Fails where the compiler prints anything. A file that compiled with a remark is then compiled, and reported, again at
# the next build; warnings as errors would not do, as the assembler's remarks on lost performance are no warnings.
SILENTLY = ("sh", str(Path(__file__).parent / "silently.sh"))


class BuildError(Exception):
    """The compiler failed or printed something; the text is its output."""


def find_nvcc() -> Path | None:
    """The system's nvcc, else the one from PyPI."""
    system = shutil.which("nvcc")
    return Path(system) if system else FROM_PYPI if FROM_PYPI.exists() else None


def nvcc_version(nvcc: Path) -> str:
    """Such as ``"13.0.88"``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert version, text
    return version[1]


def build_library(nvcc: Path) -> Path:
    """``libfastok_cuda.so``, brought up to date in a folder kept between runs, one per compiler. Or BuildError."""
    folder = ROOT / "build" / "cuda" / ("pypi" if nvcc == FROM_PYPI else "system") / nvcc_version(nvcc)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DFASTOK_CUDA=ON", "-DFASTOK_WERROR=ON", "-DFASTOK_SM90=ON", f"-DFASTOK_CUDA_ARCHS={';'.join(ARCHS)}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_COMPILER_LAUNCHER={';'.join(SILENTLY)}",
        f"-DFASTOK_TORCH_DIR={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    run(configure)
    run(["cmake", "--build", str(folder), "--target", "fastok_cuda"])
    return folder / "libfastok_cuda.so"


def compile_file(nvcc: Path, source: Path, result: Path, arch: str, *options: str) -> Path:
    """One source for one architecture, held to the same silence as the library. BuildError if it fails."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    run([*SILENTLY, str(nvcc), "-std=c++20", "-O3", target, *options, "-c", str(source), "-o", str(result)])
    return result


def run(command: list[str]) -> None:
    """Run a build command. BuildError if it fails."""
    # The cmake and ninja installed next to this Python, even when its environment is not activated.
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env)
    if result.returncode:
        raise BuildError(result.stdout[-8000:])
