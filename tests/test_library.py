"""The package as a whole: import cost and isolation, what serves which op, the wheel's promises about paths."""

import subprocess
import sys
from pathlib import Path

import fastok
import pytest
import torch
from fastok import _library


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_needs_nothing_optional() -> None:
    blocked = ["triton", "transformers", "timm", "torchvision", "sklearn", "PIL", "rich", "pybind11", "safetensors"]
    code = "import sys\n" + "\n".join(f"sys.modules[{name!r}] = None" for name in blocked)
    code += """
sys.modules["fastok._native"] = None
import torch, fastok
token_map = fastok.bipartite_match(torch.randn(1, 9, 4), 2)
print(token_map.merge(torch.randn(1, 9, 4))[0].shape[1])
"""
    assert python(code).strip() == "7"


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'triton', 'transformers', 'timm', 'torchvision', 'sklearn', 'PIL', 'rich', 'pytest'}"
    code = f"import torch, sys; before = set(sys.modules); import fastok; print((set(sys.modules) - before) & {heavy})"
    assert python(code).strip() == "set()"


def test_every_op_has_a_backend_and_a_reason() -> None:
    rows = _library.backends()
    assert [row[0] for row in rows] == list(_library.REFERENCE)
    for op, cpu, cuda, why in rows:
        assert cpu == "cpu"
        assert cuda in ("cuda", "triton", "reference")
        assert why
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastok::{op}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastok::{op}", "CUDA")


def test_missing_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CPU_LIBRARY", tmp_path / "libfastok_cpu.so")
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation -e \."):
        _library.load()


def test_libraries_hold_no_path_of_this_machine() -> None:
    root = str(Path(fastok.__file__).parents[2]).encode()
    packages = str(Path(torch.__file__).parent).encode()
    for library in Path(fastok.__file__).parent.glob("*.so"):
        data = library.read_bytes()
        assert root not in data, library.name
        assert packages not in data, library.name


def test_public_names_have_docstrings_and_specifications() -> None:
    for name in fastok.__all__:
        assert getattr(fastok, name).__doc__, name
    for name in ("bipartite_match", "k_center", "max_coverage", "nearest"):
        assert callable(getattr(fastok.reference, name))
