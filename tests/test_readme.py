"""The README's Python runs as printed, and its make targets exist."""

import re
from pathlib import Path

import pytest
import torchvision_shim  # noqa: F401

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[0][:40])
def test_example_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict = {}
    exec(code, namespace)
    if "handle.stats.tokens" in code:
        assert capsys.readouterr().out.startswith("[181, 165, ")
        assert namespace["handle"].stats.tokens[-1] == 11


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets
