"""The outcomes as one JSON file, one Markdown file, one log, and a table for the end of a terminal."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .runner import Outcome, log_text

TABLE_LINES = 40
TABLE_WIDTH = 120


class Report:
    """Everything one run found, and the files that say so."""

    def __init__(self, started: datetime, outcomes: Sequence[Outcome]) -> None:
        self.started = started
        self.outcomes = list(outcomes)

    @property
    def machine(self) -> dict[str, Any]:
        """Facts of the first stage."""
        return self.outcomes[0].facts if self.outcomes else {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """Every benchmark result."""
        return [result for outcome in self.outcomes for result in outcome.facts.get("results", [])]

    @property
    def ok(self) -> bool:
        """Whether all stages passed or are not to be had on this machine."""
        return all(outcome.ok for outcome in self.outcomes)

    @property
    def verdict(self) -> str:
        """The last word."""
        bad = [outcome.name for outcome in self.outcomes if not outcome.ok]
        if bad:
            return f"NOT all well: {', '.join(bad)}"
        return "all stages passed" if self.machine.get("gpu") else "no GPU: its stages are absent, nothing was checked"

    @property
    def name(self) -> str:
        """GPU and date, fit for a file name: ``nvidia-h200-2026-11-21``."""
        gpu = self.machine.get("gpu") or "no GPU"
        return re.sub("[^a-z0-9]+", "-", f"{gpu} {self.started:%Y-%m-%d}".lower()).strip("-")

    def write(self, folder: Path, logs: Path) -> None:
        """``<name>.json``, ``<name>.md`` and ``<name>.log`` in ``folder``; a run of the same day is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = self.machine
        content = {"started": self.started.isoformat(timespec="seconds"), "machine": machine, "ok": self.ok}
        stages = [
            {
                "name": o.name,
                "status": o.status,
                "seconds": round(o.seconds, 1),
                "summary": o.summary,
                "failures": o.failures,
                "facts": {key: value for key, value in o.facts.items() if key != "results" and o.facts != machine},
            }
            for o in self.outcomes
        ]
        content |= {"stages": stages, "results": self.results}
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(self.markdown())
        parts = (f"==== {o.name}: {o.status}\n{log_text(logs / f'{o.name}.log')}\n" for o in self.outcomes)
        (folder / f"{self.name}.log").write_text("".join(parts))

    def markdown(self) -> str:
        """The report to read."""
        machine = self.machine
        lines = [f"# fastok on {machine.get('gpu') or 'a machine without a GPU'}, {self.started:%Y-%m-%d}", ""]
        lines += ["`make gpu-check` wrote this.", ""]
        lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in machine.items()]
        rows = [[o.name, o.status, f"{o.seconds:.0f}", o.summary] for o in self.outcomes]
        lines += ["", "## Stages", "", *_markdown_table(["stage", "status", "s", "summary"], rows)]
        failures = [f"- {o.name}: {failure}" for o in self.outcomes for failure in o.failures]
        if failures:
            lines += ["", "## Failures", "", *failures]
        if self.results:
            columns = ["case", "µs", "GB/s", "GFLOP/s", "of limit", "rival", "rival µs", "ratio", "promised", "timing"]
            lines += ["", "## Times", ""]
            lines += ["Medians; ours and the rival interleaved in one process. `graph`: replays of CUDA graphs over"]
            lines += ["buffers larger than the L2 cache; `events`: single calls, launching included; `wall`: until the"]
            lines += ["call returns.", "", *_markdown_table(columns, [_times(r) for r in self.results])]
        return "\n".join(lines) + "\n"

    def table(self) -> str:
        """At most ``TABLE_LINES`` lines for a terminal."""
        lines = [f"{'stage':<11}{'status':<11}{'s':>5}  summary"]
        lines += [f"{o.name:<11}{o.status:<11}{o.seconds:>5.0f}  {o.summary}" for o in self.outcomes]
        if self.results:
            lines += ["", f"{'case':<51}{'µs':>9}{'GB/s':>7}{'of limit':>9}{'ratio':>8}  vs"]
            room = TABLE_LINES - len(lines) - 1
            # What was promised stays; of the rest, as many as there is room for.
            by_promise = sorted(self.results, key=lambda r: r["target"] is None and r["target_us"] is None)
            shown = self.results if len(self.results) <= room else by_promise[: room - 1]
            lines += [_line(result) for result in shown]
            if len(shown) < len(self.results):
                lines.append(f"and {len(self.results) - len(shown)} more in the report")
        lines.append(self.verdict)
        return "\n".join(line[:TABLE_WIDTH] for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part if part is not None else 'none'}" for key, part in value.items())
    return "none" if value is None else str(value)


def _markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _promise(result: dict[str, Any]) -> str:
    parts = [f"{result['target']:.3g}x"] if result["target"] is not None else []
    parts += [f"{result['target_us']:g} µs"] if result["target_us"] is not None else []
    return ", ".join(parts) + (" (missed)" if result["missed"] else "")


def _times(result: dict[str, Any]) -> list[str]:
    return [
        result["name"],
        f"{result['ours_us']:.1f}",
        f"{result['gb_per_s']:.0f}" if result["gb_per_s"] else "",
        f"{result['gflop_per_s']:.0f}" if result["gflop_per_s"] else "",
        f"{result['of_limit']:.0%}" if result["of_limit"] else "",
        result["rival"],
        f"{result['rival_us']:.1f}",
        f"{result['ratio']:.2f}x",
        _promise(result),
        result["timing"],
    ]


def _line(result: dict[str, Any]) -> str:
    promise = _promise(result)
    return (
        f"{result['name'][:50]:<51}{result['ours_us']:>9.1f}{result['gb_per_s']:>7.0f}{result['of_limit']:>9.0%}"
        f"{result['ratio']:>7.2f}x  {f'[{promise}] ' if promise else ''}{result['rival']}"
    )
