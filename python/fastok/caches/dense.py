"""``DenseKV``: keys and values in the model's dtype, in memory that grows seldom."""

from torch import Tensor

from .memory import empty


class DenseKV:
    """One layer's keys ``[B,T,G,D]`` and values ``[B,T,G,D_v]``, newest last.

    Stored head by head, so that a head's tokens follow each other, a token's key next to its value: where a few tokens
    are attended to, they lie in half as many pages of memory. Appending allocates only when the capacity is used up,
    which then grows by half.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rows: Tensor | None = None  # [B,G,capacity,D+D_v]
        self._width = 0

    @property
    def k(self) -> Tensor:
        """``[B,T,G,D]``, a view."""
        return self._stored[:, :, : self.length, : self._width].transpose(1, 2)

    @property
    def v(self) -> Tensor:
        """``[B,T,G,D_v]``, a view."""
        return self._stored[:, :, : self.length, self._width :].transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._rows is None else self._rows.numel() * self._rows.element_size()

    @property
    def _stored(self) -> Tensor:
        assert self._rows is not None, "nothing was appended"
        return self._rows

    def append(self, k: Tensor, v: Tensor) -> "DenseKV":
        """Add ``k[B,S,G,D]`` and ``v[B,S,G,D_v]``; returns self."""
        begin, self.length = self.length, self._reserved(k, v)
        self._put(begin, k.transpose(1, 2), v.transpose(1, 2))
        return self

    def keep(self, index: Tensor, spare: int = 0) -> "DenseKV":
        """Keep the tokens ``index[B,G,K]`` of each head, in this order, and free the others' memory; returns self.

        There is room for ``spare`` more then; where that is as much as before, memory stays where it is.
        """
        count, rows = index.shape[2], self._stored
        kept = rows.gather(2, index[..., None].expand(*index.shape, rows.shape[3]))
        if spare:
            if rows.shape[2] != count + spare:
                rows = self._empty(rows, (*rows.shape[:2], count + spare, rows.shape[3]))
            rows[:, :, :count] = kept
        self._rows = rows if spare else kept
        self.length = count
        return self

    def crop(self, length: int) -> "DenseKV":
        """Forget all but the ``length`` oldest tokens; returns self."""
        self.length = min(self.length, length)
        return self

    def select(self, index: Tensor) -> "DenseKV":
        """Make samples ``index[B']`` the batch; returns self."""
        if self._rows is not None:
            self._rows = self._rows.index_select(0, index.to(self._rows.device))
        return self

    def _put(self, begin: int, k: Tensor, v: Tensor) -> None:
        """Write ``k[B,G,S,D]`` and ``v[B,G,S,D_v]`` where tokens from ``begin`` on are."""
        rows = self._stored[:, :, begin : begin + k.shape[2]]
        rows[..., : self._width] = k
        rows[..., self._width :] = v

    def _reserved(self, k: Tensor, v: Tensor) -> int:
        """Make room for ``k[B,S,G,D]`` and ``v[B,S,G,D_v]``; the length with them."""
        end = self.length + k.shape[1]
        if self._rows is None:
            self._width = k.shape[3]
            self._rows = self._empty(k, (k.shape[0], k.shape[2], end, k.shape[3] + v.shape[3]))
        elif end > self._rows.shape[2]:
            self._resize(max(end, self._rows.shape[2] * 3 // 2))
        return end

    def _resize(self, capacity: int) -> None:
        old = self._stored
        new = self._empty(old, (*old.shape[:2], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        self._rows = new

    def _empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return empty(like, shape)
