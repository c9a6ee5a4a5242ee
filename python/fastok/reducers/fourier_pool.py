"""Fourier-VLM (Fourier Compressor): Wang et al., "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for
Large Vision-Language Models", arXiv 2508.06038."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.checks import check_int
from ..token_map import SoftMap, TokenMap
from .common import BeforeLanguageModel, check_keep, grid_of
from .context import TokenContext

GAINS = ("ortho", "raw", "mean")


@dataclass(frozen=True)
class FourierPool(BeforeLanguageModel):
    """Shrink each frame's grid by keeping only the low frequencies of its two-dimensional cosine transform.

    Args:
        keep: the size of the smaller grid. A number of tokens of all frames together, or a fraction if below 1: the
            largest grid with about the old proportions (sides rounded down, at least 1) and no more tokens; published:
            144 of 576, and 2/3 of each side, which is 4/9. A pair is (h, w) of a frame.
        gain: how the transforms are normalised. ``"ortho"``, as published: both orthonormal, so that means grow by
            sqrt(h * w / (h' * w')); ``"raw"``: neither is, so that they grow by the square of that; ``"mean"``: means
            are preserved.

    Raises:
        TypeError: an argument of another type.
        ValueError: no token kept, an unknown ``gain``; when called, a pair that exceeds the grid.

    Needs ``grid``. Acts before the language model: behind the projector, where LLaVA's released integration acts in
    front of it (Qwen's acts behind the merger, as this). Gives a `SoftMap` whose rows may have negative weights; the
    identity where ``keep`` reaches N. Computed in fp32, any dtype; deterministic, no host synchronisation; training
    works. Costs the map's matrix, h * w * h' * w' numbers for one frame, and one product with it.
    """

    keep: float | tuple[int, int] = 144
    gain: str = "ortho"

    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        if isinstance(self.keep, tuple):
            if len(self.keep) != 2:
                raise ValueError(f"keep as a tuple must be (h, w), got {self.keep}")
            for side in self.keep:
                check_int("keep", side)
                if side < 1:
                    raise ValueError(f"keep as a tuple must be (h, w), both at least 1, got {self.keep}")
        else:
            check_keep(self.keep)
        if self.gain not in GAINS:
            raise ValueError(f"gain must be one of {', '.join(map(repr, GAINS))}; got {self.gain!r}")

    def __call__(self, ctx: TokenContext, /) -> TokenMap | SoftMap:
        """The map from the grid of the tokens behind the ``ctx.protect`` first to a smaller one."""
        t, h, w = grid_of(self, ctx)
        rows, columns = self._sides(t, h, w)
        batch, n, device = *ctx.hidden.shape[:2], ctx.hidden.device
        if rows > h or columns > w:
            raise ValueError(f"keep must be at most the grid's {(h, w)}, got {self.keep}")
        if (rows, columns) == (h, w):
            return TokenMap.identity(batch, n, device)
        frame = torch.kron(_low_pass(h, rows, device), _low_pass(w, columns, device))
        growth = math.sqrt(h * w / (rows * columns))
        frame = frame * {"ortho": 1.0, "raw": growth, "mean": 1 / growth}[self.gain]
        weights = torch.block_diag(torch.eye(ctx.protect, device=device), *[frame.float()] * t)
        return SoftMap.from_dense(weights.expand(batch, -1, -1))

    def _sides(self, t: int, h: int, w: int) -> tuple[int, int]:
        if isinstance(self.keep, tuple):
            return self.keep
        share = self.keep if isinstance(self.keep, float) else self.keep / max(t * h * w, 1)
        ratio = math.sqrt(min(share, 1.0))
        rows, columns = (min(max(int(side * ratio + 1e-9), 1), side) for side in (h, w))
        return rows, columns


def _low_pass(n: int, k: int, device: torch.device) -> Tensor:
    """fp64 ``[k,n]``: the orthonormal cosine transform of n points, its first k coefficients, and the inverse of k."""
    return _cosines(k, device).T @ _cosines(n, device)[:k]


def _cosines(n: int, device: torch.device) -> Tensor:
    """fp64 ``[n,n]``: the orthonormal DCT-II."""
    place = torch.arange(n, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi / n * place[:, None] * (place + 0.5)) * math.sqrt(2 / n)
    return torch.cat([torch.full_like(waves[:1], math.sqrt(1 / n)), waves[1:]])
