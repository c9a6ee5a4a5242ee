"""``max_coverage``: checks and fake kernel; the kernels are in csrc/max_coverage."""

import torch
from torch import Tensor

from .checks import ACTIVATIONS, check_dtype, check_int, check_same_device, check_shape


def max_coverage(
    similarity: Tensor | tuple[Tensor, Tensor], k: int, *, modular: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy facility location: each pick is the token that adds most to what the picks cover.

    The coverage of row r starts at 0 and is then the largest similarity of r to a pick, so negative similarities never
    cover. A token's gain is the sum over rows of what it would add, plus its ``modular`` term.

    Args:
        similarity: ``[B,R,N]`` fp32, fp16 or bf16, of R rows to N tokens; or a pair ``(y[B,R,D], x[B,N,D])`` of one
            dtype, compared by cosine, with R x N numbers in memory only if they fit a budget. Any strides.
        k: how many tokens to pick, from 0 to N.
        modular: fp32 ``[B,N]``, added to a token's gain (CATP's alignment term).

    Returns:
        ``index`` int64 ``[B,k]`` in pick order and ``gain`` fp32 ``[B,k]``, each pick's gain when it was picked.

    Raises:
        TypeError: a dtype that is not listed, ``similarity`` neither a tensor nor a pair of them, ``k`` not an int.
        ValueError: ``k`` outside [0, N], shapes or devices that do not fit.

    Ties go to the lowest index. A NaN similarity makes its token's gains NaN (a NaN row of y, everyone's): NaN never
    wins, and tokens whose gain is NaN come last, in ascending order. Sums are exact (``fastok.reference.max_coverage``
    says how), so picks and gains are the same bits on every backend, with any number of threads and in any batch. Exact
    gains are re-evaluated lazily: a gain never grows. Not differentiable. No host synchronisation on CUDA. MMTok, Dong
    et al., ICLR 2026; CATP, AAAI 2026; lazy evaluation, Minoux, 1978.
    """
    matrix: Tensor | None = None
    y: Tensor | None = None
    x: Tensor | None = None
    if isinstance(similarity, Tensor):
        check_dtype("similarity", similarity, ACTIVATIONS)
        if similarity.dim() != 3:
            raise ValueError(f"similarity must be [B,R,N], got shape {list(similarity.shape)}")
        like = matrix = similarity.detach()
        n = similarity.shape[2]
    else:
        if not isinstance(similarity, tuple) or len(similarity) != 2:
            raise TypeError(f"similarity must be a tensor or a pair (y, x), got {type(similarity).__name__}")
        y, x = similarity
        check_dtype("similarity's x", x, ACTIVATIONS)
        check_dtype("similarity's y", y, (x.dtype,))
        y, x = y.detach(), x.detach()
        if x.dim() != 3:
            raise ValueError(f"similarity's x must be [B,N,D], got shape {list(x.shape)}")
        check_shape("similarity's y", y, (x.shape[0], None, x.shape[2]), "[B,R,D] to go with x")
        check_same_device("similarity's y", y, "similarity's x", x.device)
        like = x
        n = x.shape[1]
    check_int("k", k)
    if not 0 <= k <= n:
        raise ValueError(f"k must be within [0, N={n}], got {k}")
    if modular is not None:
        check_dtype("modular", modular, (torch.float32,))
        check_shape("modular", modular, (like.shape[0], n), "[B,N] of similarity")
        check_same_device("modular", modular, "similarity", like.device)
        modular = modular.detach()
    return torch.ops.fastok.max_coverage(matrix, y, x, k, modular)


@torch.library.register_fake("fastok::max_coverage")
def _max_coverage_fake(
    similarity: Tensor | None, y: Tensor | None, x: Tensor | None, k: int, modular: Tensor | None
) -> tuple[Tensor, Tensor]:
    like = similarity if similarity is not None else x
    assert like is not None
    shape = (like.shape[0], k)
    return like.new_empty(shape, dtype=torch.int64), like.new_empty(shape, dtype=torch.float32)
