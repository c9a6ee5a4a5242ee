"""Stage 9: every op on its large examples and every benchmark of the repository, with rivals and limits beside them."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from fastok import _library
from fastok.testing import bench
from fastok.testing.examples import Arguments, Example, examples, moved, outputs
from torch import Tensor

from . import ROOT
from .record import Record, one_line

SECONDS = 0.3  # per case
MODELS = "bench_apply"  # whole models take longest: last, in case the time is up


def run(record: Record, device: str = "cuda", seconds: float = SECONDS, families: list[str] | None = None) -> None:
    target = torch.device(device)
    missed = 0
    print(bench.header(bench.machine(target)), flush=True)
    for case in cases(record, target, families):
        try:
            result = bench.measure(case, target, seconds)
        except Exception as error:  # one case or rival that cannot run leaves the others their turn
            record.fail(f"{case.name}: {one_line(error)}")
            continue
        print(bench.row(result), flush=True)
        missed += result.missed
        record.append("results", asdict(result) | {"missed": result.missed})
        record.update(f"{len(record.facts['results'])} cases, {missed} targets missed")


def cases(record: Record, device: torch.device, families: list[str] | None) -> Iterator[bench.Case]:
    """The benchmark scripts' cases, and between those of ops and those of models each op against its specification."""
    folder = ROOT / "bench"
    sys.path.insert(0, str(folder))  # the scripts share modules, such as the rivals
    scripts = [path.stem for path in sorted(folder.glob("bench_*.py"))]
    if families is not None:
        scripts = [script for script in scripts if script.removeprefix("bench_") in families]
    yield from of_scripts(record, device, [script for script in scripts if script != MODELS])
    yield from (op_case(example, device) for example in examples("large"))
    yield from of_scripts(record, device, [script for script in scripts if script == MODELS])


def of_scripts(record: Record, device: torch.device, scripts: list[str]) -> Iterator[bench.Case]:
    """The cases of benchmark scripts; one that cannot be imported or prepared is a failure of its own."""
    for script in scripts:
        try:
            yield from importlib.import_module(script).cases(device)
        except Exception as error:  # a rival's package may be missing or broken here
            record.fail(f"{script}: {one_line(error)}")


def op_case(example: Example, device: torch.device) -> bench.Case:
    """An op alone; the rival is its specification in PyTorch."""
    arguments = example.arguments(torch.float16)
    result = outputs(getattr(torch.ops.fastok, example.op)(*moved(arguments, device)))

    def call(function: Any) -> Any:
        given = moved(arguments, device)
        return lambda: function(*given)

    return bench.Case(
        example.name,
        lambda: call(getattr(torch.ops.fastok, example.op)),
        lambda: call(_library.REFERENCE[example.op]),
        "PyTorch specification",
        bytes_moved=total_bytes(arguments) + total_bytes(result),
        flops=example.flops,
        dtype=torch.float16,
    )


def total_bytes(values: Arguments) -> int:
    """Of all tensors, each read or written once."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
