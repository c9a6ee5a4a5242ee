"""``make cuda-table``: compiles the CUDA library and writes the table of its kernels anew."""

import sys

from .compiler import BuildError, build_library, find_nvcc, nvcc_version
from .disassembly import find_cuobjdump, read_kernels
from .table import PATH, Table, local_memory

nvcc = find_nvcc()
cuobjdump = find_cuobjdump(nvcc) if nvcc else None
if nvcc is None or cuobjdump is None:
    sys.exit(f"nvcc: {nvcc}, cuobjdump: {cuobjdump}; both are needed")
try:
    library = build_library(nvcc)
except BuildError as error:
    sys.exit(str(error))
kernels = read_kernels(cuobjdump, library)
if spilled := list(local_memory(kernels)):
    sys.exit("\n".join(spilled))
Table(nvcc_version(nvcc), kernels).write(PATH)
print(f"{PATH}: {len({name for name, _ in kernels})} kernels")
