"""Which CUDA kernels serve which calls of attention: the planner, and what `fastok info` tells of it."""

import re
from typing import Any

import pytest
import torch
from fastok import _library
from fastok.cli import main

native = pytest.importorskip("fastok._native")


def forward(**changes: Any) -> str:
    call = {"capability": 90, "n_q": 577, "n_k": 577, "width": 64, "v_width": 64, "element_size": 2, "scale": 0.125}
    return native.attention_kernel(**call | {"softcap": 0.0} | changes)


def scores(**changes: Any) -> str:
    call = {"capability": 90, "n_rows": 577, "n_k": 577, "width": 64, "element_size": 2, "scale": 0.125, "softcap": 0.0}
    return native.scores_kernel(**call | {"reduce": "sum", "logits": False, "listed": False, "by_row": False} | changes)


@pytest.mark.parametrize("plan", [forward, scores])
def test_both_passes_run_on_hopper(plan: Any) -> None:
    assert plan() == "sm90"
    assert plan(n_k=1) == "sm90"
    for capability in (75, 80, 86, 89, 100, 103, 120):  # code for sm_90a runs on no other
        assert plan(capability=capability) == "mma"
    assert plan(element_size=4) == "mma"
    assert plan(softcap=30.0) == "mma"
    assert plan(n_k=0) == "mma"
    for scale in (0.0, -0.125, float("nan")):
        assert plan(scale=scale) == "mma"


def test_few_queries_split_the_keys_instead() -> None:
    assert [forward(n_q=n) for n in (1, 64, 65, 128)] == ["mma", "mma", "sm90", "sm90"]
    assert forward(n_q=-1) == "sm90"  # packed sequences of unknown lengths
    assert [scores(n_rows=n) for n in (1, 64, 65)] == ["mma", "mma", "sm90"]


def test_widths_that_waste_too_much_are_left_to_others() -> None:
    served = [width for width in range(8, 257, 8) if forward(width=width, v_width=width) == "sm90"]
    assert served == [40, 48, 56, 64, 104, 112, 120, 128]
    assert [width for width in range(8, 257, 8) if scores(width=width) == "sm90"] == served
    assert forward(width=128, v_width=40) == "sm90"
    assert forward(width=8, v_width=64) == "sm90"
    assert forward(width=64, v_width=96) == "mma"
    assert forward(width=128, v_width=256) == "mma"


def test_other_statistics_are_left_to_others() -> None:
    assert scores(reduce="max") == "mma"
    assert scores(reduce="none") == "mma"
    assert scores(logits=True) == "mma"
    assert scores(listed=True) == "mma"
    assert scores(by_row=True) == "mma"


# ---- fastok info -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "kernels", "why"),
    [
        ((9, 0), True, "TMA, wgmma", "Hopper's own"),
        ((9, 0), False, "mma.sync", "CUTLASS or 90a was missing"),
        ((8, 0), True, "mma.sync", "the device is sm_80"),
    ],
)
def test_info_tells_the_kernels(
    capability: tuple[int, int], built: bool, kernels: str, why: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_library, "cuda_backend", lambda _: "cuda")
    monkeypatch.setattr(_library, "has_hopper_kernels", lambda: built)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^fp16, bf16; .* {re.escape(kernels)} +.*{re.escape(why)}", out, re.MULTILINE)
    assert re.search(r"^torch's flash or cuDNN forward +never +flash splits keys by the batch", out, re.MULTILINE)


def test_info_says_nothing_of_kernels_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["info"]) == 0
    assert "attention on CUDA" not in capsys.readouterr().out


def test_the_widths_told_are_the_planner_s() -> None:
    told = _library.attention_kernels((9, 0), True)[0][0]
    spans = [range(int(a), int(b) + 1) for a, b in re.findall(r"(\d+)\.\.(\d+)", told)]
    for width in range(8, 257, 8):
        assert (forward(width=width, v_width=width) == "sm90") == any(width in span for span in spans)
