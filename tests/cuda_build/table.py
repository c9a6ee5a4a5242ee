"""The committed table of what each kernel may take and must use, and the comparison with what was compiled."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .disassembly import LOCAL_MEMORY, Kernel, KernelId

PATH = Path(__file__).parent / "kernels.toml"
HEADER = """\
# What every kernel takes and uses on each architecture, read from its machine code. Written by `make cuda-table`: look
# at the difference before committing it. The numbers are ceilings: registers, bytes of static shared memory (1 KiB of
# it the system's own from sm_90 on), loads from and stores to global memory of less than 16 bytes. The instructions
# listed must still be there: tensor cores (*MMA) and moves of 16 bytes or more. Of those with counts just so many.
"""
CEILINGS = ("registers", "shared", "narrow_loads", "narrow_stores")


@dataclass
class Table:
    """The kernels as they were when the table was written, and the compiler that this was read from."""

    nvcc: str
    kernels: dict[KernelId, Kernel]

    def write(self, path: Path) -> None:
        """As TOML, one line per kernel and architecture."""
        lines = [HEADER, f'nvcc = "{self.nvcc}"']
        section = ""
        for (name, arch), kernel in sorted(self.kernels.items(), key=_by_name):
            if name != section:
                section = name
                lines += ["", f'["{name}"]']
            ceilings = ", ".join(f"{name} = {getattr(kernel, name)}" for name in CEILINGS)
            uses = ", ".join(f'"{use}"' for use in sorted(kernel.uses - LOCAL_MEMORY))
            counts = ", ".join(f"{opcode} = {count}" for opcode, count in sorted(kernel.counts.items()))
            counted = f", counts = {{ {counts} }}" if counts else ""
            lines.append(f"{arch} = {{ {ceilings}, uses = [{uses}]{counted} }}")
        path.write_text("\n".join(lines) + "\n")

    @staticmethod
    def read(path: Path) -> "Table":
        """What ``write`` wrote."""
        content = tomllib.loads(path.read_text())
        nvcc = content.pop("nvcc")
        kernels = {
            (name, arch): Kernel(**row | {"uses": set(row["uses"])})
            for name, rows in content.items()
            for arch, row in rows.items()
        }
        return Table(nvcc, kernels)


def _by_name(item: tuple[KernelId, Kernel]) -> tuple[str, int]:
    (name, arch), _ = item
    return name, int("".join(c for c in arch if c.isdigit()))


# Each check yields one complaint per line.


def local_memory(kernels: dict[KernelId, Kernel]) -> Iterator[str]:
    """Registers that were spilled, and arrays that did not fit in them."""
    for (name, arch), kernel in kernels.items():
        used = sorted(kernel.uses & LOCAL_MEMORY)
        if kernel.stack or kernel.local or used:
            yield f"{name} on {arch}: {kernel.stack} bytes of stack, {kernel.local} of local memory, {used}"


def not_the_same_kernels(kernels: dict[KernelId, Kernel], table: Table) -> Iterator[str]:
    """Kernels that the table lacks, and kernels that only the table has."""
    for name, arch in sorted(kernels.keys() - table.kernels.keys()):
        yield f"{name} on {arch} is not in the table"
    for name, arch in sorted(table.kernels.keys() - kernels.keys()):
        yield f"{name} on {arch} is in the table but was not compiled"


def above_ceiling(kernels: dict[KernelId, Kernel], table: Table, resource: str) -> Iterator[str]:
    """More of one of CEILINGS than the table allows."""
    for (name, arch), kernel, listed in _pairs(kernels, table):
        now, ceiling = getattr(kernel, resource), getattr(listed, resource)
        if now > ceiling:
            yield f"{name} on {arch}: {now} {resource}, in the table {ceiling}"


def lost_instructions(kernels: dict[KernelId, Kernel], table: Table) -> Iterator[str]:
    """Wide memory accesses and tensor-core instructions that the table has and the machine code no longer."""
    for (name, arch), kernel, listed in _pairs(kernels, table):
        if lost := sorted(listed.uses - kernel.uses):
            yield f"{name} on {arch} no longer uses {', '.join(lost)}"


def other_counts(kernels: dict[KernelId, Kernel], table: Table) -> Iterator[str]:
    """More or fewer asynchronous products and copies than the table has."""
    for (name, arch), kernel, listed in _pairs(kernels, table):
        if kernel.counts != listed.counts:
            yield f"{name} on {arch}: {kernel.counts}, in the table {listed.counts}"


def _pairs(kernels: dict[KernelId, Kernel], table: Table) -> Iterator[tuple[KernelId, Kernel, Kernel]]:
    for key in sorted(kernels.keys() & table.kernels.keys()):
        yield key, kernels[key], table.kernels[key]
