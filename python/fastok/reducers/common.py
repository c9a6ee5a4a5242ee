"""What several reducers share: budgets, what a context must have, maps from choices."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..ops.checks import check_number
from ..ops.select import top_tokens
from ..token_map import TokenMap
from .context import TokenContext

T = TypeVar("T")


class BeforeLanguageModel:
    """A method that acts once, on what a vision encoder has made."""

    def reduces(self, layer: int, n_layers: int) -> bool:
        """In an encoder alone: in the last layer, and in no other."""
        return layer == n_layers - 1


# ---- budgets ---------------------------------------------------------------------------------------------------------


def check_keep(keep: float, name: str = "keep", least: int = 1) -> None:
    """Error unless ``keep`` is a fraction in (0, 1] or a number of tokens."""
    if isinstance(keep, float) and keep <= 1:
        if not keep > 0:
            raise ValueError(f"{name} must be above 0, got {keep}")
        return
    if not isinstance(keep, (int, torch.SymInt)) or isinstance(keep, bool):
        raise TypeError(f"{name} must be an int, or a fraction up to 1.0; got {type(keep).__name__} {keep!r}")
    if keep < least:
        raise ValueError(f"{name} must be at least {'one token' if least else 0}, got {keep}")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Error unless ``value`` is a number in [low, high]."""
    check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be within [{low}, {high}], got {value}")


def budget(keep: float, n: int, rounding: Callable[[float], int]) -> int:
    """How many of ``n`` tokens to keep: at least one, at most all. A fraction's product is rounded by ``rounding``."""
    return min(max(rounding(keep * n), 1) if isinstance(keep, float) else int(keep), n)


# ---- what a context has ----------------------------------------------------------------------------------------------


def given(reducer: object, value: T | None, name: str, example: str) -> T:
    """ValueError, naming the field and showing ``TokenContext(hidden=x, example)``, if ``value`` is missing."""
    if value is None:
        raise ValueError(f"{type(reducer).__name__} needs {name}: TokenContext(hidden=x, {example})")
    return value


def of_tokens(ctx: TokenContext, name: str, x: Tensor, form: str) -> Tensor:
    """``x``, which has as many dimensions as ``form`` and a row for each token, without gradient."""
    if x.dim() != form.count(",") + 1 or x.shape[:2] != ctx.hidden.shape[:2]:
        batch, n = ctx.hidden.shape[:2]
        raise ValueError(f"{name} must be {form} for hidden [B,N,C], here B={batch}, N={n}; got {list(x.shape)}")
    return x.detach()


def scores_of(reducer: object, ctx: TokenContext, name: str) -> Tensor:
    """fp32 ``[B,N]``."""
    scores = given(reducer, ctx.scores.get(name), f'scores["{name}"]', f'scores={{"{name}": s[B,N]}}')
    return of_tokens(ctx, name, scores, "[B,N]").float()


def keys_of(reducer: object, ctx: TokenContext) -> Tensor:
    """``[B,N,G,D]``."""
    return of_tokens(ctx, "keys", given(reducer, ctx.keys, "keys", "keys=k[B,N,G,D]"), "[B,N,G,D]")


def extra_of(reducer: object, ctx: TokenContext, name: str) -> Tensor:
    """A named feature, whatever its shape."""
    return given(reducer, ctx.extra.get(name), f'extra["{name}"]', f'extra={{"{name}": …}}').detach()


def vision_of(reducer: object, ctx: TokenContext) -> Tensor:
    """``[B,N,C_v]``."""
    return of_tokens(ctx, 'extra["vision"]', extra_of(reducer, ctx, "vision"), "[B,N,C_v]")


def text_of(reducer: object, ctx: TokenContext) -> Tensor:
    """``[B,m,C]``, in the space of ``hidden``."""
    text = given(reducer, ctx.text, "text", "text=t[B,m,C]")
    batch, _, width = ctx.hidden.shape
    if text.dim() != 3 or text.shape[0] not in (1, batch) or text.shape[2] != width:
        raise ValueError(f"text must be [B,m,C] or [1,m,C], here B={batch}, C={width}; got {list(text.shape)}")
    return text.detach().expand(batch, -1, -1)


def grid_of(reducer: object, ctx: TokenContext) -> tuple[int, int, int]:
    """``(t, h, w)``, which the unprotected tokens fill."""
    grid = given(reducer, ctx.grid, "grid", "grid=(t, h, w)")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or min(grid) < 0:
        raise ValueError(f"grid must be (t, h, w), none of them negative; got {grid!r}")
    t, h, w = grid
    n = ctx.hidden.shape[1] - ctx.protect
    if t * h * w != n:
        raise ValueError(f"grid must have as many places as there are unprotected tokens, {n}; got {(t, h, w)}")
    return t, h, w


def valid_of(ctx: TokenContext) -> Tensor | None:
    """bool ``[B,N]``, or None where all tokens are valid."""
    valid = ctx.extra.get("valid")
    if valid is None:
        return None
    if valid.dtype != torch.bool:
        raise TypeError(f'extra["valid"] must be bool, got {valid.dtype}')
    return of_tokens(ctx, 'extra["valid"]', valid, "[B,N]")


def crops_of(ctx: TokenContext, *, flat: bool = False) -> tuple[int, int]:
    """Rows and columns of crops; (0, 0) if the samples are not crops of one image. ``flat``: in one sample."""
    crops = ctx.extra.get("crops")
    if crops is not None and crops.shape != (2,):
        raise ValueError(f'extra["crops"] must be (rows, columns), got shape {list(crops.shape)}')
    rows, columns = (0, 0) if crops is None else crops.tolist()
    count = 1 + rows * columns
    if flat and (ctx.hidden.shape[1] - ctx.protect) % count:
        raise ValueError(f'extra["crops"]: {rows} x {columns} crops and a thumbnail of {ctx.hidden.shape[1]} tokens')
    if not flat and count > 1 and count != ctx.hidden.shape[0]:
        raise ValueError(
            f'extra["crops"]: {rows} x {columns} crops and a thumbnail are B={count} samples; got {ctx.hidden.shape[0]}'
        )
    return rows, columns


def regions(h: int, w: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """bool ``[rows * columns, h * w]``: the part of a grid that each of the crops shows."""
    row = torch.arange(h, device=device) * rows // h
    column = torch.arange(w, device=device) * columns // w
    crop = (row[:, None] * columns + column).flatten()
    return crop == torch.arange(rows * columns, device=device)[:, None]


# ---- choices ---------------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """``x`` in fp32 with its last dimension scaled to length 1; zero stays zero."""
    return torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-12)


def ranks(scores: Tensor) -> Tensor:
    """int64 ``[B,N]``: 0 for the best; ties by index, NaN last."""
    order = top_tokens(scores, scores.shape[1], order="score")
    return torch.empty_like(order).scatter(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )


def outliers(scores: Tensor, scale: float = 1.5) -> Tensor:
    """bool ``[B,N]``: scores above Q3 + ``scale`` * (Q3 - Q1), as LLaVA-PruMerge cuts them; NaN is not counted at all.

    Quartiles are interpolated linearly. Shang et al., "LLaVA-PruMerge", ICCV 2025, arXiv 2403.15388.
    """
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    q1, q3 = scores.nanquantile(torch.linspace(0.25, 0.75, 2, device=scores.device), dim=1, keepdim=True)
    return scores > q3 + scale * (q3 - q1)


def picked(index: Tensor, n: int, used: Tensor | None = None) -> Tensor:
    """bool ``[B,n]``: True at ``index[B,k]`` (different within a row), where ``used[B,k]``."""
    mask = torch.zeros(index.shape[0], n, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, torch.ones_like(index, dtype=torch.bool) if used is None else used)


def keep_where(ctx: TokenContext, mask: Tensor, capacity: int) -> TokenMap:
    """Pruning to the protected tokens and those of the unprotected where ``mask[B,N - protect]``, in their order.

    The map has ``capacity`` slots besides the protected ones. Nothing is read on the host.
    """
    mask = torch.nn.functional.pad(mask, (ctx.protect, 0), value=True)
    assign = torch.where(mask, mask.cumsum(1) - 1, -1).int()
    return TokenMap._trusted(assign, ctx.protect + capacity, mask.sum(1, dtype=torch.int32))


def farthest(ctx: TokenContext, keep: float, pick: Callable[[Tensor, int], Tensor]) -> TokenMap:
    """Pruning to the protected tokens and those that ``pick`` finds far apart, in their order.

    Args:
        keep: a budget; a fraction is of the valid tokens, and rounded to the nearest.
        pick: from ``x[B,n,C]`` and k to int64 ``[B,k]``, greedily: its first j picks are those for j. Padding is NaN.
    """
    x, valid = ctx.hidden.detach()[:, ctx.protect :], valid_of(ctx)
    batch, n = x.shape[:2]
    k = budget(keep, n, round)
    if valid is None:
        if k >= n:
            return TokenMap.identity(batch, ctx.hidden.shape[1], x.device)
        return keep_where(ctx, picked(pick(x, k), n), k)
    valid = valid[:, ctx.protect :]
    if k >= n:
        return keep_where(ctx, valid, n)
    most = valid.sum(1)
    wanted = (most.double() * keep).round().clamp(min=1) if isinstance(keep, float) else most.new_full((), k)
    used = torch.arange(k, device=x.device) < wanted.minimum(most)[:, None]
    index = pick(x.masked_fill(~valid[..., None], torch.nan), k)
    return keep_where(ctx, picked(index, n, used), k)


def keep_top(ctx: TokenContext, scores: Tensor, count: int) -> TokenMap:
    """Pruning to the protected tokens and ``count`` others with the highest of ``scores[B,N]``, in their order."""
    batch, n = scores.shape
    if count >= n - ctx.protect:
        return TokenMap.identity(batch, n, scores.device)
    index = top_tokens(scores[:, ctx.protect :], count)
    return keep_where(ctx, picked(index, n - ctx.protect), count)
