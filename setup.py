"""Builds the native libraries with CMake and ninja; everything else about the package is in pyproject.toml.

CUDA is built when nvcc is found and either a GPU is visible or FASTOK_CUDA=ON is set; FASTOK_CUDA=OFF never builds it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def build_cuda() -> bool:
    wanted = os.environ.get("FASTOK_CUDA", "AUTO").upper()
    if wanted in ("ON", "OFF"):
        return wanted == "ON"
    return shutil.which("nvcc") is not None and torch.cuda.is_available()


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        package = ROOT / "python" / "fastok" if self.editable_mode else Path(self.build_lib).resolve() / "fastok"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DFASTOK_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DFASTOK_TORCH_VERSION={torch.__version__}",
            f"-DFASTOK_CUDA={'ON' if build_cuda() else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        configure += os.environ.get("FASTOK_CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("fastok._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
