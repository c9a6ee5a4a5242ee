"""What our code takes Hopper's instructions to do, held against CuTe's layouts by a program that runs on the host."""

import subprocess
from pathlib import Path

import pytest

from cuda_build import compiler


def test_tiles_descriptors_and_fragments_are_as_cute_has_them(tmp_path: Path) -> None:
    nvcc = compiler.find_nvcc()
    if nvcc is None:
        pytest.skip(f"no nvcc on PATH, and `make test` did not get PyPI's ({compiler.FROM_PYPI})")
    if not compiler.CUTLASS.exists():
        pytest.skip(f"{compiler.CUTLASS} is missing: `make test` gets it")
    program = tmp_path / "layouts"
    source = Path(__file__).parent / "hopper_layouts.cu"
    options = ("-std=c++20", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")
    includes = ("-I", str(compiler.ROOT / "csrc"), "-isystem", str(compiler.CUTLASS))
    compiler.run([str(nvcc), *options, *includes, str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    # CuTe complains on the host that it knows no shared addresses, and takes them for 0.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("ERROR: cast_smem_ptr_to_uint")]
    assert lines == ["0 differences"]
    assert done.returncode == 0
