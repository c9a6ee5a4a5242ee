"""pytest plugin: ends a process whose CUDA context a kernel has killed, instead of failing all tests after it.

Under pytest-xdist another worker takes over; without it the run stops there, saying so.
"""

import os
import sys
from typing import Any

import pytest

from .device import broken


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    """After a failed test, while its report is on its way."""
    if report.when != "call" or not report.failed:
        return
    problem = broken()
    if problem is None:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        print(f"{report.nodeid} killed the CUDA context: {problem}", file=sys.__stderr__, flush=True)
        os._exit(1)
    pytest.exit(f"{report.nodeid} killed the CUDA context, the tests after it did not run: {problem}", returncode=1)
