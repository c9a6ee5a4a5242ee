"""The stages of `make gpu-check` as far as a CPU goes, and how they judge what they see."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastok.testing import bench
from fastok.testing.examples import DTYPES, EXAMPLES, examples
from gpu_check import benches, compiled, device, exercise, repeats, sanitizer, suite, triton_kernels
from gpu_check.record import Record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "record.json")


# ---- stages that a CPU can run ---------------------------------------------------------------------------------------


def test_the_cpu_gives_what_the_examples_expect() -> None:
    assert exercise.main("cpu") == 0


def test_repeats_on_the_cpu(record: Record) -> None:
    repeats.run(record, "cpu", repeats=4, limit=2)
    assert record.failures == []
    assert record.summary == f"{2 * len(DTYPES)} inputs x 4 repeats stable, 0 not"


def test_repeats_notice_what_is_left_unwritten_or_changes() -> None:
    def forgets_the_last(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        y[:-1] = x[:-1]
        return y

    calls = iter(range(100))
    x = torch.randn(1 << 20)
    assert repeats.differing(lambda x: x + (next(calls) == 6), (x,), "cpu", 10) == [5]
    assert repeats.differing(lambda x: x * 2, (x,), "cpu", 10) == []
    # Freed memory comes back from the allocator, poisoned with one of two patterns; now and then it gives other memory.
    assert any(repeats.differing(forgets_the_last, (x[:64].clone(),), "cpu", 10) for _ in range(20))


def test_compile_stage_on_the_cpu(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    compiled.run(record, "cpu")
    assert record.failures == []
    models = 2 - len(record.facts.get("not_here", []))
    assert record.summary == f"{len(EXAMPLES) + models} compiled, 0 problems"


def test_a_failed_check_stops_the_rest_only_with_the_context(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise ValueError("graph break\nand a page of detail")

    assert not device.attempt(record, "merge", check)
    assert record.failures == ["merge: ValueError: graph break"]
    monkeypatch.setattr(device, "broken", lambda: "illegal memory access")
    with pytest.raises(RuntimeError, match="merge killed the CUDA context"):
        device.attempt(record, "merge", check)


def test_triton_stage_in_the_interpreter(record: Record) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU: gpu-check itself runs this")
    triton_kernels.run(record, "cpu", limit=1)
    assert record.failures == []
    assert record.summary == f"{len(DTYPES)} inputs right, 0 wrong"


def test_bench_stage_on_the_cpu(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "copy_limit", lambda device: 10.0)
    monkeypatch.setattr(bench, "gemm_limit", lambda device, dtype: 1000.0)
    monkeypatch.setattr(benches, "examples", lambda size: examples("small"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    benches.run(record, "cpu", seconds=0.01, families=["no such family"])
    assert record.failures == []
    assert [result["name"] for result in record.facts["results"]] == [example.name for example in examples("small")]
    assert all(result["gb_per_s"] > 0 and result["ratio"] > 0 for result in record.facts["results"])


def test_bench_stage_outlives_a_broken_case_and_a_broken_script(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_absent.py").write_text("import a_rival_that_is_not_installed")
    monkeypatch.setattr(benches, "ROOT", tmp_path)
    monkeypatch.setattr(benches, "examples", lambda size: list(examples("small"))[:2])
    monkeypatch.setattr(bench, "machine", lambda device: {})
    monkeypatch.setattr(bench, "header", lambda machine: "")
    monkeypatch.setattr(bench, "copy_limit", lambda device: 10.0)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def measure(case: bench.Case, *rest: Any) -> bench.Result:
        if "bipartite_match" in case.name:
            raise RuntimeError("out of memory")
        return bench.Result(case.name, case.rival_name, 1.0, 2.0, 2.0, 3.0, 0.0, 0.5, None)

    monkeypatch.setattr(bench, "measure", measure)
    benches.run(record, "cpu")
    assert len(record.facts["results"]) == 1
    assert len(record.failures) == 2
    assert "a_rival_that_is_not_installed" in record.failures[0]
    assert "out of memory" in record.failures[1]


def test_cuda_times_are_per_call_of_a_replayed_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of ours takes 10 µs and the rival's 50 µs; launching adds 100 µs. Graphs hold a call for each buffer."""
    clock = {"us": 0.0}

    class Graph:
        def __init__(self, runs: Any) -> None:
            self.runs = runs

        def replay(self) -> None:
            for run in self.runs:
                run()

    def time_us(function: Any, device: torch.device) -> float:
        clock["us"] = 0.0
        function()
        launching = 100.0 if getattr(function, "launched", False) else 0.0
        return clock["us"] + launching

    def build(us: float) -> Any:
        def run() -> None:
            clock["us"] += us

        run.launched = True
        return lambda: run

    monkeypatch.setattr(bench, "time_us", time_us)
    monkeypatch.setattr(bench, "graph_of", Graph)
    case = bench.Case("x", build(10.0), build(50.0), "y", target=5.0, target_us=9.0)
    result = bench.measure(case, torch.device("cuda"), 0.01)
    assert result.timing == "graph"
    assert result.ours_us == pytest.approx(10)
    assert result.rival_us == pytest.approx(50)
    assert (result.launched_us, result.rival_launched_us) == (110, 150)
    assert result.missed  # 5x is kept, 9 µs is not
    monkeypatch.setattr(bench, "graph_of", lambda runs: None)
    assert bench.measure(case, torch.device("cuda"), 0.01).timing == "events"


# ---- the sanitizer's judgement ---------------------------------------------------------------------------------------

FAKE_SANITIZER = """#!{python}
import subprocess, sys, time
tool, command = sys.argv[sys.argv.index("--tool") + 1], sys.argv[sys.argv.index("20") + 1:]
if command[-1] == "bug":
    sys.exit(0 if tool == "initcheck" else 86)  # initcheck is blind
if command[-1] == "clean":
    sys.exit(86 if tool == "synccheck" else 0)  # synccheck cries wolf
if tool == "racecheck":
    sys.exit(86)
sys.exit(subprocess.call(command))
"""


def test_a_tool_that_misses_its_planted_bug_is_not_trusted(record: Record, tmp_path: Path) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE_SANITIZER.format(python=sys.executable))
    fake.chmod(0o755)
    sanitizer.check_all(record, str(fake), ["true"], ["true"], 60)
    assert record.summary == "memcheck clean, racecheck found errors, synccheck not trusted, initcheck not trusted"
    assert [failure.split(":")[0] for failure in record.failures] == ["racecheck", "synccheck", "initcheck"]
    assert "planted bug: clean" in record.failures[2]
    assert [verdict["trusted"] for verdict in record.facts["verdicts"]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("compiler", "ops", "text"),
    [
        ("false", ["true"], "planted bug: did not compile"),
        ("true", ["sh", "-c", "exit 3"], "exit status 3"),
        ("true", ["sleep", "60"], "timed out"),
    ],
)
def test_nothing_but_a_clean_run_passes(
    record: Record, tmp_path: Path, compiler: str, ops: list[str], text: str
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE_SANITIZER.format(python=sys.executable))
    fake.chmod(0o755)
    sanitizer.check_all(record, str(fake), [compiler], ops, 5)
    assert len(record.failures) == 4
    assert text in record.failures[0]


def test_missing_tools_fail_the_sanitizer_stage(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: None)
    sanitizer.run(record)
    assert record.failures == ["compute-sanitizer: not found; nvcc: not found"]


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_planted_bugs_compile(tool: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    program = tmp_path / tool
    command = ["nvcc", "-arch=sm_90a", "-Werror", "all-warnings", "-o", str(program), f"{sanitizer.PLANTED / tool}.cu"]
    subprocess.run(command, check=True)
    if not torch.cuda.is_available():
        assert subprocess.run([str(program), "bug"], capture_output=True, check=False).returncode == 2


# ---- the test-suite stage --------------------------------------------------------------------------------------------


@pytest.fixture
def suite_of(tmp_path: Path, record: Record) -> Any:
    """Runs the stage, in a process of its own, on a test file; gives the record."""

    def run(code: str, *arguments: str, until: Callable[[dict[str, Any]], bool] = lambda told: False) -> dict[str, Any]:
        path = tmp_path / "test_planted.py"
        path.write_text(textwrap.dedent(code))
        given = [str(path), "--rootdir", str(tmp_path), "-p", "gpu_check.context_guard", *arguments]
        script = (
            "from pathlib import Path; from gpu_check import suite; from gpu_check.record import Record;"
            f"suite.run_pytest({given!r}, Record(Path({str(record.path)!r})))"
        )
        process = subprocess.Popen([sys.executable, "-c", script], env=environment())
        while process.poll() is None and not until(json.loads(record.path.read_text())):
            time.sleep(0.1)
        process.kill()
        process.wait()
        return json.loads(record.path.read_text())

    return run


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT / 'tests'}"}


def test_suite_counts_and_names(suite_of: Any) -> None:
    told = suite_of("""
        import pytest
        def test_good(): pass
        def test_bad(): assert 1 == 2, "one is not two"
        def test_not_here(): pytest.skip("no such thing")
    """)
    assert told["summary"] == "1 passed, 1 failed, 1 skipped"
    assert told["failures"] == ["test_planted.py::test_bad: AssertionError: one is not two"]
    assert list(told["facts"]["skipped"]) == ["Skipped: no such thing"]


def test_suite_without_a_passing_test_fails(suite_of: Any) -> None:
    told = suite_of("import a_module_that_is_not_installed")
    assert "could not be collected" in told["failures"][0]
    assert told["failures"][-1] == "no test of the CUDA layer passed"


def test_suite_remembers_what_was_running_when_it_hung(suite_of: Any) -> None:
    told = suite_of(
        "import time\ndef test_quick(): pass\ndef test_hangs(): time.sleep(100)\n",
        until=lambda told: "test_planted.py::test_hangs" in told["facts"].get("running", []),
    )
    assert told["facts"]["running"] == ["test_planted.py::test_hangs"]
    assert told["facts"]["counts"] == {"passed": 1}


DEAD_CONTEXT = """
    import pytest, gpu_check.context_guard as guard
    def test_before(): pass
    def test_kills():
        guard.broken = lambda: "an illegal memory access was encountered"
        assert False
    def test_after(): pass
"""


def test_suite_stops_at_a_dead_cuda_context(suite_of: Any) -> None:
    told = suite_of(DEAD_CONTEXT)
    assert told["facts"]["counts"]["passed"] == 1
    assert len(told["failures"]) == 1


def test_suite_replaces_a_worker_whose_cuda_context_died(suite_of: Any) -> None:
    pytest.importorskip("xdist")
    told = suite_of(DEAD_CONTEXT, "-n", "1", "--max-worker-restart=9")
    assert told["facts"]["counts"]["passed"] == 2
    assert "test_planted.py::test_kills" in told["failures"][0]


def test_suite_selects_the_cuda_layer() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", *map(str, suite.cuda_files()), "-k", suite.SELECTION]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    chosen = [line for line in run.stdout.splitlines() if "::" in line]
    assert chosen
    assert all("cuda" in line.split("::")[1] and "cuda-on-host" not in line for line in chosen)
    for op in ("bipartite", "nearest", "build_map", "merge", "merge_backward", "unmerge"):
        assert any(op in line or "exact_inputs" in line for line in chosen), op
