"""Stage 4: compute-sanitizer's four tools on every op, each trusted only after it caught a bug planted for it.

``planted/<tool>.cu`` compiles to a program with a bug and, by another argument, without it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import ROOT
from .library import architecture
from .machine import find_tool
from .record import Record

PLANTED = Path(__file__).parent / "planted"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # compute-sanitizer's exit status when it found something
SECONDS = 140.0  # for all; the tools run side by side


@dataclass(frozen=True)
class Verdict:
    """What one tool said: of the planted bug, of the same program without it, of the ops."""

    tool: str
    bug: str
    clean: str
    ops: str

    @property
    def trusted(self) -> bool:
        return self.bug == "found errors" and self.clean == "clean"

    @property
    def text(self) -> str:
        if self.trusted:
            return self.ops
        return f"not trusted (planted bug: {self.bug}; without the bug: {self.clean}; ops: {self.ops})"


def run(record: Record) -> None:
    sanitizer, nvcc = find_tool("compute-sanitizer"), find_tool("nvcc")
    if sanitizer is None or nvcc is None:
        record.fail(f"compute-sanitizer: {sanitizer or 'not found'}; nvcc: {nvcc or 'not found'}")
        record.update("tools missing: nothing was checked")
        return
    arch = architecture(torch.cuda.get_device_capability())
    ops = [sys.executable, "-m", "gpu_check.exercise", "cuda"]
    check_all(record, sanitizer, [nvcc, f"-arch=sm_{arch}", "-lineinfo"], ops, SECONDS)


def check_all(record: Record, sanitizer: str, compiler: Sequence[str], ops: Sequence[str], seconds: float) -> None:
    """Let every tool judge its planted bug and then the command ``ops``."""
    deadline = time.monotonic() + seconds

    def judge(tool: str) -> Verdict:
        program = record.path.with_name(f"planted-{tool}")
        compiled = [*compiler, "-o", str(program), str(PLANTED / f"{tool}.cu")]
        try:
            subprocess.run(compiled, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            print(error.stderr, flush=True)
            return Verdict(tool, "did not compile", "did not compile", "not checked")
        commands = ([str(program), "bug"], [str(program), "clean"], ops)
        return Verdict(tool, *(watch(sanitizer, tool, command, deadline) for command in commands))

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for verdict in pool.map(judge, TOOLS):
            if verdict.text != "clean":
                record.fail(f"{verdict.tool}: {verdict.text}")
            record.append("verdicts", asdict(verdict) | {"trusted": verdict.trusted})
            told = record.facts["verdicts"]
            record.update(", ".join(f"{v['tool']} {v['ops'] if v['trusted'] else 'not trusted'}" for v in told))


def watch(sanitizer: str, tool: str, command: Sequence[str], deadline: float) -> str:
    """Run ``command`` under a tool: ``"clean"``, ``"found errors"``, or what went wrong."""
    watched = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--check-exit-code", "no",
        "--report-api-errors", "no", "--destroy-on-device-error", "kernel", "--print-limit", "20", *command,
    ]  # fmt: skip
    # The caching allocator would hide every access beyond a tensor inside its block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            watched, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(1.0, deadline - start), check=False,
        )  # fmt: skip
        text, ending = done.stdout, {0: "clean", FOUND: "found errors"}.get(done.returncode)
        ending = ending or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        text, ending = (expired.stdout or b"").decode(errors="replace"), "timed out"
    title = f"---- {tool}: {' '.join(command)}: {ending} after {time.monotonic() - start:.0f} s"
    print(f"{title}\n{text[-100_000:]}", flush=True)
    return ending
