"""Stage 2: the native libraries beside the package, or, where they are missing or do not load, built for this GPU."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import ROOT
from .machine import find_tool
from .record import Record

PACKAGE = ROOT / "python" / "fastok"
LIBRARIES = ("libfastok_cpu.so", "libfastok_cuda.so")
SOURCES = ("csrc/**/*", "cmake/*", "third_party/*", "CMakeLists.txt", "python/fastok/**/*.py", "bench/**/*.py")

# One op of each library on the GPU: the libraries load, register, and hold code for it.
TRIAL = """
import torch, fastok
from fastok import _library
assert {row[2] for row in _library.backends()} == {"cuda"}, _library.backends()
x = torch.randn(1, 9, 16, device="cuda")
print(fastok.bipartite_match(x, 2).merge(x)[0].sum().item())
for row in _library.attention_kernels(torch.cuda.get_device_capability(), _library.has_hopper_kernels()):
    print(*row, sep=": ")
"""


def run(record: Record) -> None:
    record.update(sources=digest(*source_files(ROOT)))
    missing = [name for name in LIBRARIES if not (PACKAGE / name).exists()]
    problem = f"{', '.join(missing)} not built" if missing else trial()
    how = "found beside the package"
    if problem is not None:
        print(problem, "- building", flush=True)
        capability = torch.cuda.get_device_capability()
        build(capability, PACKAGE, ROOT / "build" / "gpu_check")
        how = f"built for sm_{architecture(capability)}: {problem}"
        problem = trial()
    if problem is not None:
        record.fail(problem)
    record.update(how, libraries={name: digest(PACKAGE / name) for name in LIBRARIES})


def trial() -> str | None:
    """None if the libraries serve this GPU, else why not."""
    done = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout, flush=True)
        return None
    print(done.stderr, flush=True)
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def architecture(capability: tuple[int, int]) -> str:
    """The name of a compute capability as CMake takes it; Hopper's own instructions need the ``a``."""
    return "90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}"


def build(capability: tuple[int, int], package: Path, folder: Path) -> None:
    """Compile both libraries for one GPU, without ``fastok._native``, and put them into ``package``."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc to build libfastok_cuda.so with")
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DFASTOK_CUDA=ON",
        f"-DFASTOK_CUDA_ARCHS={architecture(capability)}",
        f"-DFASTOK_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DFASTOK_TORCH_VERSION={torch.__version__}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"CUDACXX": nvcc, "PATH": tools}
    subprocess.run(configure, check=True, env=environment)
    targets = ["--target", *(name.removeprefix("lib").removesuffix(".so") for name in LIBRARIES)]
    subprocess.run(["cmake", "--build", str(folder), *targets], check=True, env=environment)
    for name in LIBRARIES:
        shutil.copy2(folder / name, package / name)


def source_files(root: Path) -> list[Path]:
    """What the measured code was made from."""
    return sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())


def digest(*paths: Path) -> str:
    """A short name of the contents of files."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()[:16]
