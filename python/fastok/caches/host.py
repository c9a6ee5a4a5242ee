"""``HostKV``: a `DenseKV` in host memory, of which rows are fetched."""

import torch
from torch import Tensor

from .dense import DenseKV

FEW = 16  # new tokens that are kept twice for a while; prompts are rather waited for


class HostKV(DenseKV):
    """One layer's keys and values in host memory, pinned where there is CUDA, so that copies need not be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._arriving: list[Tensor] = []  # the newest tokens' keys and values [B,G,S,…], on their way
        self._arrived: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + sum(x.numel() * x.element_size() for x in self._arriving)

    def append(self, k: Tensor, v: Tensor) -> "HostKV":
        """Add ``k[B,S,G,D]`` and ``v[B,S,G,D_v]`` of any device, without waiting if they are few; returns self."""
        self._wait()
        self.length = self._reserved(k, v)
        # A copy into part of a tensor would be waited for, one into a tensor of its own is not.
        for x in (k.transpose(1, 2), v.transpose(1, 2)):
            self._arriving.append(self._empty(x, tuple(x.shape)).copy_(x.contiguous(), non_blocking=True))
        if k.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(k.device))
        if not k.is_cuda or k.shape[1] > FEW:
            self._wait()
        return self

    def rows(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B,L,K,D]`` of ``tokens[B,L,K]`` (int64, on the host; L a multiple of G) on ``device``."""
        ratio = tokens.shape[1] // self._stored.shape[1]
        batch, head = torch.arange(tokens.shape[0])[:, None, None], torch.arange(tokens.shape[1])[:, None]
        k, v = self.places(batch.expand_as(tokens), (head // ratio).expand_as(tokens), tokens, device)
        return k, v

    def places(self, batch: Tensor, head: Tensor, token: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same of single places, of one shape: ``[…,D]`` each."""
        self._wait()
        rows = self._pinned(self._stored[batch, head, token]).to(device, non_blocking=True)
        return rows[..., : self._width], rows[..., self._width :]

    def all(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,T,G,D]`` on ``device``."""
        self._wait()
        return self.k.to(device), self.v.to(device)

    def keep(self, index: Tensor, spare: int = 0) -> "HostKV":
        """See `DenseKV`; not from here."""
        raise NotImplementedError("keep: required, tokens of a cache in host memory to go; supported, on the device")

    def select(self, index: Tensor) -> "HostKV":
        """Make samples ``index[B']`` the batch; returns self."""
        self._wait()
        if self._rows is not None:
            self._rows = self._pinned(self._rows.index_select(0, index.cpu()))
        return self

    def _resize(self, capacity: int) -> None:
        self._wait()
        super()._resize(capacity)

    def _wait(self) -> None:
        """Until what was appended has arrived and is in its place."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._arriving:
            k, v = self._arriving
            self._put(self.length - k.shape[2], k, v)
        self._arriving, self._arrived = [], None

    def crop(self, length: int) -> "HostKV":
        """Forget all but the ``length`` oldest tokens; returns self."""
        self._wait()
        super().crop(length)
        return self

    def _empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not torch.cuda.is_available():
            return super()._empty(like, shape)
        return torch.empty(shape, dtype=like.dtype, pin_memory=True)

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if torch.cuda.is_available() else x
