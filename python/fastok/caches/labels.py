"""``LabelCache``: a few channels of every cached key, from which Double Sparsity predicts which tokens matter."""

import torch
from torch import Tensor

from ..ops.checks import (
    ACTIVATIONS,
    check_dtype,
    check_int,
    check_range,
    check_same_device,
    check_shape,
    check_tensor,
)
from .memory import empty

BITS = (16, 8, 4)
ROW = 16  # the capacity is a multiple, so that rows of channels begin at multiples of 16 bytes, whatever the bits


class LabelCache:
    """The label channels of all cached keys of one layer, in 16, 8 or 4 bits.

    Args:
        channels: int64 ``[G,r]`` per KV head or ``[H,r]`` per query head (H/G times the memory), as from
            `calibrate_channels`.
        bits: 16: as the keys are; 8 and 4: symmetric codes with one fp16 scale per token and head.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.

    Stored channel-major, ``[B,heads,r,T]``, two 4-bit channels c and c + ceil(r/2) in a byte. Appending allocates only
    when the capacity is used up, which then grows by half.
    """

    def __init__(self, channels: Tensor, bits: int = 16) -> None:
        check_tensor("channels", channels)
        if channels.dim() != 2 or channels.dtype != torch.int64:
            raise TypeError(
                f"channels must be int64 [G,r] or [H,r], got {str(channels.dtype).removeprefix('torch.')} "
                f"{list(channels.shape)}"
            )
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {bits!r}")
        self.channels = channels
        self.bits = bits
        self.kv_heads = 0
        self.head_dim = 0
        self._dtype = torch.float32
        self._length = 0
        self._data: Tensor | None = None
        self._scale: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        heads, r = self.channels.shape
        return f"LabelCache({self._length} tokens, {heads} heads, {r} channels, {self.bits} bits)"

    @property
    def data(self) -> Tensor:
        """The codes ``[B,heads,r,T]``; uint8 ``[B,heads,ceil(r/2),T]`` for 4 bits."""
        if self._data is None:
            raise RuntimeError("the LabelCache is empty: append keys first")
        return self._data[..., : self._length]

    @property
    def scale(self) -> Tensor | None:
        """fp16 ``[B,heads,T]``, what 8-bit and 4-bit codes are to be multiplied by."""
        return None if self._scale is None else self._scale[..., : self._length]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, channels included."""
        parts = (self.channels, self._data, self._scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def append(self, k: Tensor) -> "LabelCache":
        """Add the labels of keys ``k[B,T,G,D]``, after rotary embedding; returns the cache itself.

        Raises:
            TypeError, ValueError: keys of another dtype, shape or device than the first ones, or that do not have the
                channels.
        """
        check_dtype("k", k, ACTIVATIONS)
        if k.dim() != 4:
            raise ValueError(f"k must be [B,T,G,D], got shape {list(k.shape)}")
        k = k.detach()
        if self._data is None:
            self._start(k)
        assert self._data is not None
        check_dtype("k", k, (self._dtype,))
        check_shape("k", k, (self._data.shape[0], None, self.kv_heads, self.head_dim), "[B,T,G,D] as appended before")
        check_same_device("k", k, "the label cache", self._data.device)
        data, scale = self._encoded(k)
        self._reserve(self._length + k.shape[1])
        end = self._length + k.shape[1]
        self._data[..., self._length : end] = data
        if self._scale is not None and scale is not None:
            self._scale[..., self._length : end] = scale
        self._length = end
        return self

    def crop(self, length: int) -> None:
        """Forget all but the ``length`` first tokens."""
        check_int("length", length)
        if not 0 <= length <= self._length:
            raise ValueError(f"length must be within [0, {self._length}], got {length}")
        self._length = length

    def select(self, index: Tensor) -> None:
        """Make samples ``index[B']`` the batch, as beam search reorders it."""
        if self._data is not None:
            self._data = self._data.index_select(0, index)
        if self._scale is not None:
            self._scale = self._scale.index_select(0, index)

    def _start(self, k: Tensor) -> None:
        heads, r = self.channels.shape
        batch, _, self.kv_heads, self.head_dim = k.shape
        self._dtype = k.dtype
        if self.kv_heads == 0 or heads % self.kv_heads != 0:
            raise ValueError(f"channels must be of a multiple of k's {self.kv_heads} KV heads, got {heads} rows")
        check_range("channels", self.channels, 0, self.head_dim)
        self.channels = self.channels.to(k.device)
        rows, dtype = {16: (r, k.dtype), 8: (r, torch.int8), 4: ((r + 1) // 2, torch.uint8)}[self.bits]
        self._data = torch.empty((batch, heads, rows, 0), dtype=dtype, device=k.device)
        if self.bits < 16:
            self._scale = torch.empty((batch, heads, 0), dtype=torch.float16, device=k.device)

    def _reserve(self, tokens: int) -> None:
        assert self._data is not None
        if tokens <= self._data.shape[-1]:
            return
        capacity = -(-max(tokens, self._data.shape[-1] * 3 // 2) // ROW) * ROW
        for name in ("_data", "_scale"):
            old: Tensor | None = getattr(self, name)
            if old is not None:
                new = empty(old, (*old.shape[:-1], capacity)).zero_()
                new[..., : self._length] = old[..., : self._length]
                setattr(self, name, new)

    def _encoded(self, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[B,heads,rows,T]`` codes and ``[B,heads,T]`` scales."""
        heads, r = self.channels.shape
        keys = k.transpose(1, 2).repeat_interleave(heads // self.kv_heads, 1)
        index = self.channels[None, :, None].expand(k.shape[0], -1, k.shape[1], -1)
        labels = keys.gather(3, index).transpose(2, 3)
        if self.bits == 16:
            return labels, None
        most = 2 ** (self.bits - 1) - 1
        labels = labels.float()
        scale = (labels.abs().amax(2) / most).clamp(max=torch.finfo(torch.float16).max).half()
        step = scale.float()[:, :, None]
        codes = torch.where(step > 0, labels / step, 0).round().clamp(-most, most)
        if self.bits == 8:
            return codes.to(torch.int8), scale
        codes = (codes + 8).to(torch.uint8)
        low, high = codes[:, :, : (r + 1) // 2], codes[:, :, (r + 1) // 2 :]
        high = torch.nn.functional.pad(high, (0, 0, 0, low.shape[2] - high.shape[2]), value=8)
        return low | high << 4, scale
