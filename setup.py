"""Builds the native libraries with CMake and ninja; everything else about the package is in pyproject.toml.

CUDA is built when nvcc is found and either a GPU is visible or FASTOK_CUDA=ON is set; FASTOK_CUDA=OFF never builds it.
FASTOK_CMAKE_ARGS passes further options to CMake.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def build_cuda() -> bool:
    wanted = os.environ.get("FASTOK_CUDA", "AUTO").upper()
    if wanted in ("ON", "OFF"):
        return wanted == "ON"
    return shutil.which("nvcc") is not None and torch.cuda.is_available()


class CMakeBuild(build_ext):
    def run(self) -> None:
        # The cmake and ninja installed next to this Python, even when its environment is not activated.
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
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
            *os.environ.get("FASTOK_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True, env=env)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("fastok._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
