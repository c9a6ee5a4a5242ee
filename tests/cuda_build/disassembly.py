"""What the machine code of each kernel tells: registers, memory, and the instructions that its speed hangs on."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KernelId = tuple[str, str]  # name, architecture

ARCH = re.compile(r"^arch = (sm_\w+)")
FUNCTION = re.compile(r"^\s*Function\s*:?\s+([\w.$]+)")
RESOURCES = re.compile(r"^\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")

LOCAL_MEMORY = {"LDL", "STL"}
GLOBAL_LOADS = ("LDG", "LDGSTS")
GLOBAL_STORES = ("STG",)
BULK_COPIES = {"UBLKCP", "UTMALDG", "UTMASTG"}
# Run beside the thread that issues them: how many there are tells what a loop was unrolled to.
COUNTED = {"HGMMA", "UTMALDG"}


@dataclass
class Kernel:
    """The facts about one kernel on one architecture."""

    registers: int = 0
    shared: int = 0
    """Bytes of static shared memory. From sm_90 on, with the 1 KiB that the system keeps."""
    stack: int = 0
    local: int = 0
    narrow_loads: int = 0
    narrow_stores: int = 0
    """Instructions that move less than 16 bytes per thread between global memory and elsewhere."""
    uses: set[str] = field(default_factory=set)
    """Tensor-core instructions, those that move 16 bytes or more, those on local memory."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of the instructions in COUNTED."""

    def note(self, instruction: str) -> None:
        """Take account of an instruction such as ``LDG.E.128.CONSTANT``."""
        opcode, *modifiers = instruction.split(".")
        if opcode in COUNTED:
            self.counts[opcode] = self.counts.get(opcode, 0) + 1
        width = next((m for m in modifiers if m in ("128", "256")), None)
        if opcode in LOCAL_MEMORY or opcode in BULK_COPIES or opcode.endswith("MMA"):
            self.uses.add(opcode)
        elif opcode in GLOBAL_LOADS + GLOBAL_STORES and width:
            self.uses.add(f"{opcode}.{width}")
        elif opcode in GLOBAL_LOADS:
            self.narrow_loads += 1
        elif opcode in GLOBAL_STORES:
            self.narrow_stores += 1


def find_cuobjdump(nvcc: Path) -> str | None:
    """The toolkit's, else the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    folders = [nvcc.parent]
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next((str(p) for f in folders if (p := f / "cuobjdump").exists()), None)


def read_kernels(cuobjdump: str, binary: Path) -> dict[KernelId, Kernel]:
    """Every kernel in a library or object file. One compiled into several files counts as all of them together."""
    found: dict[tuple[str, str], Kernel] = {}
    for mangled, arch, line in _lines(cuobjdump, "-res-usage", binary):
        if match := RESOURCES.match(line):
            registers, stack, shared, local = map(int, match.groups())
            kernel = found.setdefault((mangled, arch), Kernel())
            kernel.registers, kernel.stack = max(kernel.registers, registers), max(kernel.stack, stack)
            kernel.shared, kernel.local = max(kernel.shared, shared), max(kernel.local, local)
    for mangled, arch, line in _lines(cuobjdump, "-sass", binary):
        if match := INSTRUCTION.match(line):
            found[mangled, arch].note(match[1])
    names = _demangle({mangled for mangled, _ in found})
    return {(names[mangled], arch): kernel for (mangled, arch), kernel in found.items()}


def _lines(cuobjdump: str, option: str, binary: Path) -> Iterator[tuple[str, str, str]]:
    """The lines of a dump, each with the mangled kernel and the architecture that it is about."""
    arch = mangled = ""
    with subprocess.Popen([cuobjdump, option, str(binary)], stdout=subprocess.PIPE, text=True) as dump:
        assert dump.stdout
        for line in dump.stdout:
            if match := ARCH.match(line):
                arch, mangled = match[1], ""
            elif match := FUNCTION.match(line):
                mangled = match[1]
            elif mangled:
                yield mangled, arch, line
    if dump.returncode:
        raise subprocess.CalledProcessError(dump.returncode, dump.args)


def _demangle(mangled: set[str]) -> dict[str, str]:
    """Names as the source has them, without our namespaces and without parameters."""
    symbols = sorted(mangled)
    command = ["c++filt", "--no-params"]
    text = subprocess.run(command, input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"\bfastok::(cuda::)?", "", line) for line in text.splitlines()]
    assert len(set(names)) == len(names) == len(symbols), "two kernels differ in their parameters only"
    return dict(zip(symbols, names, strict=True))
