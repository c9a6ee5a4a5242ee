"""``EMASinkCache``: a streaming cache whose sinks take up what leaves the window."""

from functools import partial

import torch
from torch import Tensor, nn

from ..caches.window import Gone, Window
from ..ops.checks import check_at_least, check_number
from .held_cache import Store
from .streaming_cache import Rows, StreamingCache, StreamingLayer, Tables


class EMASinkCache(StreamingCache):
    """A `StreamingCache` whose sinks are moving averages of the tokens that have left the window.

    Args:
        sink: how many, at least 1; published: the tokens of 3 video frames.
        recent: newest tokens that are kept, the query's own included; at least 1. Published: 6 frames.
        alpha: a sink becomes ``alpha * sink + (1 - alpha) * token``, within [0, 1]; published: 0.999.
        model: as for `StreamingCache`, whose errors and limits apply too.

    The first ``sink`` tokens are the sinks to begin with; of the tokens that leave the window after them, number i is
    folded into sink ``i % sink``, key and value alike, before rotary embedding. So blocks of ``sink`` tokens, such as
    video frames, are folded place by place as published, and streams without blocks have a meaning too, whatever they
    are cut into. (The release overwrites the sinks if a block has another size.)

    The averages are fp32, whatever the model's dtype: steps of 0.1 % are below half an ulp of bf16, where most of
    them would be lost. `nbytes` has them. What the release does besides, several denoising passes over a block, is
    for its caller: a pass that is to be repeated has to use another cache. Reward Forcing, arXiv
    2512.04678.
    """

    def __init__(self, sink: int, recent: int, alpha: float = 0.999, model: nn.Module | None = None) -> None:
        check_at_least("sink", sink, 1)
        check_at_least("recent", recent, 1)
        check_number("alpha", alpha)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {alpha}")
        self._begin(model, partial(EMASinkLayer, sink, recent, alpha))


class MovingSinks:
    """The sinks of a `Window` in fp32, ``k[B,G,sink,D]`` and ``v``, and how many tokens each sample has folded in."""

    def __init__(self, window: Window, alpha: float) -> None:
        self.alpha, self.window = alpha, window
        self.k, self.v = (part[:, :, : window.sink].float() for part in (window.k, window.v))
        self.count = torch.zeros(len(self.k), dtype=torch.int64, device=self.k.device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.count))

    def now(self) -> tuple[Tensor, Tensor]:
        """Keys and values, fp32. A sink into which nothing was folded yet is as in the window."""
        own = (torch.arange(self.window.sink, device=self.k.device) < self.count[:, None])[:, None, :, None]
        k, v = (
            torch.where(own, mean, part[:, :, : self.window.sink].float())
            for mean, part in ((self.k, self.window.k), (self.v, self.window.v))
        )
        return k, v

    def fold(self, gone: Gone) -> Tensor:
        """At most ``sink`` more tokens; which of them each sink took up, int64 ``[B,sink]``, -1 for none."""
        sink = self.window.sink
        slot = (self.count[:, None] + gone.counts.cumsum(1) - 1) % sink
        taken = (slot[:, None] == torch.arange(sink, device=slot.device)[:, None]) & gone.counts[:, None]
        which = torch.where(taken.any(2), taken.int().argmax(2), -1)
        index, moves = which.clamp(min=0)[:, None, :, None], (which >= 0)[:, None, :, None]
        new = []
        for old, x in zip(self.now(), (gone.k, gone.v), strict=True):
            token = x.float().gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            new.append(torch.where(moves, self.alpha * old + (1 - self.alpha) * token, old))
        self.k, self.v = new
        self.count = self.count + gone.counts.sum(1)
        for part, mean in ((self.window.k, self.k), (self.window.v, self.v)):
            part[:, :, :sink] = mean
        return which

    def crop(self, length: int) -> None:
        """Nothing to forget: what is gone makes a window refuse."""

    def select(self, index: Tensor) -> None:
        """Make samples ``index[B']`` the batch."""
        self.k, self.v, self.count = (x.index_select(0, index) for x in (self.k, self.v, self.count))


class EMASinkLayer(StreamingLayer):
    """One layer of an `EMASinkCache`."""

    def __init__(self, sink: int, recent: int, alpha: float, tables: Tables) -> None:
        super().__init__(sink, recent, tables)
        self.alpha = alpha
        self.sinks: MovingSinks

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.window, self.sinks]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self.sinks = MovingSinks(self.window, self.alpha)

    def forget(self, gone: Gone | None) -> None:
        """See `StreamingLayer`."""
        if gone is not None:
            for begin in range(0, gone.k.shape[2], self.sink):
                self.sinks.fold(gone.part(begin, begin + self.sink))

    def to_sinks(self, rows: Rows, gone: Gone | None) -> tuple[Tensor, Tensor]:
        """See `StreamingLayer`. Every query sees the sinks as they were when it came."""
        leaving = 0 if gone is None else gone.k.shape[2]
        first = self.window.evicted - leaving  # the column that leaves first
        queries = rows.q.shape[2]
        before = min(max(queries - leaving, 0), queries)  # those that come before it leaves
        filled = self.window.sink_column[:, None]
        results = []
        if before:
            part = rows.part(0, before)
            results.append(part.over(*self.sinks.now(), (filled >= 0) & (filled <= part.left[:, None])))
        for begin in range(0, leaving, self.sink):
            assert gone is not None
            end = min(begin + self.sink, leaving)
            part, old = rows.part(before + begin, before + end), self.sinks.now()
            which = self.sinks.fold(gone.part(begin, end))[:, None]
            left = part.left[:, None]
            moved = (which >= 0) & (which + first + begin <= left)
            there = torch.cat([(filled >= 0) & (filled <= left) & ~moved, moved], 2)
            k, v = (torch.cat(versions, 2) for versions in zip(old, self.sinks.now(), strict=True))
            results.append(part.over(k, v, there, versions=2))
        return torch.cat([out for out, _ in results], 1), torch.cat([lse for _, lse in results], 2)
