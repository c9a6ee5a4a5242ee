"""Every op on its small and awkward examples in every dtype, compared with the specification: what sanitizers watch.

Inputs are made on the CPU and copied, so that the only kernels are ours and initcheck sees who wrote what.
``python -m gpu_check.exercise DEVICE``; the exit status is 3 where a result is wrong.
"""

import sys

import torch
from fastok.testing.examples import DTYPES, examples, moved, outputs, verify


def main(device: str) -> int:
    torch.set_num_threads(4)  # four tools run at once
    wrong = 0
    for example in examples("small", "awkward"):
        for dtype in DTYPES:
            print(example.name, dtype, flush=True)
            arguments = example.arguments(dtype)
            results = outputs(getattr(torch.ops.fastok, example.op)(*moved(arguments, device)))
            try:
                verify(example.op, arguments, tuple(part.cpu() for part in results))
            except AssertionError as error:
                wrong += 1
                print("WRONG:", error, flush=True)
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
