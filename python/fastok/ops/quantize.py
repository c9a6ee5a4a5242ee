"""``kv_seal`` and ``kv_unseal``, what packed caches are written and unpacked with: checks and fake kernels.

Kernels are in csrc/quantize, the public face in fastok.caches.
"""

import torch
from torch import Tensor

from .checks import ACTIVATIONS, check_dtype, check_range, check_same_device, check_shape


def check_keys_values(k: Tensor, v: Tensor) -> None:
    """``k`` and ``v`` are ``[B,T,G,D]`` of one dtype on one device."""
    check_dtype("k", k, ACTIVATIONS)
    check_dtype("v", v, (k.dtype,))
    check_shape("k", k, (None, None, None, None), "[B,T,G,D]")
    check_shape("v", v, (*k.shape[:3], None), "that of k")
    if k.shape[3] != v.shape[3]:
        raise NotImplementedError(
            f"v: required, {v.shape[3]} channels beside {k.shape[3]} of k; supported, equally many; "
            "missing, a width of its own (pad the narrower with zeros, which change no result)"
        )
    check_same_device("v", v, "k", k.device)
    if k.shape[3] % 8 or not 32 <= k.shape[3] <= 256:
        raise ValueError(f"k must have a head dim that is a multiple of 8 from 32 to 256, got {k.shape[3]}")


def check_marks(salient: Tensor, two_classes: bool) -> None:
    """``salient`` goes with a format of two classes and is bool."""
    if not two_classes:
        raise ValueError("salient must be None for a format with one class of tokens (no code with low_bits)")
    check_dtype("salient", salient, (torch.bool,))


def check_salient(salient: Tensor, two_classes: bool, k: Tensor) -> None:
    """``salient`` goes with a format of two classes and is bool ``[B,G,T]``."""
    check_marks(salient, two_classes)
    check_shape("salient", salient, (k.shape[0], k.shape[2], k.shape[1]), "[B,G,T] of k")
    check_same_device("salient", salient, "k", k.device)


def check_lengths(seq_lens: Tensor, k: Tensor) -> None:
    """``seq_lens`` is integer ``[B]`` within [0, T]."""
    check_shape("seq_lens", seq_lens, (k.shape[0],), "[B] of k")
    if seq_lens.device.type == "meta":
        raise ValueError("seq_lens must be on a device where its values can be read, got meta")
    check_range("seq_lens", seq_lens, 0, k.shape[1] + 1)


def check_appended(k: Tensor, hot: Tensor) -> None:
    """``k`` has the heads, the width and the dtype of the cache's window ``hot[B,G,W,D]``."""
    check_dtype("k", k, (hot.dtype,))
    batch, groups, _, width = hot.shape
    check_shape("k", k, (batch, None, groups, width), "[B,S,G,D] of the cache")
    check_same_device("k", k, "the cache", hot.device)


def check_kept(index: Tensor, hot_len: Tensor, total: int) -> None:
    """``index`` is integer ``[B,G,K]`` within [-1, total), without repeats."""
    check_shape("index", index, (*hot_len.shape, None), "[B,G,K] of the cache")
    check_range("index", index, -1, total)
    check_same_device("index", index, "the cache", hot_len.device)
    ascending = index.sort(-1).values
    if bool(((ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)).any()):
        raise ValueError("index must name different tokens within a head, got one twice")


@torch.library.register_fake("fastok::kv_seal")
def _kv_seal_fake(
    data: Tensor, offset: Tensor, k: Tensor, v: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, fmt: list[int], key_gamma: float, value_gamma: float,
) -> None:  # fmt: skip
    return None


@torch.library.register_fake("fastok::kv_unseal")
def _kv_unseal_fake(
    data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], total: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, groups, _, width = hot_k.shape
    k = hot_k.new_empty(batch, total, groups, width)
    return k, torch.empty_like(k)
