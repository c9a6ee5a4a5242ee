"""The one benchmark harness: rivals interleaved in one process, medians, the machine's own limits beside them.

A benchmark script (``bench/bench_<family>.py``) builds :class:`Case` objects and hands them to :func:`run`. On CUDA,
replays of CUDA graphs are timed, so that launching costs neither side anything, over buffers that together do not fit
into the L2 cache. Imports nothing else of fastok: a machine's limits can be measured without its libraries.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
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
        only_reads: hardly any of these bytes are written: they are compared with the limit of reading, not of copying.
        dtype: which GEMM limit ``flops`` is compared with.
        target: the ratio rival/ours that the project promises, if it does.
        target_us: the time of ours in µs that the project promises, if it does.
        on_host: what counts is the time until the call returns (Python and dispatch), whatever the device does then.
    """

    name: str
    ours: Callable[[], Run]
    rival: Callable[[], Run]
    rival_name: str
    bytes_moved: float = 0.0
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    target: float | None = None
    target_us: float | None = None
    on_host: bool = False
    only_reads: bool = False


@dataclass(frozen=True)
class Result:
    """What :func:`measure` found for one case; times in µs.

    ``timing`` says how: by the ``"wall"`` clock, by CUDA ``"graph"`` replays, or, where one side cannot be captured, by
    CUDA ``"events"`` around single calls, launching included. ``launched_us`` and ``rival_launched_us`` are the latter
    for every CUDA case.
    """

    name: str
    rival: str
    ours_us: float
    rival_us: float
    ratio: float
    gb_per_s: float
    gflop_per_s: float
    of_limit: float
    target: float | None
    target_us: float | None = None
    timing: str = "wall"
    launched_us: float | None = None
    rival_launched_us: float | None = None

    @property
    def missed(self) -> bool:
        """Whether a promise was not kept."""
        return (self.target is not None and self.ratio < self.target) or (
            self.target_us is not None and self.ours_us > self.target_us
        )


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


def host_us(function: Run) -> float:
    """Wall-clock µs until one call returns, with nothing queued before it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def graph_of(runs: Sequence[Run]) -> torch.cuda.CUDAGraph | None:
    """``runs`` one after the other as one CUDA graph, or None where something in them cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run_once in runs:
            run_once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for run_once in runs:
                run_once()
    except RuntimeError:
        return None
    return graph


def replays_of(runs: Sequence[Run], device: torch.device) -> tuple[Run, int] | None:
    """A function that replays ``runs`` for about a millisecond, which dwarfs a launch, and how many calls that is."""
    graph = graph_of(runs)
    if graph is None:
        return None
    once = min(time_us(graph.replay, device) for _ in range(3))
    count = min(1000, math.ceil(1000 / once))

    def replay() -> None:
        for _ in range(count):
            graph.replay()

    return replay, count * len(runs)


def interleaved(
    candidates: Sequence[Sequence[Run]], device: torch.device, seconds: float = 1.0, *, on_host: bool = False
) -> list[float]:
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
            function = runs[rounds % len(runs)]
            times[which].append(host_us(function) if on_host else time_us(function, device))
        rounds += 1
    return [statistics.median(t) for t in times]


@cache
def copy_limit(device: torch.device) -> float:
    """GB/s read plus written by a large copy, far larger than a GPU's L2 cache."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (us,) = interleaved([[lambda: target.copy_(source)]], device, 0.3)
    return 2 * source.numel() / us / 1e3


@cache
def read_limit(device: torch.device) -> float:
    """GB/s at which torch multiplies two vectors, of four pairs in turn, each far larger than caches.

    A thread that reads two stretches of memory is faster than one that sums up a single one, by up to a third.
    """
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    pairs = [torch.ones(2, size // 8, device=device) for _ in range(4)]
    (us,) = interleaved([[partial(torch.dot, *pair) for pair in pairs]], device, 0.3)
    return size / us / 1e3


@cache
def gemm_limit(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of torch's matrix product on random data: 2048³, on a GPU 8192³."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    (us,) = interleaved([[lambda: a @ a]], device, 0.3)
    return 2 * n**3 / us / 1e3


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": round(copy_limit(device), 1),
        "read_gb_per_s": round(read_limit(device), 1),
        "gemm_gflop_per_s": {
            str(dtype).removeprefix("torch."): round(gemm_limit(device, dtype))
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(cases: Sequence[Case], device: torch.device, *, seconds: float = 1.0) -> Report:
    """Measure ``cases`` one after the other, each against its rival, and print a row as soon as it is known."""
    report = Report(machine(device))
    print(header(report.machine))
    for case in cases:
        report.results.append(measure(case, device, seconds))
        print(row(report.results[-1]))
    return report


def measure(case: Case, device: torch.device, seconds: float = 1.0) -> Result:
    """One case against its rival."""
    count = _buffers(case, device)
    candidates = [[build() for _ in range(count)] for build in (case.ours, case.rival)]
    timing, launched = "wall", None
    if device.type == "cuda" and not case.on_host:
        launched = times = interleaved(candidates, device, seconds / 4)
        timing, replays = "events", [replays_of(runs, device) for runs in candidates]
        captured = [replay for replay in replays if replay is not None]
        if len(captured) == len(candidates):
            totals = interleaved([[replay] for replay, _ in captured], device, seconds)
            timing, times = "graph", [us / calls for us, (_, calls) in zip(totals, captured, strict=True)]
    else:
        times = interleaved(candidates, device, seconds, on_host=case.on_host)
    ours_us, rival_us = times
    gb_per_s, gflop_per_s = case.bytes_moved / ours_us / 1e3, case.flops / ours_us / 1e3
    of_memory = read_limit if case.only_reads else copy_limit
    limits = [gb_per_s / of_memory(device)] if case.bytes_moved else []
    if case.flops:
        limits.append(gflop_per_s / gemm_limit(device, case.dtype))
    return Result(
        case.name, case.rival_name, ours_us, rival_us, rival_us / ours_us, gb_per_s, gflop_per_s,
        max(limits, default=0.0), case.target, case.target_us, timing, *(launched or (None, None)),
    )  # fmt: skip


def _buffers(case: Case, device: torch.device) -> int:
    """How many sets of inputs: 3, on a GPU as many as together are twice its L2 cache."""
    if device.type != "cuda" or not case.bytes_moved:
        return 3
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(32, max(3, math.ceil(2 * cache / case.bytes_moved)))


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def header(machine: dict[str, Any]) -> str:
    """The head of the table that :func:`row` goes on with."""
    gemm = ", ".join(f"{dtype} {rate}" for dtype, rate in machine["gemm_gflop_per_s"].items())
    title = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n"
        f"limits measured now: copy {machine['copy_gb_per_s']} GB/s, read {machine['read_gb_per_s']} GB/s, "
        f"GEMM {gemm} GFLOP/s\n"
    )
    columns = f"{'ours µs':>10}{'rival µs':>10}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>9}  vs"
    return f"{title}{'case':<58}{columns}"


def row(r: Result) -> str:
    """One line of the table."""
    promises = [f"{r.target:g}x"] if r.target is not None else []
    promises += [f"{r.target_us:g} µs"] if r.target_us is not None else []
    target = f" (target {', '.join(promises)}{', MISSED' if r.missed else ''})" if promises else ""
    return (
        f"{r.name:<58}{r.ours_us:>10.1f}{r.rival_us:>10.1f}{r.ratio:>7.2f}x{r.gb_per_s:>8.1f}{r.gflop_per_s:>9.0f}"
        f"{r.of_limit:>8.0%}  {r.rival}{target}"
    )
