"""The package as a whole: import cost and isolation, what serves which op, the wheel's promises about paths."""

import inspect
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


def test_pictures_are_there_once_asked_for() -> None:
    pytest.importorskip("PIL")
    assert python("import fastok; print(fastok.viz.draw_tokens.__name__)").strip() == "draw_tokens"


def test_the_command_without_its_script() -> None:
    for arguments, out in (["--version"], f"fastok {fastok.__version__}"), (["viz", "none.png"], ""):
        command = [sys.executable, "-m", "fastok", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == (0 if out else 2), run.stderr
        assert run.stdout.strip() == out


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
    functions = {
        name: getattr(module, name)
        for module in (fastok, fastok.sparse)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    for name in functions.keys() - {"apply", "calibrate", "register_transformers", "retrieval_heads"}:  # of models
        specification = getattr(fastok.reference, name)
        assert inspect.isfunction(specification), name
        own, public = (
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (specification, functions[name])
        )
        assert own == public, name


def test_specifications_are_called_as_the_public_functions() -> None:
    q, k = torch.randn(2, 5, 4, 32), torch.randn(2, 300, 2, 32)
    reference, masking = fastok.reference, {"causal": True, "softcap": 3.0}
    out, lse, (scores,) = reference.attention_with_scores(q, k, k, scores=(fastok.ScoreSpec(pool=3),), **masking)
    own = fastok.attention(q, k, k, **masking)
    torch.testing.assert_close(fastok.attention_scores(q, k, spec=fastok.ScoreSpec(pool=3), **masking), scores)
    for wanted, got in zip((out, lse), own, strict=True):
        torch.testing.assert_close(got, wanted)
    cache = reference.kv_pack(k, k, "vidkv-1.5/1.58")
    assert torch.equal(cache.data, fastok.kv_pack(k, k, "vidkv-1.5/1.58").data)
    for wanted, got in zip(reference.attention_decode(q, cache), fastok.attention_decode(q, cache), strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="q must have at most 16 rows"):
        reference.attention_decode(k.repeat_interleave(2, 2), cache)
