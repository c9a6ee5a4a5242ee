"""The command line: ``fastok info | bench | demo | eval | viz``."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _library

OPTIONAL = ("triton", "transformers", "timm", "scikit-learn", "pillow", "rich")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after a mistake of the user's, told in one line."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (OSError, ImportError) as error:
        print(f"fastok: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastok", description="Token-reduction kernels for transformers.")
    parser.add_argument("--version", action="version", version=f"fastok {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(command=command)
        return added

    add("info", info, "Show the build, this machine, and which backend serves which op.")

    bench = add("bench", run_bench, "Measure the kernels against their rivals (needs a checkout of the repository).")
    bench.add_argument("family", nargs="?", help="a bench/bench_FAMILY.py; all of them by default")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    bench.add_argument("--json", type=Path, metavar="F", help="write the results here")
    bench.add_argument(
        "--plot",
        type=_picture,
        nargs="?",
        const=Path("out/bench.png"),
        metavar="F",
        help="draw the ratios as bars here (without a name: %(const)s)",
    )

    demo = add("demo", run_demo, "Accuracy and speed with and without token merging, and a picture of the tokens.")
    demo.add_argument("--image", type=Path, metavar="F", help="a photo of yours for the picture")
    demo.add_argument("--out", type=_picture, default=Path("out/demo.png"), metavar="F", help="default: %(default)s")
    demo.add_argument("--scenes", type=_count, default=2000, metavar="N", help="held-out scenes (default: %(default)s)")

    evaluate = add("eval", run_eval, "Accuracy and speed of the shipped model under ToMe schedules of your choice.")
    evaluate.add_argument(
        "--r",
        type=_rate,
        nargs="+",
        default=[8, 16, 24],
        metavar="R",
        help="tokens merged per layer: 16; 16:-1 with inflection -1; 32,16,8 layer by layer (default: 8 16 24)",
    )
    evaluate.add_argument("--scenes", type=_count, default=2000, metavar="N", help="default: %(default)s")

    viz = add("viz", run_viz, "Draw a photo's tokens as the shipped model merges them, or a vision-language model's.")
    viz.add_argument("image", type=Path, metavar="IMAGE")
    viz.add_argument(
        "--ratio",
        type=_ratio,
        nargs="+",
        default=[0.5, 0.25, 0.125],
        metavar="P",
        help="shares of the tokens to keep (default: 0.5 0.25 0.125)",
    )
    viz.add_argument("--model", metavar="CHECKPOINT", help="a vision-language model of transformers, instead")
    viz.add_argument(
        "--reducer", default="DivPrune", metavar="R", help="of that model: 'FasterVLM(keep=64)' (default: %(default)s)"
    )
    viz.add_argument("--text", default="What is this?", help="what that model is asked (default: %(default)s)")
    viz.add_argument("--style", choices=("mean", "outline", "color"), default="mean", help="default: %(default)s")
    viz.add_argument("--out", type=_picture, default=Path("out/viz.png"), metavar="F", help="default: %(default)s")
    return parser


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return count


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 1 / 64 <= ratio <= 1:  # each of the shipped model's 6 layers can merge half at most
        raise argparse.ArgumentTypeError(f"must be within [1/64, 1], got {text!r}")
    return ratio


def _rate(text: str) -> Any:
    from .reducers import ToMe

    try:
        mean, colon, inflection = text.partition(":")
        rates = [int(part) for part in mean.split(",")]
        rate: Any = (int(mean), float(inflection)) if colon else rates if len(rates) > 1 else rates[0]
        return ToMe(rate).r
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be like 16, 16:-1 or 32,16,8; got {text!r} ({error})") from None


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}; got {text!r}")
    return path


def info(arguments: argparse.Namespace) -> None:
    """Print what is installed, how it was built and what serves which op."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("fastok", f"{__version__} in {_library.FOLDER}"),
        *_build(),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("GPU", ", ".join(gpus) or "none that torch can use"),
        *((name, _version(name)) for name in OPTIONAL),
    ]
    _print_columns(rows)
    print()
    _print_columns([("op", "on CPU", "on CUDA", "why on CUDA"), *_library.backends()])
    if gpus and _library.cuda_backend("attention") == "cuda":
        print()
        kernels = _library.attention_kernels(torch.cuda.get_device_capability(), _library.has_hopper_kernels())
        _print_columns([("attention on CUDA", "kernels", "why"), *kernels])


def _build() -> list[tuple[str, str]]:
    if importlib.util.find_spec("fastok._native") is None:
        return [("build", "unknown: fastok._native is not installed")]
    native = importlib.import_module("fastok._native")
    isas = ", ".join(native.available_isas())
    return [
        ("build", f"{native.compiler}, for torch {native.torch_built_against}"),
        ("CPU kernels", f"{native.active_isa()} in use; {isas} available"),
        ("CUDA kernels", "built" if _library.CUDA_LIBRARY.exists() else "not built"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run_bench(arguments: argparse.Namespace) -> None:
    """Run benchmark scripts of the checkout."""
    from .testing import bench

    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(_bench_folder().glob("bench_*.py"))}
    if arguments.family is not None and arguments.family not in scripts:
        raise FileNotFoundError(f"no benchmark family {arguments.family!r}; there are {', '.join(scripts)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OSError("--device cuda: torch.cuda.is_available() is False")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sys.path.insert(0, str(_bench_folder()))  # the scripts share modules, such as the rivals
    families = scripts if arguments.family is None else [arguments.family]
    cases = [case for family in families for case in importlib.import_module(f"bench_{family}").cases(device)]
    report = bench.run(cases, device)
    if arguments.json is not None:
        bench.save(report, arguments.json)
    if arguments.plot is not None:
        from . import viz

        title = f"rival's time / our time on {report.machine['device']}"
        labels = [f"{result.name} vs {result.rival}" for result in report.results]
        viz.save(viz.draw_bars(labels, [result.ratio for result in report.results], title), arguments.plot)


def _bench_folder() -> Path:
    checkout = Path(__file__).resolve().parents[2]
    for root in (checkout, Path.cwd()):
        if any((root / "bench").glob("bench_*.py")):
            return root / "bench"
    raise FileNotFoundError(f"no bench/bench_*.py in {checkout} or {Path.cwd()}: run this in a checkout of fastok")


def run_demo(arguments: argparse.Namespace) -> None:
    """The main job of ``make demo``."""
    from . import demo

    photo = demo.sample_photo() if arguments.image is None else demo.open_photo(arguments.image)
    demo.run(demo.load_model(), photo, arguments.out, arguments.scenes)


def run_eval(arguments: argparse.Namespace) -> None:
    """Print the accuracy table."""
    from . import demo

    demo.print_accuracy(demo.load_model(), arguments.r, arguments.scenes)


def run_viz(arguments: argparse.Namespace) -> None:
    """Draw a photo's merged tokens."""
    from . import demo, viz

    photo = demo.open_photo(arguments.image)
    if arguments.model is None:
        pictures = demo.draw_merged(demo.load_model(), photo, demo.photo_grid(photo), arguments.ratio, arguments.style)
    else:
        demo.transformers()  # says what to install if it is missing
        from .integrations import drawing

        try:
            reducer = drawing.reducer_of(arguments.reducer)
        except ValueError as error:
            raise OSError(f"--reducer: {error}") from None
        model, processor = drawing.load(arguments.model)
        pictures = drawing.draw(model, processor, photo, reducer, arguments.text, arguments.style)
    viz.save(viz.picture_grid(*pictures), arguments.out)
    print(f"picture: {arguments.out}")
