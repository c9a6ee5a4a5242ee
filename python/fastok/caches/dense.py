"""``DenseKV``: keys and values in the model's dtype, in memory that grows seldom."""

from torch import Tensor

from .memory import empty


class DenseKV:
    """One layer's keys ``[B,T,G,D]`` and values ``[B,T,G,D_v]``, newest last.

    Stored head by head, so that a head's tokens follow each other. Appending allocates only when the capacity is used
    up, which then grows by half.
    """

    def __init__(self) -> None:
        self.length = 0
        self._parts: list[Tensor] = []

    @property
    def k(self) -> Tensor:
        """``[B,T,G,D]``, a view."""
        return self._parts[0][:, :, : self.length].transpose(1, 2)

    @property
    def v(self) -> Tensor:
        """``[B,T,G,D_v]``, a view."""
        return self._parts[1][:, :, : self.length].transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    def append(self, k: Tensor, v: Tensor) -> "DenseKV":
        """Add ``k[B,S,G,D]`` and ``v[B,S,G,D_v]``; returns self."""
        new = [x.transpose(1, 2) for x in (k, v)]
        end = self._reserved(new)
        for part, x in zip(self._parts, new, strict=True):
            part[:, :, self.length : end] = x
        self.length = end
        return self

    def keep(self, index: Tensor, spare: int = 0) -> "DenseKV":
        """Keep the tokens ``index[B,G,K]`` of each head, in this order, and free the others' memory; returns self.

        There is room for ``spare`` more then; where that is as much as before, memory stays where it is.
        """
        count = index.shape[2]
        for i, part in enumerate(self._parts):
            kept = part.gather(2, index[..., None].expand(*index.shape, part.shape[3]))
            if spare:
                if part.shape[2] != count + spare:
                    part = self._empty(part, (*part.shape[:2], count + spare, part.shape[3]))
                part[:, :, :count] = kept
            self._parts[i] = part if spare else kept
        self.length = count
        return self

    def crop(self, length: int) -> "DenseKV":
        """Forget all but the ``length`` oldest tokens; returns self."""
        self.length = min(self.length, length)
        return self

    def select(self, index: Tensor) -> "DenseKV":
        """Make samples ``index[B']`` the batch; returns self."""
        self._parts = [part.index_select(0, index.to(part.device)) for part in self._parts]
        return self

    def _reserved(self, new: list[Tensor]) -> int:
        """Make room for some more tokens ``[B,G,S,D]``; the length with them."""
        if not self._parts:
            self._parts = [self._empty(x, (*x.shape[:2], 0, x.shape[3])) for x in new]
        end = self.length + new[0].shape[2]
        if end > self._parts[0].shape[2]:
            self._resize(max(end, self._parts[0].shape[2] * 3 // 2))
        return end

    def _resize(self, capacity: int) -> None:
        for i, old in enumerate(self._parts):
            new = self._empty(old, (*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            self._parts[i] = new

    def _empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return empty(like, shape)
