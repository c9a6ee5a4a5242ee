"""Shared set-up: Triton's interpreter where there is no GPU, the CUDA-on-host harness where it was built, hypothesis."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import hypothesis
import pytest

hypothesis.settings.register_profile("fastok", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fastok")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="the library under test was built with AddressSanitizer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
