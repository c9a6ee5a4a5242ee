"""What a detector found, with addresses turned into places in the source."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


class KernelError(RuntimeError):
    """A kernel did what it may not: the message names the accesses, threads, arrays and how to run it again."""


def locate(text: str, module: Path) -> str:
    """``text`` with <+address> as file, line, function and their callers, and <@address> as the name of a kernel."""

    def place(match: re.Match[str]) -> str:
        return f"\n{' ' * 15}".join(f"{where} in {function}" for function, where in _frames(int(match[1]), module)[:5])

    def kernel(match: re.Match[str]) -> str:
        return _frames(int(match[1]), module)[0][0]

    for pattern, found in ((r"<\+(\d+)>", place), (r"<@(\d+)>", kernel)):
        text = re.sub(pattern, _or_as_it_is(found), text)
    return text.replace(f"{ROOT}/", "")


def _or_as_it_is(found: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
    def call(match: re.Match[str]) -> str:
        try:
            return found(match)
        except (OSError, subprocess.CalledProcessError):  # no addr2line: addresses stay
            return match[0]

    return call


def _frames(address: int, module: Path) -> list[tuple[str, str]]:
    """Function and file:line of an address and of what it is inlined into, innermost first."""
    command = ["addr2line", "-ifCe", str(module), hex(address)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    frames = []
    for function, place in zip(lines[::2], lines[1::2], strict=True):
        path, _, line = place.partition(" (discriminator")[0].rpartition(":")
        # The intrinsics' own inline parts say nothing.
        if "/tests/host_cuda/intrinsics.h" not in path:
            frames.append((_short(function), f"{Path(path).resolve()}:{line}"))
    return frames or [("?", "?")]


def _short(function: str) -> str:
    """A demangled name without return type, namespaces and parameters."""
    depth, name = 0, ""
    for character in function:
        if character == "(" and depth == 0:
            break
        depth += (character == "<") - (character == ">")
        name = "" if character == " " and depth == 0 else name + character
    return re.sub(r"\b\w+::", "", name)
