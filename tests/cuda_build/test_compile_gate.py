"""Every CUDA source compiles without a remark for sm_80, sm_90a and sm_100, to machine code as good as the table's."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_build import compiler, table
from cuda_build.disassembly import Kernel, KernelId, find_cuobjdump, read_kernels

PLANTED = Path(__file__).parent / "planted"
ONE_ARCHITECTURE = "sm90::"
REMEDY = "If that is meant, run `make cuda-table`, and review and commit the difference."


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = compiler.find_nvcc()
    if found is None:
        pytest.skip(f"no nvcc on PATH, and `make test` did not get PyPI's ({compiler.FROM_PYPI})")
    return found


@pytest.fixture(scope="module")
def cuobjdump(nvcc: Path) -> str:
    found = find_cuobjdump(nvcc)
    if found is None:
        pytest.skip("no cuobjdump: neither on PATH, nor beside nvcc, nor in Triton's package")
    return found


@pytest.fixture(scope="module")
def library(nvcc: Path) -> Path:
    return compiler.build_library(nvcc)


@pytest.fixture(scope="module")
def kernels(cuobjdump: str, library: Path) -> dict[KernelId, Kernel]:
    return read_kernels(cuobjdump, library)


@pytest.fixture(scope="module")
def committed() -> table.Table:
    return table.Table.read(table.PATH)


def accept_no(complaints: Iterator[str], remedy: str = "") -> None:
    if lines := list(complaints):
        pytest.fail("\n".join([*lines, remedy]), pytrace=False)


# ---- the library ---------------------------------------------------------------------------------------------------


def test_every_source_is_compiled(library: Path) -> None:
    rules = (library.parent / "build.ninja").read_text()
    sources = [str(path.relative_to(compiler.ROOT)) for path in (compiler.ROOT / "csrc").rglob("*.cu")]
    assert sources
    assert [source for source in sources if f"{source}.o: CUDA_COMPILER" not in rules] == []


def test_every_architecture_has_every_kernel(kernels: dict[KernelId, Kernel]) -> None:
    archs = {f"sm_{arch}" for arch in compiler.ARCHS}
    for name in {name for name, _ in kernels}:
        wanted = {"sm_90a"} if name.startswith(ONE_ARCHITECTURE) else archs
        assert {arch for other, arch in kernels if other == name} == wanted, name


def test_hopper_has_its_own_kernels(kernels: dict[KernelId, Kernel]) -> None:
    """Each reads tiles by TMA and multiplies them by wgmma; that these are not serialized the build has told."""
    own = {name: kernel for (name, _), kernel in kernels.items() if name.startswith(ONE_ARCHITECTURE)}
    assert len(own) == 8
    for name, kernel in own.items():
        assert kernel.counts.keys() == {"HGMMA", "UTMALDG"}, name
        assert "HMMA" not in kernel.uses, name


def test_kernels_for_clusters_are_empty_only_where_there_are_none(kernels: dict[KernelId, Kernel]) -> None:
    own = {name for name, _ in kernels if name.startswith("cluster_kernel<")}
    assert len(own) == 12
    for name in own:
        assert [kernels[name, arch].narrow_stores > 0 for arch in ("sm_80", "sm_90a", "sm_100")] == [False, True, True]


def test_the_driver_is_not_linked(library: Path) -> None:
    """The library loads where there is no driver, and asks for what it needs of it when it runs."""
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|nvrtc)\.", name)]
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert not re.search(r"\bcu[A-Z]\w+", symbols.stdout)


def test_table_has_the_same_kernels(kernels: dict[KernelId, Kernel], committed: table.Table) -> None:
    accept_no(table.not_the_same_kernels(kernels, committed), REMEDY)


def test_no_spills_and_no_stack(kernels: dict[KernelId, Kernel]) -> None:
    accept_no(table.local_memory(kernels))


@pytest.mark.parametrize("resource", table.CEILINGS)
def test_ceilings(nvcc: Path, kernels: dict[KernelId, Kernel], committed: table.Table, resource: str) -> None:
    if resource != "shared" and (version := compiler.nvcc_version(nvcc)) != committed.nvcc:
        pytest.skip(f"{resource} in the table are those of nvcc {committed.nvcc}, this is {version}")
    accept_no(table.above_ceiling(kernels, committed, resource), REMEDY)


def test_wide_accesses_and_tensor_cores(kernels: dict[KernelId, Kernel], committed: table.Table) -> None:
    assert any("HMMA" in kernel.uses for kernel in committed.kernels.values())
    accept_no(table.lost_instructions(kernels, committed), REMEDY)


def test_asynchronous_instructions(kernels: dict[KernelId, Kernel], committed: table.Table) -> None:
    accept_no(table.other_counts(kernels, committed), REMEDY)


def test_table_is_of_the_compiler_that_pypi_gives(committed: table.Table) -> None:
    pins = (compiler.ROOT / "requirements" / "cuda.txt").read_text()
    assert f"nvidia-cuda-nvcc=={committed.nvcc}\n" in pins


# ---- that the gate can fail ----------------------------------------------------------------------------------------


def test_warning_is_caught(nvcc: Path, tmp_path: Path) -> None:
    with pytest.raises(compiler.BuildError, match="#177-D"):
        compiler.compile_file(nvcc, PLANTED / "warning.cu", tmp_path / "warning.o", "80")


def test_serialized_wgmma_is_caught(nvcc: Path, tmp_path: Path) -> None:
    with pytest.raises(compiler.BuildError, match=r"\(C75\d\d\) Potential Performance Loss: wgmma.* are serialized"):
        compiler.compile_file(nvcc, PLANTED / "serialized_wgmma.cu", tmp_path / "wgmma.o", "90a")


def test_remark_is_caught_again_at_the_next_build(tmp_path: Path) -> None:
    """A file that compiled with a remark must not be taken for up to date."""
    command = f"{' '.join(compiler.SILENTLY)} sh -c 'echo remark; touch $out'"
    (tmp_path / "build.ninja").write_text(f"rule compile\n  command = {command}\nbuild object: compile\n")
    for _ in range(2):
        with pytest.raises(compiler.BuildError, match="remark"):
            compiler.run(["ninja", "-C", str(tmp_path)])


def test_spills_and_arrays_in_local_memory_are_caught(nvcc: Path, cuobjdump: str, tmp_path: Path) -> None:
    binary = compiler.compile_file(nvcc, PLANTED / "local_memory.cu", tmp_path / "local_memory.o", "80")
    spills, indexes = sorted(table.local_memory(read_kernels(cuobjdump, binary)), reverse=True)
    assert re.match(r"spills on sm_80: [1-9]\d* bytes of stack.*'LDL', 'STL'", spills)
    assert re.match(r"indexes on sm_80: 64 bytes of stack.*'LDL', 'STL'", indexes)


@pytest.fixture(scope="module")
def copies(nvcc: Path, cuobjdump: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[KernelId, Kernel]]:
    """The same kernel by 16 and by 4 bytes."""
    folder = tmp_path_factory.mktemp("copies")
    return [
        read_kernels(
            cuobjdump, compiler.compile_file(nvcc, PLANTED / "copy.cu", folder / vector, "80", f"-DVECTOR={vector}")
        )
        for vector in ("float4", "float")
    ]


def test_lost_wide_loads_are_caught(copies: list[dict[KernelId, Kernel]], tmp_path: Path) -> None:
    wide, narrow = copies
    table.Table("13.0.88", wide).write(tmp_path / "table.toml")
    written = table.Table.read(tmp_path / "table.toml")
    assert written == table.Table("13.0.88", wide)
    assert written.kernels["copy", "sm_80"].uses == {"LDG.128", "STG.128"}
    assert list(table.lost_instructions(wide, written)) == []
    assert list(table.lost_instructions(narrow, written)) == ["copy on sm_80 no longer uses LDG.128, STG.128"]
    for what in ("narrow_loads", "narrow_stores"):
        assert list(table.above_ceiling(narrow, written, what)) == [f"copy on sm_80: 1 {what}, in the table 0"]


@pytest.mark.parametrize("resource", table.CEILINGS)
def test_growth_is_caught(copies: list[dict[KernelId, Kernel]], resource: str) -> None:
    wide, _ = copies
    kernel = wide["copy", "sm_80"]
    now = getattr(kernel, resource)
    tight = table.Table("", {("copy", "sm_80"): replace(kernel, **{resource: now - 1})})
    assert list(table.above_ceiling(wide, table.Table("", wide), resource)) == []
    assert list(table.above_ceiling(wide, tight, resource)) == [
        f"copy on sm_80: {now} {resource}, in the table {now - 1}"
    ]


def test_new_and_missing_kernels_are_caught(copies: list[dict[KernelId, Kernel]]) -> None:
    wide, _ = copies
    assert list(table.not_the_same_kernels(wide, table.Table("", wide))) == []
    other = table.Table("", {("copy", "sm_90a"): Kernel()})
    assert list(table.not_the_same_kernels(wide, other)) == [
        "copy on sm_80 is not in the table",
        "copy on sm_90a is in the table but was not compiled",
    ]


def test_complaints_fail_and_say_what_to_run() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)a kernel.*make cuda-table"):
        accept_no(iter(["a kernel"]), REMEDY)
