"""``Window``: a stream's first tokens and its newest ones, in memory that never grows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gone:
    """Tokens that left a `Window` for good: ``k[B,G,E,D]``, ``v[B,G,E,D_v]``, and which of them count, bool ``[B,E]``.

    The others are padding, or have become sinks.
    """

    k: Tensor
    v: Tensor
    counts: Tensor

    def part(self, begin: int, end: int) -> "Gone":
        """Some of them."""
        return Gone(self.k[:, :, begin:end], self.v[:, :, begin:end], self.counts[:, begin:end])


class Window:
    """One layer's keys and values of the first ``sink`` and the last ``recent`` tokens of a stream.

    Attributes:
        k, v: ``[B,G,sink+recent,D]``: the sinks in order, then a ring that the newest tokens are written into.
        sink_column: int64 ``[B,sink]``, where in the stream each sink stood; -1 for none yet.
        hidden: bool ``[B,recent]``, padding in the ring; None until there is some.
        columns: tokens that went in, padding included.
        length: how many of the newest are in the ring, from its place ``first`` on.

    A token is a sink once it leaves the ring, so that each is there once. Padding never is one.
    """

    def __init__(self, sink: int, recent: int, k: Tensor, v: Tensor) -> None:
        self.sink, self.recent = sink, recent
        self.k, self.v = (x.new_zeros(*x.shape[:2], sink + recent, x.shape[3]) for x in (k, v))
        self.sink_column = torch.full((k.shape[0], sink), -1, dtype=torch.int64, device=k.device)
        self.hidden: Tensor | None = None
        self.columns = self.length = self.first = 0
        self._left: Tensor | None = None  # int64 [B]: columns that left the ring without padding, if there is padding

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        parts = (self.k, self.v, self.sink_column, self.hidden, self._left)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def evicted(self) -> int:
        """Columns that left the ring."""
        return self.columns - self.length

    # ---- writing -----------------------------------------------------------------------------------------------------

    def push(self, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Gone | None:
        """Add tokens ``k[B,G,S,D]``, ``v[B,G,S,D_v]``, padding where ``hidden[B,S]``; what is gone now, if any."""
        new = k.shape[2]
        if hidden is not None and self.hidden is None:
            self.hidden = torch.zeros(k.shape[0], self.recent, dtype=torch.bool, device=k.device)
            self._left = torch.full((k.shape[0],), self.evicted, device=k.device)
        if hidden is None and self.hidden is not None:
            hidden = torch.zeros(k.shape[0], new, dtype=torch.bool, device=k.device)
        if new == 1:
            return self._push_one(k, v, hidden)
        old_k, old_v, old_hidden = self.newest()
        k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        if hidden is not None and old_hidden is not None:
            hidden = torch.cat([old_hidden, hidden], 1)
        leaving = max(k.shape[2] - self.recent, 0)
        kept = k.shape[2] - leaving
        gone = self._leave(k[:, :, :leaving], v[:, :, :leaving], None if hidden is None else hidden[:, :leaving])
        for part, x in ((self.k, k), (self.v, v)):
            part[:, :, self.sink : self.sink + kept] = x[:, :, leaving:]
        if self.hidden is not None and hidden is not None:
            self.hidden[:, :kept] = hidden[:, leaving:]
        self.columns, self.length, self.first = self.columns + new, kept, 0
        return gone

    def _push_one(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> Gone | None:
        at, gone = (self.first + self.length) % self.recent, None
        slot = slice(self.sink + at, self.sink + at + 1)
        if self.length == self.recent:
            leaving = None if self.hidden is None else self.hidden[:, at : at + 1].clone()
            gone = self._leave(self.k[:, :, slot].clone(), self.v[:, :, slot].clone(), leaving)
            self.first = (self.first + 1) % self.recent
        else:
            self.length += 1
        self.k[:, :, slot], self.v[:, :, slot] = k, v
        if self.hidden is not None and hidden is not None:
            self.hidden[:, at : at + 1] = hidden
        self.columns += 1
        return gone

    def _leave(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> Gone | None:
        """The oldest columns become sinks while there are sinks to fill."""
        leaving, before = k.shape[2], self.evicted
        if leaving == 0:
            return None
        counts = torch.ones(k.shape[0], leaving, dtype=torch.bool, device=k.device) if hidden is None else ~hidden
        if self._left is None and before >= self.sink:  # they are full
            return Gone(k, v, counts)
        rank = counts.cumsum(1) - 1 + (before if self._left is None else self._left[:, None])
        if self._left is not None:
            self._left = self._left + counts.sum(1)
        becomes = counts & (rank < self.sink)
        slot = torch.where(becomes, rank, self.sink)  # behind the last one: nowhere
        for part, x in ((self.k, k), (self.v, v)):
            index = slot[:, None, :, None].expand_as(x)
            part[:, :, : self.sink] = _scattered(part[:, :, : self.sink], index, x)
        column = torch.arange(before, before + leaving, device=k.device).expand_as(slot)
        self.sink_column = _scattered(self.sink_column, slot, column, 1)
        return Gone(k, v, counts & ~becomes)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``k[B,G,length,D]``, ``v`` and ``hidden[B,length]`` of the ring, oldest first."""
        k, v = (self._unrolled(part[:, :, self.sink :], 2) for part in (self.k, self.v))
        return k, v, None if self.hidden is None else self._unrolled(self.hidden, 1)

    def places(self) -> tuple[Tensor, Tensor | None]:
        """Where each slot stands among what is there, int64 ``[B or 1,sink+recent]``, and fp32 -inf where nothing is.

        None in place of the latter ``[B,sink+recent]`` if all slots are filled.
        """
        age = (torch.arange(self.recent, device=self.k.device) - self.first) % self.recent
        if self.hidden is None:
            sinks = min(self.evicted, self.sink)
            place = torch.cat([torch.arange(self.sink, device=age.device), sinks + age])[None]
            if sinks == self.sink and self.length == self.recent:
                return place, None
            there = torch.cat([torch.arange(self.sink, device=age.device) < sinks, age < self.length])[None]
            there = there.expand(self.k.shape[0], -1)
        else:
            filled = self.sink_column >= 0
            seen = ~self.hidden & (age < self.length)
            oldest_first = age.argsort()
            rank = seen[:, oldest_first].cumsum(1)[:, age] - 1
            place = torch.cat([filled.cumsum(1) - 1, filled.sum(1, keepdim=True) + rank], 1).clamp(min=0)
            there = torch.cat([filled, seen], 1)
        return place, torch.zeros(there.shape, device=age.device).masked_fill(~there, -torch.inf)

    def _unrolled(self, ring: Tensor, dim: int) -> Tensor:
        if self.length < self.recent or self.first == 0:  # it has not been round yet
            return ring.narrow(dim, 0, self.length)
        return ring.roll(-self.first, dim)

    # ---- as stores go ------------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget all but the ``length`` oldest columns.

        Raises:
            NotImplementedError: some that would be among the newest then are gone.
        """
        if length >= self.columns:
            return
        if self.evicted > self.sink and (self._left is None or bool((self._left > self.sink).any())):
            raise NotImplementedError(
                f"crop: required, to {length} of {self.columns} tokens; supported, while none has left the window "
                f"of sinks and {self.recent} recent tokens"
            )
        # Sinks go back to where they stood, among padding, and the stream so far is written once more.
        begin, (ring_k, ring_v, ring_hidden) = self.evicted, self.newest()
        sinks = self.sink_column.masked_fill(self.sink_column < 0, begin)
        parts = []
        for part, ring in ((self.k, ring_k), (self.v, ring_v)):
            gap = part.new_zeros(*part.shape[:2], begin + 1, part.shape[3])
            index = sinks[:, None, :, None].expand(*part.shape[:2], -1, part.shape[3])
            gap = gap.scatter(2, index, part[:, :, : self.sink])[:, :, :begin]
            parts.append(torch.cat([gap, ring], 2)[:, :, :length])
        hidden = None
        if ring_hidden is not None:
            gap = torch.ones(len(sinks), begin + 1, dtype=torch.bool, device=sinks.device).scatter(1, sinks, False)
            hidden = torch.cat([gap[:, :begin], ring_hidden], 1)[:, :length]
        self.sink_column = torch.full_like(self.sink_column, -1)
        self.hidden = self._left = None
        self.columns = self.length = self.first = 0
        self.push(parts[0], parts[1], hidden)

    def select(self, index: Tensor) -> None:
        """Make samples ``index[B']`` the batch."""
        self.k, self.v, self.sink_column = (x.index_select(0, index) for x in (self.k, self.v, self.sink_column))
        if self.hidden is not None and self._left is not None:
            self.hidden, self._left = self.hidden.index_select(0, index), self._left.index_select(0, index)


def _scattered(slots: Tensor, index: Tensor, x: Tensor, dim: int = 2) -> Tensor:
    """``slots`` with ``x`` written to ``index`` along ``dim``; what is behind the last slot is dropped."""
    spare = slots.narrow(dim, 0, 1) if slots.shape[dim] else slots.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return torch.cat([slots, spare], dim).scatter(dim, index, x).narrow(dim, 0, slots.shape[dim])
