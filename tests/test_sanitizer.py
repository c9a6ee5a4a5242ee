"""Proof that `make asan` watches our kernels: a map that points out of bounds must be caught, where it would read."""

import subprocess
import sys
from pathlib import Path

import fastok
import pytest

OUT_OF_BOUNDS = """
import torch, fastok
y = torch.ones(1, 2, 64)
assign = torch.full((1, 4), {slot}, dtype=torch.int32)
print(torch.ops.fastok.unmerge(y, assign, torch.zeros(1, 3, dtype=torch.int32), assign, None).sum())
"""


@pytest.mark.parametrize(("slot", "caught"), [(1, False), (2, True)])
def test_address_sanitizer_is_on(pytestconfig: pytest.Config, slot: int, caught: bool) -> None:
    if not pytestconfig.getoption("--sanitized"):
        pytest.skip("only in `make asan`")
    assert "asan" in str(Path(fastok.__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_BOUNDS.format(slot=slot)], capture_output=True, text=True, check=False
    )
    assert ("AddressSanitizer: heap-buffer-overflow" in run.stderr) == caught, run.stderr
    assert (run.returncode != 0) == caught
