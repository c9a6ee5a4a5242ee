"""Stage 3: the CUDA layer of the test-suite, counted test by test so that a hang or a crash loses nothing before it."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from . import ROOT
from .record import Record

TESTS = ROOT / "tests"
SELECTION = "cuda and not host"
ELSEWHERE = ("host_cuda", "cuda_build", "gpu_check")  # need no GPU, or are about this very command
WORKERS = 4


def run(record: Record) -> None:
    arguments = [*map(str, cuda_files()), "-k", SELECTION, "-p", "gpu_check.context_guard"]
    arguments += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        # One process per share of the tests: where a kernel kills its CUDA context, the others' go on.
        arguments += ["-n", str(WORKERS), "--max-worker-restart=100"]
    run_pytest(arguments, record)


def cuda_files() -> list[Path]:
    """Those that can hold a test for CUDA: a file that need not be collected need not find its packages either."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        elsewhere = any(name in str(path.relative_to(TESTS)) for name in ELSEWHERE)
        if not elsewhere and ("over_backends" in text or "cuda" in text):
            found.append(path)
    return found


def run_pytest(arguments: list[str], record: Record) -> None:
    """Run the tests and note each; none having passed is a failure too."""
    counter = Counts(record)
    pytest.main(["-rN", "-p", "no:cacheprovider", *arguments], plugins=[counter])
    counter.save()
    if counter.counts["passed"] == 0:
        record.fail("no test of the CUDA layer passed")


class Counts:
    """pytest plugin: counts outcomes and names failures in the record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.running: dict[str, None] = {}

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.running[nodeid] = None
        self.save()  # in case this is the one that hangs

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.record.fail(f"{report.nodeid}: {reason_of(report)}")
        elif report.skipped:
            self.counts["skipped"] += 1
            self.reasons[str(report.longrepr[2])] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "teardown" or report.failed:
            self.running.pop(report.nodeid, None)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.record.fail(f"{report.nodeid} could not be collected: {reason_of(report)}")

    def save(self) -> None:
        """Bring the record up to date."""
        summary = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        self.record.update(summary, counts=dict(self.counts), skipped=dict(self.reasons), running=list(self.running))


def reason_of(report: Any) -> str:
    """The first line of what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None else lines[-1])[:200] if lines else "no reason given"
