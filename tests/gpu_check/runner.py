"""Stages as processes: time limits, a deadline for all, and an honest word for every way one can end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ROOT

LOG_END = 1 << 20  # bytes of a log that are worth keeping
LEAST_SECONDS = 5.0  # a stage cannot even import torch in less


@dataclass(frozen=True)
class Stage:
    """A module with ``run(record)``, how long it may take, and whether it needs a GPU."""

    name: str
    module: str
    seconds: float
    gpu: bool = True


@dataclass
class Outcome:
    """How a stage ended: passed, failed, crashed, timed out, absent (no GPU) or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    summary: str = ""
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: passed, or not to be had on this machine."""
        return self.status in ("passed", "absent")


def run_all(
    stages: Iterable[Stage], folder: Path, seconds: float, report: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run ``stages`` in order within ``seconds`` and hand the outcomes so far to ``report`` after each.

    The first stage tells the others, by its fact ``gpu``, whether there is one.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for stage in stages:
        left = deadline - time.monotonic()
        blocked = _blocked(stage, outcomes)
        if blocked is not None:
            outcomes.append(blocked)
        elif left < LEAST_SECONDS:
            outcomes.append(Outcome(stage.name, "skipped", summary="out of time"))
        else:
            outcomes.append(execute(stage, folder, min(stage.seconds, left)))
        report(outcomes)
    return outcomes


def _blocked(stage: Stage, outcomes: list[Outcome]) -> Outcome | None:
    """The outcome of a stage that cannot run after ``outcomes``."""
    if not stage.gpu or not outcomes:
        return None
    first = outcomes[0]
    if first.facts.get("gpu") is None:
        if first.ok:
            return Outcome(stage.name, "absent", summary="no GPU")
        return Outcome(stage.name, "skipped", summary=f"stage {first.name} {first.status}")
    library = next((o for o in outcomes if o.name == "library"), None)
    if library is not None and not library.ok:
        return Outcome(stage.name, "skipped", summary=f"stage library {library.status}")
    return None


def execute(stage: Stage, folder: Path, seconds: float) -> Outcome:
    """Run one stage for at most ``seconds``; its log is ``folder/<name>.log``."""
    path = folder / f"{stage.name}.json"
    paths = [str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    command = [sys.executable, "-m", "gpu_check.stage", stage.module, str(path)]
    start = time.monotonic()
    with (folder / f"{stage.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGABRT)  # faulthandler then logs where it hangs
            time.sleep(1)
        finally:
            kill_group(process)
    outcome = _read(stage, path, time.monotonic() - start)
    if timed_out:
        outcome.status, ending = "timed out", f"after {seconds:.0f} s"
    elif process.returncode < 0:
        outcome.status, ending = "crashed", f"by {signal.Signals(-process.returncode).name}"
    elif outcome.status == "crashed":
        ending = last_line(folder / f"{stage.name}.log")
    else:
        return outcome
    outcome.summary = "; ".join(part for part in (ending, outcome.summary) if part)
    return outcome


def kill_group(process: "subprocess.Popen[Any]") -> None:
    """End a process started in a session of its own, with all it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(stage: Stage, path: Path, seconds: float) -> Outcome:
    """What the stage itself recorded; a record that was not finished is a crash."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return Outcome(stage.name, "crashed", seconds)
    status = "crashed" if not content["done"] else "failed" if content["failures"] else "passed"
    return Outcome(stage.name, status, seconds, content["summary"], content["failures"], content["facts"])


def log_text(path: Path) -> str:
    """The end of a log."""
    if not path.exists():
        return ""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - LOG_END))
        text = log.read().decode(errors="replace")
    return text if size <= LOG_END else f"[the first {size - LOG_END} bytes are left out]\n{text}"


def last_line(path: Path) -> str:
    """The last line of a log that says something: of a traceback, the exception."""
    lines = [line.strip() for line in log_text(path).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a word"
