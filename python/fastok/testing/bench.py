"""The one benchmark harness: rivals interleaved in one process, medians, the machine's own limits beside them.

A benchmark script (``bench/bench_<family>.py``) builds :class:`Case` objects and hands them to :func:`run`.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row: our way and a rival's, on the same inputs.

    Attributes:
        name: what is measured, with its shape.
        ours, rival: each builds one set of inputs and returns the function to time. Called ``buffers`` times, so that
            rounds rotate over different memory.
        rival_name: whose code the rival is.
        bytes_moved, flops: what the work must move or compute at least, to compare with the machine's limits.
        dtype: which GEMM limit ``flops`` is compared with.
        target: the ratio rival/ours that the project promises, if it does.
    """

    name: str
    ours: Callable[[], Run]
    rival: Callable[[], Run]
    rival_name: str
    bytes_moved: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    target: float | None = None


@dataclass(frozen=True)
class Result:
    """What :func:`run` measured for one case; times in µs."""

    name: str
    rival: str
    ours_us: float
    rival_us: float
    ratio: float
    gb_per_s: float
    gflop_per_s: float
    of_limit: float
    target: float | None


@dataclass(frozen=True)
class Report:
    """All results and the machine they were taken on."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)


def time_us(function: Run, device: torch.device) -> float:
    """Wall-clock µs of one call; on CUDA, of the device's own work."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3


def interleaved(candidates: Sequence[Sequence[Run]], device: torch.device, seconds: float = 1.0) -> list[float]:
    """Median µs of each candidate. A candidate is one function per buffer; every round runs each candidate once."""
    for runs in candidates:
        for run_once in runs:
            run_once()
    times: list[list[float]] = [[] for _ in candidates]
    start, rounds = time.perf_counter(), 0
    while rounds < 7 or (time.perf_counter() - start < seconds and rounds < 2000):
        order = range(len(candidates)) if rounds % 2 == 0 else reversed(range(len(candidates)))
        for which in order:
            runs = candidates[which]
            times[which].append(time_us(runs[rounds % len(runs)], device))
        rounds += 1
    return [statistics.median(t) for t in times]


@cache
def copy_limit(device: torch.device) -> float:
    """GB/s read plus written by a large copy."""
    source = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (us,) = interleaved([[lambda: target.copy_(source)]], device, 0.3)
    return 2 * source.numel() / us / 1e3


@cache
def gemm_limit(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of torch's 2048³ matrix product."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    (us,) = interleaved([[lambda: a @ a]], device, 0.3)
    return 2 * 2048**3 / us / 1e3


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": round(copy_limit(device), 1),
        "gemm_gflop_per_s": {
            str(dtype).removeprefix("torch."): round(gemm_limit(device, dtype))
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(cases: Sequence[Case], device: torch.device, *, seconds: float = 1.0, buffers: int = 3) -> Report:
    """Measure ``cases`` one after the other, each against its rival, and print a row as soon as it is known."""
    report = Report(machine(device))
    print(_header(report.machine))
    for case in cases:
        ours = [case.ours() for _ in range(buffers)]
        rival = [case.rival() for _ in range(buffers)]
        ours_us, rival_us = interleaved([ours, rival], device, seconds)
        gb_per_s, gflop_per_s = case.bytes_moved / ours_us / 1e3, case.flops / ours_us / 1e3
        limits = [gb_per_s / copy_limit(device)] if case.bytes_moved else []
        if case.flops:
            limits.append(gflop_per_s / gemm_limit(device, case.dtype))
        result = Result(
            case.name, case.rival_name, ours_us, rival_us, rival_us / ours_us, gb_per_s, gflop_per_s,
            max(limits, default=0.0), case.target,
        )  # fmt: skip
        report.results.append(result)
        print(_row(result))
    return report


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def _header(machine: dict[str, Any]) -> str:
    gemm = ", ".join(f"{dtype} {rate}" for dtype, rate in machine["gemm_gflop_per_s"].items())
    title = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n"
        f"limits measured now: copy {machine['copy_gb_per_s']} GB/s, GEMM {gemm} GFLOP/s\n"
    )
    columns = f"{'ours µs':>10}{'rival µs':>10}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>9}  vs"
    return f"{title}{'case':<58}{columns}"


def _row(r: Result) -> str:
    target = "" if r.target is None else f" (target {r.target:g}x{'' if r.ratio >= r.target else ', MISSED'})"
    return (
        f"{r.name:<58}{r.ours_us:>10.1f}{r.rival_us:>10.1f}{r.ratio:>7.2f}x{r.gb_per_s:>8.1f}{r.gflop_per_s:>9.0f}"
        f"{r.of_limit:>8.0%}  {r.rival}{target}"
    )
