"""``StreamingCache``: streams without end in constant memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..caches.window import Gone, Window
from ..flash import padded
from ..ops.attention import attention, merge_states
from ..ops.checks import check_at_least
from ..ops.decode import attention_decode
from .held import hold
from .held_cache import HeldCache, HeldLayer, Store
from .rotary import Angles, Rotary


class StreamingCache(HeldCache):
    """Keeps the first ``sink`` and the last ``recent`` tokens, placed as if there had been no others between them.

    ::

        fastok.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastok")
        model.generate(**inputs, past_key_values=fastok.sparse.StreamingCache(4, 508, model))

    Args:
        sink: first tokens that are kept for ever; published: 4.
        recent: newest tokens that are kept, the query's own included; at least 1.
        model: the model it is for. Then keys are stored exactly as they are before rotary embedding.

    Raises:
        TypeError, ValueError: an argument of another type or range. NotImplementedError, from the model: an attention
        implementation other than ``"fastok"``, a rotary embedding whose frequencies depend on the length or with
        several positions per token, sliding windows, recorded scores, gradients.

    Keys are stored without rotary embedding and get it when they are read, by their place in the cache: sinks 0, 1, …,
    then the window in order. So no position is ever larger than ``sink + recent``, whatever the length of the stream,
    and memory (`nbytes`) is the same from the first token to the last: a ring buffer and a few tables.

    transformers hands a cache keys that have been turned already. With ``model``, a hook sets their position to 0
    whenever this cache is used with it, which turns nothing, so that nothing is lost in any dtype; the hook goes when
    the cache does. Without, keys are turned back in fp32, by the inverse of the matrix that the calling model's own
    ``rotary_emb`` gives: exact to some 1e-7 in fp32; in fp16 and bf16 the model has rounded the turned keys, and
    storing rounds once more.

    Every query sees the sinks and the ``recent`` tokens up to itself, in prompts too, as if tokens came one by one;
    results do not depend on how a stream is cut into calls. (The release attends to a whole prompt before it evicts.)
    Works with batches, where padding is never a sink and has no place, beams, `reset`, and ``crop`` while nothing is
    gone. Not inside ``torch.compile``. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR
    2024.
    """

    def __init__(self, sink: int, recent: int, model: nn.Module | None = None) -> None:
        check_at_least("sink", sink, 0)
        check_at_least("recent", recent, 1)
        self._begin(model, partial(StreamingLayer, sink, recent))

    def _begin(self, model: nn.Module | None, layer: "Callable[[Tables], StreamingLayer]") -> None:
        self._tables = Tables(None if model is None else Rotary.of(model))
        super().__init__(partial(_layer, layer, self._tables))
        if model is not None:
            _unturned(model, self)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, the angles of all places included."""
        return super().nbytes + self._tables.nbytes


def _layer(kind: "Callable[[Tables], StreamingLayer]", tables: "Tables", index: int) -> "StreamingLayer":
    return kind(tables)


def _unturned(model: nn.Module, cache: StreamingCache) -> None:
    """While ``cache`` lives, ``model``'s decoder places all tokens at 0 whenever it is given it."""
    own = weakref.ref(cache)

    def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("past_key_values")
        if given is None or given is not own():
            return None
        tokens = kwargs.get("inputs_embeds")
        tokens = (args[0] if args else kwargs["input_ids"]) if tokens is None else tokens
        return args, kwargs | {"position_ids": torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}

    decoder = next(module for module in model.modules() if isinstance(getattr(module, "rotary_emb", None), nn.Module))
    weakref.finalize(cache, decoder.register_forward_pre_hook(place, with_kwargs=True).remove)


class Tables:
    """The angles of all places of a window, by kind of layer, for all layers of a cache."""

    def __init__(self, rotary: Rotary | None) -> None:
        self.rotary = rotary
        self._made: dict[Any, Angles] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for angles in self._made.values() for x in (angles.cos, angles.sin))

    def of(self, attention: nn.Module, places: int, device: torch.device) -> Angles:
        """At 0 to ``places - 1``."""
        assert self.rotary is not None
        kind = getattr(attention, "layer_type", None), getattr(attention, "use_rope", True), device
        if kind not in self._made:
            position = torch.arange(places, device=device)[None]
            self._made[kind] = self.rotary.at(attention, position, torch.float32)
        return self._made[kind]


class StreamingLayer(HeldLayer):
    """One layer of a `StreamingCache`."""

    most_rows = 1 << 30
    whole = True
    slides = False

    def __init__(self, sink: int, recent: int, tables: Tables) -> None:
        super().__init__()
        self.sink, self.recent, self._tables = sink, recent, tables
        self.window: Window
        self._new: tuple[Tensor, Tensor] | None = None
        self._caller: tuple[nn.Module, Tensor] | None = None

    # ---- as caches go ------------------------------------------------------------------------------------------------

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.window]

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.window.k.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self.window = Window(self.sink, self.recent, key_states, padded(value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B,G,S,D]``; they are stored once their positions are known, by `attend`."""
        if self._tables.rotary is None:
            self._tables.rotary = Rotary.calling()
        self.expect(key_states, value_states)
        self.length += key_states.shape[2]
        self._new = key_states.detach(), padded(value_states.detach())
        return hold(self, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the new tokens only: what is known of older ones is in the window."""
        return query_length, self.length

    # ---- for the attention function ----------------------------------------------------------------------------------

    def called_by(self, attention: nn.Module, position: Tensor | None, window: int | None) -> None:
        """See `Held`."""
        super().called_by(attention, position, window)
        if position is None or position.dim() != 2:
            raise NotImplementedError(
                f"position_ids: required, {None if position is None else list(position.shape)}; supported by "
                f"{type(self).__name__}, [B,S], which {type(attention).__name__} would have to pass on"
            )
        self._caller = attention, position

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """See `Held`; not from here, where masks do not fit."""
        raise NotImplementedError(
            f"{type(self).__name__}: required, attn_implementation='fastok' without recorded scores"
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`; ``key_bias[B,S]`` of the new tokens."""
        assert self._new is not None
        assert self._caller is not None
        assert self._tables.rotary is not None
        (k, v), (attention, position), self._new, self._caller = self._new, self._caller, None, None
        if key_bias is not None and key_bias.dim() != 2:
            raise NotImplementedError(f"attention_mask: required, {list(key_bias.shape)}; supported, [B,S], of padding")
        hidden = None if key_bias is None else key_bias == -torch.inf
        turned = self._tables.rotary.at(attention, position, q.dtype)
        rows = turned.undo(q.transpose(1, 2))
        k = turned.undo(k).to(self.dtype)
        table = self._tables.of(attention, self.sink + self.recent, q.device)
        if q.shape[1] == 1:
            out, lse = self._step(table, rows, k, v, hidden, scale, softcap)
        else:
            anywhere = partial(self._tables.rotary.at, attention, dtype=torch.float32)
            out, lse = self._steps(table, anywhere, rows, k, v, hidden, scale, softcap)
        return out[..., : self.widths[1]].to(q.dtype), lse

    def _step(
        self, table: Angles, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One new token ``q[B,H,1,D]`` with key and value: the cache as it is then, in the order of its slots."""
        window = self.window
        self.forget(window.push(k, v, hidden))
        place, bias = window.places()
        newest = (place if bias is None else place.masked_fill(bias < 0, 0)).amax(1, keepdim=True)
        rows, keys = (padded(_at(table, where).turn(x).to(self.dtype)).transpose(1, 2)
                      for where, x in ((newest, q), (place, window.k)))  # fmt: skip
        cache = keys, window.v.transpose(1, 2), None
        return attention_decode(rows, cache, key_bias=bias, scale=scale, softcap=softcap)

    def _steps(
        self, table: Angles, at: Callable[[Tensor], Angles], q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None,
        scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Several ``q[B,H,S,D]``, each with its own window: attention to the windows and to the sinks, merged."""
        window, new, begin = self.window, q.shape[2], self.window.columns
        old_k, old_v, old_hidden = window.newest()
        keys, values = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        total, bias = keys.shape[2], None
        if hidden is None and old_hidden is None:
            rank = torch.arange(total, device=q.device)[None]
            seen = (rank + 1).clamp(max=self.recent)
        else:
            none = torch.zeros(q.shape[0], 1, dtype=torch.bool, device=q.device)
            parts = (none.expand(-1, n) if x is None else x for x, n in ((old_hidden, total - new), (hidden, new)))
            every = torch.cat(list(parts), 1)
            bias = torch.zeros(every.shape, device=q.device).masked_fill(every, -torch.inf)
            rank = (~every).cumsum(1) - 1
            seen = rank + 1 - F.pad(rank + 1, (self.recent, 0))[:, :total]
        angles = at(rank.clamp(min=0))
        rows = Angles(angles.function, angles.cos[:, -new:], angles.sin[:, -new:]).turn(q)
        rows, keys = (padded(x.to(self.dtype)).transpose(1, 2) for x in (rows, angles.turn(keys)))
        out, lse = attention(rows, keys, values.transpose(1, 2), scale=scale, causal=True, window=(self.recent - 1, 0),
                             softcap=softcap, key_bias=bias)  # fmt: skip
        gone = window.push(k, v, hidden)
        if self.sink == 0 or window.evicted == 0:
            self.forget(gone)
            return out, lse
        # A query at column c has seen columns up to c - recent leave its window.
        left = torch.arange(begin, begin + new, device=q.device) - self.recent
        asking = Rows(q, seen[:, -new:], left, table, scale, softcap)
        more, more_lse = self.to_sinks(asking, gone)
        return merge_states(out.float(), lse, more, more_lse)

    # ---- what becomes of tokens that leave the window ----------------------------------------------------------------

    def forget(self, gone: Gone | None) -> None:
        """Tokens are gone, and no query is still to see them leave."""

    def to_sinks(self, rows: "Rows", gone: Gone | None) -> tuple[Tensor, Tensor]:
        """fp32 ``out[B,S,H,D_v]`` and ``lse[B,H,S]`` of queries over the sinks, of which some are ``gone`` since."""
        column = self.window.sink_column[:, None]
        there = (column >= 0) & (column <= rows.left[:, None])
        return rows.over(self.window.k[:, :, : self.sink], self.window.v[:, :, : self.sink], there)


@dataclass(frozen=True)
class Rows:
    """Queries ``q[B,H,S,D]`` without rotary embedding, before sinks.

    ``seen[B or 1,S]`` tokens are in the window of each, and column ``left[S]`` is the newest that left it.
    """

    q: Tensor
    seen: Tensor
    left: Tensor
    table: Angles
    scale: float
    softcap: float | None

    def part(self, begin: int, end: int) -> "Rows":
        """Some of the queries."""
        q, seen, left = self.q[:, :, begin:end], self.seen[:, begin:end], self.left[begin:end]
        return replace(self, q=q, seen=seen, left=left)

    def over(self, k: Tensor, v: Tensor, there: Tensor, versions: int = 1) -> tuple[Tensor, Tensor]:
        """Attention to ``versions`` of all sinks, ``k[B,G,versions*sink,D]`` and ``v``, where ``there[B,S,…]``.

        They are so few that the logits can be written down.
        """
        place = torch.arange(k.shape[2] // versions, device=k.device).repeat(versions)[None]
        newest = (there.sum(-1) + self.seen - 1).clamp(min=0)
        q, k = _at(self.table, newest).turn(self.q), _at(self.table, place).turn(k)
        logits = (q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT).unflatten(2, (-1, q.shape[2])) * self.scale
        if softcap := self.softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~there[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1)
        p = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        out = (p.flatten(2, 3) @ v.float()).unflatten(2, p.shape[2:4])
        return out.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2)


def _at(table: Angles, place: Tensor) -> Angles:
    """The angles of ``place[B or 1,T]``."""
    return Angles(table.function, table.cos[0][place], table.sin[0][place])
