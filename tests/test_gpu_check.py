"""`make gpu-check` before there is a GPU: its runner, its report, how it comes by the libraries, the command."""

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import library, machine
from gpu_check.__main__ import SECONDS, STAGES, main
from gpu_check.record import Record
from gpu_check.report import TABLE_LINES, TABLE_WIDTH, Report
from gpu_check.runner import Outcome, Stage, run_all

ROOT = Path(__file__).parents[1]

STAGES_OF_ALL_KINDS = {
    "with_gpu": "record.update('a GPU', gpu='Tester 9000')",
    "without_gpu": "record.update('no GPU', gpu=None)",
    "good": "print('hello'); record.update('fine', answer=42)",
    "bad": "record.fail('2 is not 3'); record.update('one thing is wrong')",
    "raises": "record.update('half done'); raise ValueError('what is this')",
    "aborts": "record.update('half done'); os.abort()",
    "exits": "sys.exit(0)",
    "hangs": "record.update('half done', child=subprocess.Popen(['sleep', '600']).pid); time.sleep(600)",
}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes stages, by name, of the modules above."""
    for name, body in STAGES_OF_ALL_KINDS.items():
        code = f"import os, subprocess, sys, time\n\ndef run(record):\n    {body}\n"
        (tmp_path / f"stage_{name}.py").write_text(code)
    paths = (ROOT / "python", ROOT / "tests", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    return lambda *names: [
        Stage(name, f"stage_{name}", 4 if name == "hangs" else 90, gpu=name != names[0]) for name in names
    ]


def test_every_ending_is_told_and_none_stops_the_rest(stages: Any, tmp_path: Path) -> None:
    told: list[int] = []
    order = ("with_gpu", "raises", "aborts", "hangs", "exits", "bad", "good")
    outcomes = run_all(stages(*order), tmp_path, 60, lambda outcomes: told.append(len(outcomes)))
    assert told == [1, 2, 3, 4, 5, 6, 7]
    by_name = {outcome.name: outcome for outcome in outcomes}
    endings = {name: (outcome.status, outcome.summary) for name, outcome in by_name.items()}
    assert endings == {
        "with_gpu": ("passed", "a GPU"),
        "raises": ("crashed", "ValueError: what is this; half done"),
        "aborts": ("crashed", "by SIGABRT; half done"),
        "hangs": ("timed out", "after 4 s; half done"),
        "exits": ("crashed", "without a word"),
        "bad": ("failed", "one thing is wrong"),
        "good": ("passed", "fine"),
    }
    assert by_name["good"].facts == {"answer": 42}
    assert by_name["bad"].failures == ["2 is not 3"]
    assert "hello" in (tmp_path / "good.log").read_text()
    assert "stage_hangs.py" in (tmp_path / "hangs.log").read_text()  # where it hung
    assert [outcome.ok for outcome in outcomes] == [True] + 5 * [False] + [True]


def test_a_hanging_stage_leaves_no_process_behind(stages: Any, tmp_path: Path) -> None:
    (outcome,) = run_all(stages("hangs"), tmp_path, 60, lambda outcomes: None)
    child = outcome.facts["child"]
    for _ in range(100):  # its end takes the system a moment
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")


def test_the_deadline_cuts_a_stage_short_and_skips_the_rest(stages: Any, tmp_path: Path) -> None:
    chosen = stages("hangs", "good")
    start = time.monotonic()
    outcomes = run_all([Stage("hangs", chosen[0].module, 900, gpu=False), chosen[1]], tmp_path, 6, lambda o: None)
    assert time.monotonic() - start < 30
    assert [outcome.status for outcome in outcomes] == ["timed out", "skipped"]


def test_without_a_gpu_its_stages_are_absent(stages: Any, tmp_path: Path) -> None:
    outcomes = run_all(stages("without_gpu", "bad", "hangs"), tmp_path, 60, lambda outcomes: None)
    assert [outcome.status for outcome in outcomes] == ["passed", "absent", "absent"]
    assert all(outcome.ok for outcome in outcomes)


def test_a_failed_first_stage_is_not_an_absent_gpu(stages: Any, tmp_path: Path) -> None:
    outcomes = run_all(stages("raises", "good"), tmp_path, 60, lambda outcomes: None)
    assert [outcome.status for outcome in outcomes] == ["crashed", "skipped"]
    assert not any(outcome.ok for outcome in outcomes)


def test_the_limits_leave_every_stage_its_turn() -> None:
    assert SECONDS + 15 < 9 * 60
    assert [stage.name for stage in STAGES][:2] == ["machine", "library"]
    assert all(stage.gpu for stage in STAGES[1:])


# ---- the machine and the library -------------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "driver", lambda: "NVIDIA H200, 580.1")
    record = Record(tmp_path / "record.json")
    machine.run(record)
    assert "torch" in record.failures[0]
    assert "NVIDIA H200" in record.failures[0]
    monkeypatch.setattr(machine, "driver", lambda: None)
    record = Record(tmp_path / "record.json")
    machine.run(record)
    assert record.failures == []
    assert record.facts["gpu"] is None
    assert record.facts["torch"] == torch.__version__


def test_libraries_are_taken_as_found_or_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(capability: tuple[int, int], package: Path, folder: Path) -> None:
        built.append(capability)
        for name in library.LIBRARIES:
            (package / name).write_bytes(b"new")

    trials: list[str | None] = []
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    monkeypatch.setattr(library, "build", build)
    monkeypatch.setattr(library, "trial", lambda: trials.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def run() -> Record:
        record = Record(tmp_path / "record.json")
        library.run(record)
        return record

    trials[:] = [None]  # nothing there: built
    assert run().summary == "built for sm_90a: libfastok_cpu.so, libfastok_cuda.so not built"
    assert built == [(9, 0)]
    trials[:] = [None]  # there, and they serve
    record = run()
    assert record.summary == "found beside the package"
    assert record.facts["libraries"]["libfastok_cpu.so"] == library.digest(tmp_path / "libfastok_cpu.so")
    assert len(built) == 1
    trials[:] = ["OSError: undefined symbol", None]  # there, but of no use
    assert run().failures == []
    assert len(built) == 2
    trials[:] = ["OSError: undefined symbol", "OSError: again"]
    assert run().failures == ["OSError: again"]


def test_architectures_and_the_name_of_the_sources(tmp_path: Path) -> None:
    assert [library.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100"]
    (tmp_path / "csrc" / "merge").mkdir(parents=True)
    source = tmp_path / "csrc" / "merge" / "merge.h"
    source.write_text("int a;")
    before = library.digest(*library.source_files(tmp_path))
    assert library.digest(*library.source_files(tmp_path)) == before
    source.write_text("int b;")
    assert library.digest(*library.source_files(tmp_path)) != before
    assert ROOT / "csrc" / "fastok.cpp" in library.source_files(ROOT)


# ---- the report ------------------------------------------------------------------------------------------------------


def result(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "rival": "eager formula", "ours_us": 10.0, "rival_us": 60.0, "ratio": 6.0, "gb_per_s": 480.0,
        "gflop_per_s": 0.0, "of_limit": 0.11, "target": None, "target_us": None, "timing": "graph", "missed": False,
    } | changes  # fmt: skip


@pytest.fixture
def report() -> Report:
    facts = {"gpu": "NVIDIA H200", "torch": "2.11.0", "copy_gb_per_s": 4300.0, "packages": {"triton": "3.6.0"}}
    results = [result(f"case {i}") for i in range(60)]
    results.append(result("the promised | one", target=5.0, target_us=9.0, missed=True))
    outcomes = [
        Outcome("machine", "passed", 9, "NVIDIA H200", facts=facts),
        Outcome("tests", "failed", 70, "374 passed, 1 failed", ["test_merge[cuda]: AssertionError"]),
        Outcome("bench", "passed", 80, "61 cases, 1 targets missed " + "x" * 200, facts={"results": results}),
    ]
    return Report(datetime(2026, 11, 21, 5, 0), outcomes)


def test_the_report_is_written_in_three_files(report: Report, tmp_path: Path) -> None:
    (tmp_path / "tests.log").write_text("E   assert 1 == 2\n")
    report.write(tmp_path / "out", tmp_path)
    name = "nvidia-h200-2026-11-21"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.{e}" for e in ("json", "log", "md")]
    content = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert content["machine"]["copy_gb_per_s"] == 4300.0
    assert [stage["status"] for stage in content["stages"]] == ["passed", "failed", "passed"]
    assert content["stages"][1]["failures"] == ["test_merge[cuda]: AssertionError"]
    assert len(content["results"]) == 61
    assert not content["ok"]
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert "| tests | failed | 70 | 374 passed, 1 failed |" in text
    assert "- tests: test_merge[cuda]: AssertionError" in text
    assert "| case 3 | 10.0 | 480 |  | 11% | eager formula | 60.0 | 6.00x |  | graph |" in text
    assert "| the promised \\| one |" in text
    assert "5x, 9 µs (missed)" in text
    assert "assert 1 == 2" in (tmp_path / "out" / f"{name}.log").read_text()


def test_the_table_fits_the_end_of_a_log(report: Report) -> None:
    lines = report.table().splitlines()
    assert len(lines) <= TABLE_LINES
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert lines[-1] == "NOT all well: tests"
    assert any("the promised" in line and "missed" in line for line in lines)  # first of those that must be told
    (more,) = (line for line in lines if line.endswith("more in the report"))
    shown = sum(line.startswith(("case ", "the promised")) for line in lines) - 1  # less the heading
    assert int(more.split()[1]) == 61 - shown


def test_the_command_reports_an_absent_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = set((ROOT / "bench" / "results").iterdir())
    assert main(["--stages", "tests", "bench"]) == 0
    assert set((ROOT / "bench" / "results").iterdir()) == before  # writes only where it is told to
    assert capsys.readouterr().out.endswith("no GPU: its stages are absent, nothing was checked\n")
    assert main(["--stages", "bench", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("no-gpu-*.json")
    assert [stage["status"] for stage in json.loads(path.read_text())["stages"]] == ["passed", "absent"]
