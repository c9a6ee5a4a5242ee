"""Double Sparsity with keys and values in host memory, and what a layer will want fetched ahead of it."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.host import HostKV
from ..flash import padded
from ..ops.decode import MOST_ROWS, attention_decode
from ..ops.sparse import label_scores, select_tokens
from .calibrate import attention_layers
from .dense_layer import hidden
from .double_sparse_layer import DoubleSparseLayer
from .held_cache import HeldCache
from .rotary import Angles, turning_function


class OffloadedLayer(DoubleSparseLayer):
    """A `DoubleSparseLayer` whose keys and values are in host memory.

    Attributes:
        wanted: rows of earlier tokens that steps have attended to so far.
        foreseen: those of them that were on the device already.
    """

    def __init__(self, channels: Tensor, n_keep: float, sink: int, recent: int, bits: int, shared: bool) -> None:
        super().__init__(channels, n_keep, sink, recent, bits, shared)
        self.wanted = self.foreseen = 0
        self._ahead: _Ahead | None = None
        self._newest: tuple[Tensor, Tensor]
        self._key_bias: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, rows fetched ahead included."""
        return super().nbytes + (0 if self._ahead is None else self._ahead.nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self.kv: HostKV = HostKV()
        self._ahead = self._key_bias = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        super().append(keys, values)
        self._newest = padded(keys), padded(values)

    def read(self) -> tuple[Tensor, Tensor]:
        """See `DenseLayer`."""
        return self.kv.all(self.device)

    def to_tokens(
        self, tokens: Tensor | None, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `DenseLayer`; ``tokens[B,G|H,K]`` ascending, the newest among them."""
        self._key_bias = key_bias
        if tokens is None:
            self._ahead = None
            return super().to_tokens(None, q, scale, softcap, key_bias)
        new = q.shape[1]
        older = self._fetched(tokens[..., : tokens.shape[2] - new])
        ratio = tokens.shape[1] // self._newest[0].shape[1]
        newest = (x[:, :, x.shape[2] - new :].repeat_interleave(ratio, 1) for x in self._newest)
        k, v = (torch.cat(parts, 2).transpose(1, 2) for parts in zip(older, newest, strict=True))
        if key_bias is not None:
            bias = (key_bias[:, None] if key_bias.dim() == 2 else key_bias).expand(-1, q.shape[2], -1)
            key_bias = bias.gather(2, tokens.repeat_interleave(q.shape[2] // tokens.shape[1], 1))
        rows = padded(q).to(self.dtype)
        out, lse = attention_decode(rows, (k, v, None), key_bias=key_bias, scale=scale, softcap=softcap)
        return out[..., : self.widths[1]].to(q.dtype), lse

    # ---- fetching ----------------------------------------------------------------------------------------------------

    def foresee(self, q: Tensor) -> None:
        """Fetch what queries like ``q[B,S,H,D]`` would attend to, on a side stream, before their own tokens come."""
        new = q.shape[1]
        n_keep, recent = self.budget(new, self.length + new)
        if n_keep >= self.length + new or n_keep == new:
            return
        with self._aside():
            scores, sink = label_scores(q.to(self.dtype), self.labels, shared=self.shared), self.sink
            if self._key_bias is not None and self._key_bias.shape[-1] <= self.length:
                known = scores[..., : self._key_bias.shape[-1]]
                known.copy_(hidden(known, self._key_bias, sink))
                sink = 0
            tokens, _ = select_tokens(scores, n_keep - new, sink=sink, recent=max(recent - new, 0))
            on_host = tokens.cpu()
            self._ahead = _Ahead(on_host, *self.kv.rows(on_host, self.device))

    def _fetched(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B,L,K,D]`` of earlier tokens; what was fetched ahead need not be again."""
        wanted, ahead, self._ahead = tokens.cpu().contiguous(), self._ahead, None
        self.wanted += wanted.numel()
        if ahead is None:
            return self.kv.rows(wanted, self.device)
        if self._stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self._stream)
            for x in (ahead.k, ahead.v):
                x.record_stream(here)
        at = torch.searchsorted(ahead.tokens, wanted).clamp(max=ahead.tokens.shape[2] - 1)
        missing = ahead.tokens.gather(2, at) != wanted
        batch, head, place = missing.nonzero(as_tuple=True)
        self.foreseen += wanted.numel() - len(batch)
        ratio = wanted.shape[1] // self._newest[0].shape[1]
        late = self.kv.places(batch, head // ratio, wanted[batch, head, place], self.device)
        index = at.to(self.device, non_blocking=True)[..., None]
        where = tuple(x.to(self.device, non_blocking=True) for x in (batch, head, place))
        found = []
        for x, rows in zip((ahead.k, ahead.v), late, strict=True):
            found.append(x.gather(2, index.expand(*at.shape, x.shape[3])).index_put(where, rows))
        return found[0], found[1]

    def _aside(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    # ---- as caches go ------------------------------------------------------------------------------------------------

    def crop_stores(self, length: int) -> None:
        """Forget all but the ``length`` oldest tokens."""
        self._ahead = self._key_bias = None
        super().crop_stores(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make samples ``indices[B']`` the batch."""
        self._ahead = self._key_bias = None
        super().batch_select_indices(indices)


@dataclass(frozen=True)
class _Ahead:
    """Rows ``k[B,L,K,D]``, ``v`` of ``tokens[B,L,K]``, ascending and on the host, that are on the device already."""

    tokens: Tensor
    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.tokens, self.k, self.v))


def look_ahead(model: nn.Module, cache: HeldCache) -> None:
    """While ``cache`` lives, each attention layer that is given it lets the next one's rows be fetched."""
    own: Callable[[], Any] = weakref.ref(cache)
    layers = attention_layers(model)
    for layer, following in pairwise(layers):

        def fetch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], following: Any = following) -> None:
            mine = own()
            if mine is None:
                return
            stored, index = mine.layers, following.layer_idx
            if kwargs.get("past_key_values") is not mine or index >= len(stored):
                return
            target = stored[index]
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if isinstance(target, OffloadedLayer) and target.length > 0 and states.shape[1] <= MOST_ROWS:
                with torch.no_grad():
                    target.foresee(_guessed(following, states, kwargs.get("position_embeddings")))

        weakref.finalize(cache, layer.register_forward_pre_hook(fetch, with_kwargs=True).remove)


def _guessed(attention: Any, states: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """The query ``[B,S,H,D]`` that an attention layer would make of the input of the layer before it."""
    q = attention.q_proj(states).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        q = attention.q_norm(q)
    if angles is not None:
        q = Angles(turning_function(attention), *angles).turn(q.transpose(1, 2)).transpose(1, 2)
    return q
