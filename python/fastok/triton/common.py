"""What the Triton ops share before they launch: tensors as the kernels read them."""

import torch
import triton
from torch import Tensor


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels read and write ``dtype``: itself, but Triton's interpreter lacks bf16."""
    return torch.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else dtype


def readable(x: Tensor) -> Tensor:
    """``x`` as kernels take it: last dimension contiguous, in its :func:`kernel_dtype`."""
    x = x.to(kernel_dtype(x.dtype))
    return x if x.stride(-1) == 1 else x.contiguous()
