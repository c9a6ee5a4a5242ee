"""``PackedKV``: sealed pages of packed bytes plus a hot window, kept by ``kv_pack``, ``append`` and ``keep``."""

import torch
from torch import Tensor

from ..ops import quantize as ops
from ..ops.checks import check_finite, check_range, check_shape
from ..ops.rotary import check_angles, rotated
from ..reference.kv_layout import Addresses, pack_bits, unpack_bits
from .formats import KVFormat
from .memory import records
from .records import blank_channels, by_page, channels_of, check_directory, compacted, decide_channels

SPARE = 64  # memory for records grows by this share of what there is, and by FEWEST pages of every head at least
FEWEST = 4


def kv_pack(
    k: Tensor, v: Tensor, fmt: KVFormat | str, *, salient: Tensor | None = None, seq_lens: Tensor | None = None,
    check: bool = False,
) -> "PackedKV":  # fmt: skip
    """A packed cache of given keys and values.

    Args:
        k, v: ``[B,T,G,D]`` fp32, fp16 or bf16, any strides with a contiguous last dimension. D is a multiple of 8 from
            32 to 256.
        fmt: a :class:`KVFormat` or the name of a preset. The first ``max(0, T - hot) // page * page`` tokens are
            sealed, the others stay as they are.
        salient: bool ``[B,G,T]``: the tokens of the high class, for formats of two classes (None: all or none, by
            ``fmt.later``).
        seq_lens: integer ``[B]``: how many first tokens of each sequence there are (None: T); the others are not read.
        check: look at every number that goes into the cache, now and later, which on CUDA waits for the device; inside
            ``torch.compile`` they are trusted.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes that do not fit, an unknown preset, ``salient`` for a
        format of one class, or, with ``check``, NaN or inf. NotImplementedError: values of another width than the keys.

    Bytes are the same on every backend, and the same whether tokens come at once or one by one. A group that contains
    NaN or inf, or a range that ``scale_dtype`` cannot hold, is NaN afterwards; other groups are not affected. No
    gradient flows through a cache. Deterministic; no host synchronisation but to read ``seq_lens``, and for the total
    size where ``salient`` says what is high; without these, ``torch.compile(fullgraph=True)`` works. KIVI (Liu et al.,
    ICML 2024), ZipCache (He et al., NeurIPS 2024), VidKV (Tao et al., 2025).
    """
    fmt = KVFormat.of(fmt)
    ops.check_keys_values(k, v)
    batch, _, groups, width = k.shape
    if salient is not None:
        ops.check_salient(salient, fmt.two_classes, k)
    cache = PackedKV(fmt, batch, groups, width, dtype=k.dtype, device=k.device, check=check)
    if seq_lens is None:
        if check:
            check_finite(k=k, v=v)
        return cache._append(k, v, salient)
    ops.check_lengths(seq_lens, k)
    if check:
        unread = torch.arange(k.shape[1], device=k.device) >= seq_lens.to(k.device)[:, None]
        check_finite(**{name: x.masked_fill(unread[..., None, None], 0) for name, x in (("k", k), ("v", v))})
    lengths = seq_lens.tolist()
    for length in sorted(set(lengths)):
        rows = [b for b, n in enumerate(lengths) if n == length]
        cache._fill(rows, k[rows, :length], v[rows, :length], None if salient is None else salient[rows, :, :length])
    return cache


class PackedKV:
    """A batch's packed keys and values of one layer; made by :func:`kv_pack` or empty by the constructor.

    Attributes:
        format: the :class:`KVFormat`.
        check: whether NaN and inf are refused.
        data: uint8, the records of all sealed pages (docs/kv-format.md); may be longer than what is used.
        offset: int64 ``[B,G,pages]``, where each head's records begin.
        counts: int16 ``[B,G,pages,token groups]``, tokens left of each group of tokens.
        classes: uint8 ``[B,G,pages,ceil(page/8)]``, a bit for every token of the high class; None for one class.
        key_channels, value_channels: fp16 ``[B,G,D]``, frozen at the first seal: 1 for the channels that a mixed code
            codes in 2 bits, or the factors of ``channel_scale``; None where the code needs none.
        hot_k, hot_v: ``[B,G,hot + page,D]``, the newest tokens; hot_len: int32 ``[B,G]``, how many.
    """

    def __init__(
        self, fmt: KVFormat | str, batch: int, groups: int, width: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None, check: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(check, bool):
            raise TypeError(f"check must be True or False, got {check!r}")
        self.format = KVFormat.of(fmt)
        self.check = check
        self.layout = self.format.layout(width)
        self.width = width
        window = self.format.hot + self.format.page
        self.data = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0
        self._pages = [[0] * groups for _ in range(batch)]
        self._hot = [[0] * groups for _ in range(batch)]
        self._offset = torch.zeros(batch, groups, 0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(batch, groups, 0, self.layout.token_groups, dtype=torch.int16, device=device)
        self._classes = None
        if self.layout.two_classes:
            of_page = (self.format.page + 7) // 8
            self._classes = torch.zeros(batch, groups, 0, of_page, dtype=torch.uint8, device=device)
        self._later_high = self.format.later == "high"
        self._chosen = [[False] * groups for _ in range(batch)]
        self.key_channels: Tensor | None = None
        self.value_channels: Tensor | None = None
        self.hot_k = torch.zeros(batch, groups, window, width, dtype=dtype, device=device)
        self.hot_v = torch.zeros_like(self.hot_k)
        self._hot_high: Tensor | None = None
        self.hot_len = torch.zeros(batch, groups, dtype=torch.int32, device=device)

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def n_pages(self) -> int:
        """Sealed pages of the head that has most."""
        return max([0, *[n for row in self._pages for n in row]])

    @property
    def offset(self) -> Tensor:
        """See the class."""
        return self._offset[:, :, : self.n_pages]

    @property
    def counts(self) -> Tensor:
        """See the class."""
        return self._counts[:, :, : self.n_pages]

    @property
    def classes(self) -> Tensor | None:
        """See the class."""
        return None if self._classes is None else self._classes[:, :, : self.n_pages]

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[B,G]``: tokens of each head."""
        return self.counts.sum((2, 3), dtype=torch.int32) + self.hot_len

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, spare capacity included."""
        parts = (self.data, self._offset, self._counts, self._classes, self.key_channels, self.value_channels,
                 self.hot_k, self.hot_v, self.hot_len)  # fmt: skip
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The tensors that the ops take, up to the format."""
        return (self.data, self.offset, self.counts, self.classes, self.key_channels, self.value_channels, self.hot_k,
                self.hot_v, self.hot_len)  # fmt: skip

    def record(self, b: int, g: int, page: int) -> Tensor:
        """The bytes of one sealed page of one head."""
        part = slice(page, page + 1)
        at = Addresses.of(self.layout, self.offset[b, g, part], self.counts[b, g, part],
                          None if self.classes is None else self.classes[b, g, part])  # fmt: skip
        begin = int(self.offset[b, g, page])
        return self.data[begin : begin + int(at.size)]

    def unpack(self) -> tuple[Tensor, Tensor]:
        """``(k, v)`` ``[B,T,G,D]`` in the model's dtype, T the longest head's; 0 behind the end of shorter ones."""
        total = int(self.seq_lens.max()) if self.hot_len.numel() else 0
        k, v = torch.ops.fastok.kv_unseal(*self.arguments, self.format.flat, total)
        return k, v

    def __repr__(self) -> str:
        batch, groups = self.hot_len.shape
        return f"PackedKV({batch} x {groups} heads of {self.width}, {self.n_pages} pages, {self.nbytes} bytes)"

    # ---- growing -----------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> "PackedKV":
        """Take memory for ``tokens`` tokens per head at once: :meth:`append` allocates nothing until there are more."""
        pages = max(0, tokens - self.format.hot) // self.format.page
        heads = self.hot_len.numel()
        self._grow_data(heads * pages * self.layout.largest_record())
        self._grow_directory(pages)
        return self

    def append(
        self, k: Tensor, v: Tensor, *, rope: tuple[Tensor, Tensor] | None = None, salient: Tensor | None = None
    ) -> "PackedKV":
        """Add the tokens ``k, v [B,S,G,D]`` at the end of every head; in place, returns self.

        With ``rope = (cos, sin)``, ``[S,R]`` or ``[B,S,R]`` fp32, fp16 or bf16 of the tokens' positions, the first R
        channels of the keys are turned with the R behind them first, in fp32 (rotary embedding as in LLaMA).

        ``salient`` bool ``[B,G,S]``: which of them are of the high class, for formats of two classes (None: all or
        none, by the format's ``later``).

        Whenever a head's hot window holds ``hot + page`` tokens its oldest ``page`` are sealed. Allocates only when
        capacity runs out, which then grows by a 64th: reading the cache once costs more than copying it so seldom, and
        no more than that lies idle.

        Raises:
            TypeError: another dtype than the cache's. ValueError: shapes or a device that do not fit; in a cache that
            was made with ``check``, NaN or inf. RuntimeError: ``data`` that ends before its records do.
        """
        ops.check_keys_values(k, v)
        ops.check_appended(k, self.hot_k)
        if rope is not None:
            check_angles(rope, k)
            k = rotated(k, *rope)
        if salient is not None:
            ops.check_salient(salient, self.layout.two_classes, k)
        if self.check:
            check_finite(k=k, v=v)
        return self._append(k, v, salient)

    def _append(self, k: Tensor, v: Tensor, salient: Tensor | None) -> "PackedKV":
        total, page, window = k.shape[1], self.format.page, self.hot_k.shape[2]
        k, v = k.detach(), v.detach()
        start = 0
        if not self.hot_len.numel():
            return self
        if total and self.n_pages == 0 and not any(map(any, self._hot)):
            sealed = max(0, total - self.format.hot) // page * page
            if sealed:
                high = None if salient is None else salient[:, :, :sealed]
                self._seal(k[:, :sealed], v[:, :sealed], None, high)
            start = sealed
        while start < total:
            room = window - max(map(max, self._hot))
            count = min(room, total - start)
            new = slice(start, start + count)
            self._write_hot(k[:, new].transpose(1, 2), v[:, new].transpose(1, 2))
            if self._classes is not None and salient is not None:
                self._note_salient(salient[:, :, new])
            start += count
            self._seal_full_windows()
        return self

    def _fill(self, rows: list[int], k: Tensor, v: Tensor, salient: Tensor | None) -> None:
        """All tokens ``[rows,T,G,D]`` of sequences that have none yet."""
        total, page, groups = k.shape[1], self.format.page, k.shape[2]
        k, v = k.detach(), v.detach()
        sealed = max(0, total - self.format.hot) // page * page
        if sealed:
            heads = [(b, g) for b in rows for g in range(groups)]
            old = [x[:, :sealed].transpose(1, 2).flatten(0, 1)[:, :, None] for x in (k, v)]
            high = None if salient is None else salient[:, :, :sealed].flatten(0, 1)[:, None]
            self._seal(old[0], old[1], heads, high)
        count = total - sealed
        self.hot_k[rows, :, :count] = k[:, sealed:].transpose(1, 2)
        self.hot_v[rows, :, :count] = v[:, sealed:].transpose(1, 2)
        self.hot_len[rows] = count
        for b in rows:
            self._hot[b] = [count] * groups
        if salient is not None:
            self._classes_of_hot()[rows, :, :count] = salient[:, :, sealed:]

    def _write_hot(self, k: Tensor, v: Tensor) -> None:
        count, first = k.shape[2], self._hot[0][0]
        if all(n == first for row in self._hot for n in row):
            self.hot_k[:, :, first : first + count] = k
            self.hot_v[:, :, first : first + count] = v
        else:
            place = self.hot_len[..., None].long() + torch.arange(count, device=k.device)
            place = place[..., None].expand(*place.shape, self.width)
            self.hot_k.scatter_(2, place, k)
            self.hot_v.scatter_(2, place, v)
        self.hot_len += count
        self._hot = [[n + count for n in row] for row in self._hot]

    def _note_salient(self, salient: Tensor) -> None:
        """Remember the classes of the newest hot tokens."""
        first = self.hot_len[..., None].long() - salient.shape[2]
        place = first + torch.arange(salient.shape[2], device=salient.device)
        self._classes_of_hot().scatter_(2, place, salient)

    def _classes_of_hot(self) -> Tensor:
        if self._hot_high is None:
            self._hot_high = torch.full(self.hot_k.shape[:3], self._later_high, device=self.hot_k.device)
        return self._hot_high

    def _seal_full_windows(self) -> None:
        page, window = self.format.page, self.hot_k.shape[2]
        full = [(b, g) for b, row in enumerate(self._hot) for g, n in enumerate(row) if n == window]
        if not full:
            return
        every = len(full) == self.hot_len.numel()
        b, g = torch.tensor(full, device=self.hot_len.device).T
        hot = (self.hot_k, self.hot_v, *(() if self._hot_high is None else (self._hot_high,)))
        if every:
            oldest = [x[:, :, :page] for x in hot]
            self._seal(oldest[0].transpose(1, 2), oldest[1].transpose(1, 2), None, oldest[2] if len(hot) > 2 else None)
            for x in hot:
                for start in range(page, window, page):  # page by page, so that nothing overlaps and no copy is made
                    later = x[:, :, start : start + page]
                    x[:, :, start - page : start - page + later.shape[2]] = later
            self.hot_len -= page
        else:
            oldest = [x[b, g, :page] for x in hot]
            high = oldest[2][:, None] if len(hot) > 2 else None
            self._seal(oldest[0][:, :, None], oldest[1][:, :, None], full, high)
            for x in hot:
                x[b, g, : window - page] = x[b, g, page:]
            self.hot_len[b, g] -= page
        if self._hot_high is not None:
            self._hot_high[b, g, window - page :] = self._later_high
        for b_, g_ in full:
            self._hot[b_][g_] -= page

    def _seal(self, k: Tensor, v: Tensor, heads: list[tuple[int, int]] | None, high: Tensor | None) -> None:
        """Seal whole pages ``k, v [B,n*page,G,D]`` of all heads, or ``[heads,n*page,1,D]`` of some."""
        layout, page = self.layout, self.format.page
        self._choose_channels(k[:, :page], v[:, :page], heads)
        channels = [self.key_channels, self.value_channels]
        index = None
        if heads is not None:
            index = torch.tensor(heads, device=k.device).T
            channels = [None if c is None else c[index[0], index[1]][:, None] for c in channels]
        batch, tokens, groups, _ = k.shape
        n = tokens // page
        classes, one_class = None, high is None
        if layout.two_classes:
            if high is None:
                high = torch.full((batch, groups, tokens), self._later_high, device=k.device)
            classes = pack_bits(high.unflatten(2, (n, page)))
        offset = self._take(batch, groups, n, None if one_class else classes)
        torch.ops.fastok.kv_seal(self.data, offset, k, v, classes, *channels, self.format.flat, self.format.key.gamma,
                                 self.format.value.gamma)  # fmt: skip
        self._enter(offset, classes, heads, index)

    def _take(self, batch: int, groups: int, n: int, classes: Tensor | None) -> Tensor:
        """Memory for records: their offsets ``[batch,groups,n]``. ``classes`` None: of tokens that are all `later`."""
        device, layout, page = self.data.device, self.layout, self.format.page
        if classes is None:
            size = layout.full_record(self._later_high)
            self._grow_data(self._used + batch * groups * n * size)
            offset = self._used + size * torch.arange(batch * groups * n, device=device).view(batch, groups, n)
            self._used += batch * groups * n * size
            return offset
        high = unpack_bits(classes, page).sum(-1)
        sizes = sum(layout.sizes(high, page - high, layout.token_groups)).flatten()
        ends = sizes.cumsum(0)
        offset = (self._used + ends - sizes).view(batch, groups, n)
        needed = self._used + int(ends[-1]) if len(ends) else self._used
        self._grow_data(needed)
        self._used = needed
        return offset

    def _enter(
        self, offset: Tensor, classes: Tensor | None, heads: list[tuple[int, int]] | None, index: Tensor | None
    ) -> None:
        n, each = offset.shape[2], self.format.page // self.layout.token_groups
        before = self._pages
        pairs = heads or [(b, g) for b, row in enumerate(before) for g in range(len(row))]
        self._grow_directory(max(before[b][g] + n for b, g in pairs) if pairs else 0)
        first = before[0][0] if pairs else 0
        if heads is None and all(m == first for row in before for m in row):
            new = slice(first, first + n)
            self._offset[:, :, new] = offset
            self._counts[:, :, new] = each
            if classes is not None and self._classes is not None:
                self._classes[:, :, new] = classes
        else:
            if index is None:
                index = torch.tensor(pairs, device=offset.device).T
            at = torch.tensor([before[b][g] for b, g in pairs], device=offset.device)
            for page in range(n):
                self._offset[index[0], index[1], at + page] = offset.flatten(0, 1)[:, page]
                self._counts[index[0], index[1], at + page] = each
                if classes is not None and self._classes is not None:
                    self._classes[index[0], index[1], at + page] = classes.flatten(0, 1)[:, page]
        for b, g in pairs:
            before[b][g] += n

    def _grow_data(self, needed: int) -> None:
        if needed <= self.data.numel():
            return
        if self._used > self.data.numel():
            raise RuntimeError(f"data is too short: its records end at byte {self._used} of {self.data.numel()}")
        capacity = needed
        if self._used:
            few = FEWEST * self.hot_len.numel() * self.layout.largest_record()
            capacity = max(needed, self.data.numel() + max(self.data.numel() // SPARE, few))
        grown = records(capacity, self.data.device)
        grown[: self._used] = self.data[: self._used]
        self.data = grown

    def _grow_directory(self, pages: int) -> None:
        held = self._offset.shape[2]
        if pages <= held:
            return
        more = (pages if held == 0 else max(pages, held * 3 // 2 + 1)) - held
        self._offset = torch.nn.functional.pad(self._offset, (0, more))
        self._counts = torch.nn.functional.pad(self._counts, (0, 0, 0, more))
        if self._classes is not None:
            self._classes = torch.nn.functional.pad(self._classes, (0, 0, 0, more))

    def _choose_channels(self, k: Tensor, v: Tensor, heads: list[tuple[int, int]] | None = None) -> None:
        """What is frozen at a head's first seal, from its first page; hard channels at the first of a sequence's heads.

        ``k, v [B,page,G,D]`` of all heads, or ``[heads,page,1,D]`` of some.
        """
        sides = (
            ("key_channels", k, self.layout.key, self.format.key.per_head),
            ("value_channels", v, self.layout.value, self.format.value.per_head),
        )
        if heads is None and not any(map(any, self._chosen)):
            for name, x, side, per_head in sides:
                setattr(self, name, channels_of(x, side, per_head))
            self._chosen = [[True] * len(row) for row in self._chosen]
            return
        pairs = heads or [(b, g) for b, row in enumerate(self._chosen) for g in range(len(row))]
        new = [i for i, (b, g) in enumerate(pairs) if not self._chosen[b][g]]
        if not new:
            return
        for name, x, side, per_head in sides:
            if not side.needs_channels:
                continue
            if heads is None:
                x = x.transpose(1, 2).flatten(0, 1)[:, :, None]
            if getattr(self, name) is None:
                setattr(self, name, blank_channels(side, self.hot_len))
            decide_channels(getattr(self, name), x, side, per_head, [(i, *pairs[i]) for i in new], self._chosen)
        for i in new:
            self._chosen[pairs[i][0]][pairs[i][1]] = True

    # ---- batches and newest tokens -----------------------------------------------------------------------------------

    def select(self, index: Tensor) -> "PackedKV":
        """Make samples ``index[B']`` the batch (repeated ones share their sealed bytes); in place, returns self.

        Raises:
            TypeError: an index that is not integer. ValueError: one of another shape, or beyond the batch.
        """
        check_shape("index", index, (None,), "[B']")
        check_range("index", index, 0, len(self._pages))
        for name in ("_offset", "_counts", "_classes", "key_channels", "value_channels", "hot_k", "hot_v", "_hot_high",
                     "hot_len"):  # fmt: skip
            part: Tensor | None = getattr(self, name)
            if part is not None:
                setattr(self, name, part.index_select(0, index.to(part.device)))
        places = index.tolist()
        self._pages = [list(self._pages[i]) for i in places]
        self._chosen = [list(self._chosen[i]) for i in places]
        self._hot = [list(self._hot[i]) for i in places]
        return self

    def crop(self, length: int | Tensor) -> "PackedKV":
        """Forget all but the ``length`` (a number, or integer ``[B]``) oldest tokens of each head; in place.

        Returns self. Cheap while those forgotten are hot; sealed ones are taken out as by :meth:`keep`.

        Raises:
            TypeError: a length that is not integer. ValueError: a negative one, or not one per sequence.
            RuntimeError: see :meth:`keep`.
        """
        sealed = self.counts.sum((2, 3), dtype=torch.int32)
        most = torch.as_tensor(length, device=sealed.device)
        check_range("length", most, 0, 2**31)
        if most.dim():
            check_shape("length", most, sealed.shape[:1], "[B] of the cache")
        most = most.int().view(-1, 1).expand_as(sealed)
        if bool((most >= sealed).all()):
            self.hot_len.copy_(torch.minimum(self.hot_len, most - sealed))
            self._hot = self.hot_len.tolist()
            if self._hot_high is not None:  # what comes in their place is not of their classes
                entry = torch.arange(self.hot_k.shape[2], device=sealed.device)
                self._hot_high.masked_fill_(entry >= self.hot_len[..., None], self._later_high)
            return self
        most = torch.minimum(most, self.seq_lens)
        places = torch.arange(int(most.max()), device=sealed.device).expand(*sealed.shape, -1)
        return self.keep(torch.where(places < most[..., None], places, -1))

    # ---- eviction ----------------------------------------------------------------------------------------------------

    def keep(self, index: Tensor) -> "PackedKV":
        """Keep only the tokens at ``index[B,G,K]`` of each head; in place, returns self.

        Args:
            index: integer, the places of tokens in their head (0 is the oldest), in any order; -1 pads, so that heads
                may keep different numbers. What is kept stays in order of age.

        Raises:
            TypeError: an index that is not integer. ValueError: a wrong shape, a place beyond the cache's longest head,
            or one given twice. RuntimeError: a directory and data that contradict each other.

        Codes and parameters are copied, never quantized again; data is compacted, pages without survivors vanish. Waits
        for the device.
        """
        check_directory(
            self.layout, self.data, self.offset, self.counts, self.classes, self.hot_len, self.hot_k.shape[2]
        )
        ops.check_kept(index, self.hot_len, int(self.seq_lens.max()) if self.hot_len.numel() else 0)
        counts, device = self.counts.long(), self.data.device
        length, page = counts.sum(-1), self.format.page
        first, sealed = length.cumsum(-1) - length, length.sum(-1)
        total = self.n_pages * page + self.hot_k.shape[2]
        chosen = torch.zeros(*self.hot_len.shape, total + 1, dtype=torch.bool, device=device)
        chosen.scatter_(2, torch.where(index < 0, total, index).long(), True)
        entry = torch.arange(page, device=device)
        stays = chosen.gather(2, (first[..., None] + entry).flatten(2)).unflatten(2, (-1, page))
        stays &= entry < length[..., None]
        self._keep_hot(chosen, sealed)
        self._keep_pages(stays)
        return self

    def _keep_hot(self, chosen: Tensor, sealed: Tensor) -> None:
        entry = torch.arange(self.hot_k.shape[2], device=chosen.device)
        stays = chosen.gather(2, sealed[..., None] + entry) & (entry < self.hot_len[..., None])
        order = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
        wide = order[..., None].expand(*order.shape, self.width)
        self.hot_k.copy_(self.hot_k.gather(2, wide))
        self.hot_v.copy_(self.hot_v.gather(2, wide))
        if self._hot_high is not None:
            own = entry < stays.sum(-1, keepdim=True)
            self._hot_high.copy_(torch.where(own, self._hot_high.gather(2, order), self._later_high))
        self.hot_len.copy_(stays.sum(-1))
        self._hot = self.hot_len.tolist()

    def _keep_pages(self, stays: Tensor) -> None:
        self.data, offset, counts, classes = compacted(
            self.layout, self.data, self.offset, self.counts, self.classes, stays
        )
        # Pages that are still there come first, in order.
        order = (counts.sum(-1) == 0).to(torch.int8).argsort(dim=-1, stable=True)
        self._pages = (counts.sum(-1) > 0).sum(-1).tolist()
        most = self.n_pages
        self._offset = offset.gather(2, order)[:, :, :most].contiguous()
        self._counts = by_page(counts, order)[:, :, :most].to(torch.int16).contiguous()
        if classes is not None:
            self._classes = by_page(classes, order)[:, :, :most].contiguous()
        self._used = self.data.numel()
