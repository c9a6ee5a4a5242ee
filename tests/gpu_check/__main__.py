"""``PYTHONPATH=python:tests python3 -m gpu_check [--out FOLDER] [--stages NAME …]``; ``make gpu-check`` calls it.

The exit status is 0 if every stage passed or is absent for want of a GPU, else 1.
"""

import argparse
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from . import ROOT
from .report import Report
from .runner import Outcome, Stage, log_text, run_all

SECONDS = 510.0  # for everything: leaves the nine minutes half a minute
STAGES = (  # in the order of what they are worth
    Stage("machine", "gpu_check.machine", 60, gpu=False),
    Stage("library", "gpu_check.library", 200),
    Stage("tests", "gpu_check.suite", 150),
    Stage("sanitizer", "gpu_check.sanitizer", 150),
    Stage("repeats", "gpu_check.repeats", 60),
    Stage("graphs", "gpu_check.graphs", 40),
    Stage("compile", "gpu_check.compiled", 90),
    Stage("bench", "gpu_check.benches", 100),
    Stage("triton", "gpu_check.triton_kernels", 90),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results, on a machine with a GPU")
    names = [stage.name for stage in STAGES[1:]]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)g)")
    options = parser.parse_args(arguments)
    started = datetime.now()
    chosen = [stage for stage in STAGES if stage is STAGES[0] or stage.name in options.stages]

    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)

        def tell(outcomes: list[Outcome]) -> None:
            last = outcomes[-1]
            print(f"{last.name}: {last.status} ({last.seconds:.0f} s) {last.summary}", flush=True)
            if not last.ok:
                print("\n".join(log_text(logs / f"{last.name}.log").splitlines()[-20:]), flush=True)
            report = Report(started, outcomes)
            out = options.out or (ROOT / "bench" / "results" if report.machine.get("gpu") else None)
            if out is not None:  # after every stage: a run that is cut off has reported what it got to
                report.write(out, logs)

        report = Report(started, run_all(chosen, logs, options.seconds, tell))
    print(f"\n{report.table()}", flush=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
