"""The command line and the pieces of the demo, on a tiny model and few scenes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from fastok import _library
from fastok.cli import main

demo = pytest.importorskip("fastok.demo")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the shipped one, with random weights, and narrow."""
    folder = tmp_path_factory.mktemp("model")
    transformers = demo.transformers()
    config = transformers.ViTConfig(
        image_size=112,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).half().save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.load_model, "__defaults__", (model_folder,))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.effect_noise((90, 60), 80).save(path)
    return path


def test_info_tells_the_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for op, on_cpu, on_cuda, _ in _library.backends():
        assert re.search(rf"^{op} +{on_cpu} +{on_cuda} +\w", out, re.MULTILINE)
    assert torch.__version__ in out
    assert "CPU kernels" in out
    assert "transformers" in out


def test_eval_prints_a_row_per_schedule(shipped: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--scenes", "6", "--r", "16", "16:-1", "32,8"]) == 0
    out = capsys.readouterr().out
    for schedule, tokens in (("unreduced", 197), ("r=16", 101), ("r=16:-1", 103), ("r=32,8", 157)):
        assert re.search(rf"│ {schedule} +│ +{tokens} │", out), schedule


def test_the_race_runs_each_schedule_as_often_and_leaves_the_model_alone(model_folder: Path) -> None:
    model = demo.load_model(model_folder)
    pixels = demo.digits.held_out(4).pixels.to(demo.device())
    race = demo.Race(model, [None, 8, [20]])
    logits = [race.step(pixels) for _ in range(2)]
    assert [len(seconds) for seconds in race.seconds] == [2, 2, 2]
    assert race.tokens == [197, 149, 177]
    assert race.rows()[0].speed_up == 1
    with torch.inference_mode():
        plain = model(pixels).logits
    for unreduced, *reduced in logits:
        assert torch.equal(unreduced, plain)
        assert all(not torch.equal(other, plain) for other in reduced)


def test_shapes_are_timed_unreduced_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHAPE_SECONDS", 0.0)
    with demo.Progress(disable=True) as progress:
        rows = demo.time_shape(demo.Shape("tiny", 64, 2, 2, 32, 4, 1, 1), 2, progress)
    assert [row.tokens for row in rows] == [17, 9]


@pytest.mark.parametrize("patches", [1, 7, 196, 600])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.125, 1 / 64])
def test_schedules_reach_the_ratio(patches: int, ratio: float) -> None:
    schedule = demo.schedule_to(ratio, patches, 6)
    assert len(schedule) == 6
    assert patches - sum(schedule) == round(patches * ratio)


def test_the_demo_picture_has_a_row_per_image(model_folder: Path) -> None:
    picture = demo.draw_demo(demo.load_model(model_folder), demo.sample_photo())
    assert picture.width > 4 * 448
    assert picture.height > 2 * 448


def test_viz_draws_a_photo_of_any_shape(
    shipped: None, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "tokens.png"
    assert main(["viz", str(photo), "--ratio", "0.5", "--style", "color", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > 2 * 448


def test_bench_runs_a_family_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
from fastok.testing.bench import Case

def cases(device):
    return [Case("nothing", lambda: lambda: None, lambda: lambda: None, "as little")]
"""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_idle.py").write_text(script)
    monkeypatch.setattr("fastok.cli.__file__", str(tmp_path / "python" / "fastok" / "cli.py"))
    monkeypatch.setattr("sys.path", list(sys.path))
    results, plot = tmp_path / "idle.json", tmp_path / "idle.png"
    machine = {
        "device": "x",
        "threads": 1,
        "torch": "2",
        "copy_gb_per_s": 1.0,
        "read_gb_per_s": 1.0,
        "gemm_gflop_per_s": {},
    }
    monkeypatch.setattr("fastok.testing.bench.machine", lambda device: machine)
    assert main(["bench", "idle", "--device", "cpu", "--json", str(results), "--plot", str(plot)]) == 0
    assert json.loads(results.read_text())["results"][0]["name"] == "nothing"
    assert plot.exists()
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "idle", "--device", "cpu", "--plot"]) == 0
    assert (tmp_path / "out" / "bench.png").exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", [["viz"], ["demo", "--image"]])
def test_unreadable_photos(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    for path, problem in ((tmp_path / "gone.jpg", "no such file"), (text, "not a readable picture"), (tmp_path, "not")):
        assert main([*command, str(path)]) == 2
        message = one_line(capsys)
        assert str(path) in message
        assert problem in message


def test_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo.load_model, "__defaults__", (tmp_path,))
    assert main(["eval"]) == 2
    assert "train_digit_vit.py" in one_line(capsys)


def test_unknown_family_and_missing_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_idle.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastok.cli.__file__", str(tmp_path / "elsewhere" / "python" / "fastok" / "cli.py"))
    assert main(["bench", "mege"]) == 2
    assert "'mege'; there are idle" in one_line(capsys)
    (tmp_path / "bench" / "bench_idle.py").unlink()
    assert main(["bench"]) == 2
    assert "checkout" in one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--scenes", "0"], "at least 1"),
        (["demo", "--scenes", "many"], "at least 1"),
        (["demo", "--out", "demo.txt"], "must end in .png"),
        (["viz", "x.png", "--ratio", "1.5"], "within"),
        (["viz", "x.png", "--ratio", "half"], "within"),
        (["eval", "--r", "-3"], "r must be >= 0"),
        (["eval", "--r", "many"], "16:-1"),
        (["eval", "--r", "16:2"], "inflection"),
        (["paint"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
