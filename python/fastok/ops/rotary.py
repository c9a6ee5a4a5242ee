"""Rotary position embedding of keys (or queries) on their way into a cache."""

import torch
from torch import Tensor

from .checks import ACTIVATIONS, check_dtype, check_same_device, check_shape


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """``x[B,S,H,D]`` with its first 2R channels turned by the angles ``cos, sin [S,R]`` or ``[B,S,R]``, in fp32."""
    cos, sin = (table.float().unsqueeze(-2) for table in (cos, sin))
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def check_angles(rope: tuple[Tensor, Tensor], k: Tensor) -> None:
    """``rope`` is ``(cos, sin)``, each ``[S,R]`` or ``[B,S,R]`` of ``k[B,S,G,D]``, R at most D / 2."""
    if not isinstance(rope, tuple) or len(rope) != 2:
        raise TypeError(f"rope must be None or (cos, sin), got {type(rope).__name__}")
    batch, steps, _, width = k.shape
    angles = rope[0].shape[-1] if isinstance(rope[0], Tensor) and rope[0].dim() else None
    for name, table in zip(("rope[0]", "rope[1]"), rope, strict=True):
        check_dtype(name, table, ACTIVATIONS)
        check_same_device(name, table, "k", k.device)
        lead = (batch, steps) if table.dim() == 3 else (steps,)
        check_shape(name, table, (*lead, angles), "[S,R] or [B,S,R] of k, R that of rope[0]")
    if angles is not None and 2 * angles > width:
        raise ValueError(f"rope must turn at most {width} channels, those of a head; got {2 * angles}")
