"""Shared set-up: Triton's interpreter where there is no GPU, the CUDA-on-host harness, hypothesis, random seeds."""

import os
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import hypothesis
import pytest
from fastok.testing import register_backend

hypothesis.settings.register_profile("fastok", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fastok")

try:
    import host_cuda
except ImportError:
    pass  # not built: its tests are skipped, saying so
else:

    def on_host(op: str) -> Callable[..., Any]:
        if op == "nearest":
            return lambda x, y, k, similarity, mask: host_cuda.nearest(x, y, k, similarity=similarity, mask=mask)
        if op == "k_center":
            return host_cuda.k_center_by_all_plans
        return getattr(host_cuda, {"bipartite_match": "match_map"}.get(op, op))

    register_backend("cuda-on-host", on_host)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="the library under test was built with AddressSanitizer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
