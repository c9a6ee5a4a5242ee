"""One reducer at work in one encoder: what its layers hand to each other during a forward."""

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ..flash import padded
from ..ops.attention import attention, attention_scores
from ..ops.scores import ScoreSpec
from ..reducers.context import Reducer, TokenContext
from ..token_map import SoftMap, TokenMap

SHOWN = ("hidden", "keys", "values", "size", "grid", "vision", "vision_cls", "valid", "crops", "cls", "column")
"""What an encoder's layers can show a reducer; the scores also with a role behind a colon."""


def is_score(name: str) -> bool:
    """Whether a reducer's need is a score of an encoder's attention: ``"cls"`` or ``"column"``, perhaps with a role."""
    return name.split(":")[0] in ("cls", "column")


def score_spec(name: str, special: int = 0, *, class_token: bool = True) -> ScoreSpec:
    """The class token's row, which comes first, or the mean over all rows, of the tokens behind ``special`` ones.

    Without a class token the mean over all rows stands for its row.
    """
    cols, logits = (special, None) if special else None, name == "cls:logit"
    if name.startswith("cls") and class_token:
        return ScoreSpec(rows=0, cols=cols, logits=logits)
    return ScoreSpec(cols=cols, reduce="mean", logits=logits)


def acts_behind(reducer: Reducer) -> bool:
    """Whether a method acts on what an encoder has made: in the last layer only, however many there are."""
    reduces = getattr(reducer, "reduces", None)
    return reduces is not None and all(
        [reduces(i, n) for i in range(n)] == [i == n - 1 for i in range(n)] for n in (2, 3)
    )


def check_needs(reducer: Reducer, where: str, shown: tuple[str, ...]) -> None:
    """NotImplementedError if the reducer needs something that is neither among ``shown`` nor a score."""
    missing = [name for name in reducer.needs if name not in shown and not is_score(name)]
    if missing:
        raise NotImplementedError(
            f"{type(reducer).__name__} {where}: required, {', '.join(reducer.needs)}; supported, {', '.join(shown)}; "
            f"missing, {', '.join(missing)}"
        )


def check_class_token(reducer: Reducer, encoder: str, class_token: bool) -> None:
    """ValueError if the reducer needs a class token that the encoder lacks.

    A method that acts behind an encoder takes the mean over all rows of attention for the class token's row; one with
    ``mean_query = True``, in an encoder's layers, the row of the mean query.
    """
    wanted = "vision_cls" in reducer.needs
    if not acts_behind(reducer) and not getattr(reducer, "mean_query", False):
        wanted = wanted or any(name.startswith("cls") for name in reducer.needs)
    if wanted and not class_token:
        raise ValueError(f"{type(reducer).__name__} needs a class token, of which {encoder} has none")


def score_layers(reducer: Reducer, n_layers: int) -> dict[str, tuple[int, ...]]:
    """By name, the layers from 0 whose scores the reducer wants to be summed; not those of the layer at hand."""
    if not hasattr(reducer, "score_layers"):
        return {}
    listed: dict[str, tuple[int, ...]] = reducer.score_layers(n_layers)
    for name, layers in listed.items():
        if name in reducer.needs and not all(-n_layers <= layer < n_layers for layer in layers):
            raise ValueError(f"score_layers: {name} of layers {layers}, of which there are {n_layers}")
    return {name: tuple(layer % n_layers for layer in layers) for name, layers in listed.items()}


@dataclass(frozen=True)
class Stats:
    """What the last forward did.

    Attributes:
        tokens: number of tokens after each layer, class and other special tokens included; a list with one number per
            sample where these differ. Empty before the first forward. Of a vision-language model, the numbers of tokens
            that images have left in the prompt.
        seconds: time from entering the first layer to leaving the last by the host's clock; a GPU may still be at work.
            None before the first forward. Of a vision-language model, the time that the reduction took: scores, reducer
            and merging.
        tokens_in, tokens_out: of a vision-language model, how many tokens each image (or video) had in the prompt and
            has, newline embeddings included.
        prompts: of a vision-language model, the length of each prompt before and after, without padding; with a cache,
            of what was not in it.
    """

    tokens: list[int | list[int]]
    seconds: float | None
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)
    prompts: list[tuple[int, int]] = field(default_factory=list)


class Session:
    """State of one patched encoder. Only the last forward is remembered.

    Sizes (and positions) are kept per layer, not only the newest, so that a layer which gradient checkpointing runs
    again during backward finds what it had. Inside ``torch.compile`` no maps and no time are recorded, but for maps
    where ``records`` is set: a vision-language model around the encoder has to know them.
    """

    def __init__(self, reducer: Reducer, n_layers: int, protect: int, *, rotary: bool = False) -> None:
        self.reducer = reducer
        self.n_layers = n_layers
        self.protect = protect
        self.rotary = rotary
        self.prop_attn: bool = getattr(reducer, "prop_attn", False)
        self.sized: bool = getattr(reducer, "sized", True)
        self.sizes: list[Tensor | None] = [None] * (n_layers + 1)
        self.positions: list[Tensor | None] = [None] * (n_layers + 1)
        self.maps: dict[int, TokenMap | SoftMap | None] = {}
        self.listed = score_layers(reducer, n_layers)
        self.carried: list[dict[str, Tensor]] = [{} for _ in range(n_layers + 1)]
        self.grid: tuple[int, int, int] | None = None
        self.class_token = True
        self.mean_query: bool = getattr(reducer, "mean_query", False)
        self.records = False
        self.reducing = 0.0
        self.input: tuple[int, int, torch.device] | None = None
        self.addresses: list[int] = [0] * n_layers
        self.recomputed = 0
        self.started = 0.0
        self.seconds: float | None = None

    def enter(self, index: int, x: Tensor) -> None:
        """Layer ``index`` begins with input ``x``."""
        compiling = torch.compiler.is_compiling()
        if compiling or not in_backward():
            if index == 0:
                self._forget(x)
            if not compiling and x.requires_grad:
                self.addresses[index] = x.data_ptr()
        elif index > 0 and x.data_ptr() not in (self.addresses[index], self.recomputed):
            # A checkpoint is being recomputed, and its input is neither what this layer had in the last forward nor
            # what the layer before has just recomputed.
            raise NotImplementedError(
                "gradient checkpointing: required, the token sizes of an earlier forward; supported, "
                "one forward per backward"
            )

    def leave(self, index: int, x: Tensor) -> None:
        """Layer ``index`` ends with output ``x``."""
        if torch.compiler.is_compiling():
            if index == self.n_layers - 1:  # keep no tensor of the graph alive but the final sizes
                self.sizes = [*[None] * self.n_layers, self.sizes[-1]]
                self.positions = [None] * (self.n_layers + 1)
                self.carried = [{} for _ in range(self.n_layers + 1)]
        elif in_backward():
            self.recomputed = x.data_ptr()
        elif index == self.n_layers - 1:
            self.seconds = perf_counter() - self.started

    def _forget(self, x: Tensor) -> None:
        self.sizes = [None] * (self.n_layers + 1)
        self.positions = [None] * (self.n_layers + 1)
        self.carried = [{} for _ in range(self.n_layers + 1)]
        self.maps = {}
        self.reducing = 0.0
        self.input = (x.shape[0], x.shape[1], x.device)
        self.seconds = None
        if not torch.compiler.is_compiling():
            self.started = perf_counter()

    @property
    def token_map(self) -> TokenMap | SoftMap:
        """The map of the last forward over all layers."""
        return self.composed(self.n_layers)

    def composed(self, n_layers: int) -> TokenMap | SoftMap:
        """The map of the last forward over the first layers."""
        if self.input is None or not self.maps:
            raise RuntimeError("no forward was recorded since apply (a compiled one records nothing)")
        batch, n, device = self.input
        composed: TokenMap | SoftMap = TokenMap.identity(batch, n, device)
        for index, token_map in self.maps.items():
            if token_map is not None and index < n_layers:
                composed = composed.then(token_map)
        return composed

    @property
    def stats(self) -> Stats:
        """Of the last forward."""
        tokens: list[int | list[int]] = []
        now: int | list[int] = self.input[1] if self.input is not None else 0
        for token_map in self.maps.values():
            if token_map is not None:
                now = _count(token_map)
            tokens.append(now)
        return Stats(tokens, self.seconds)

    def log_size(self, dtype: torch.dtype) -> Tensor | None:
        """``[B,M]``, what proportional attention over the encoder's final tokens adds to the logits."""
        size = self.sizes[-1]
        return None if size is None or not self.prop_attn else size.log().to(dtype)

    def mean(self, tokens: Tensor) -> Tensor:
        """``[B,C]``, the mean of the last ``tokens.shape[1]`` final tokens, each counted as often as its size."""
        size = self.sizes[-1]
        if size is None:
            return tokens.mean(1)
        weight = size[:, size.shape[1] - tokens.shape[1] :, None]
        return ((tokens * weight).sum(1) / weight.sum(1)).to(tokens.dtype)


class Layer:
    """One block's part in a session. Its attention leaves the keys in ``keys``, ``[B,N,G,D]``.

    Attributes:
        intercepts: whether the block's attention was made to hand its queries, keys and values to `attend`; it is given
            the layer itself as its mask then. Otherwise it has to make do with an additive mask.
        bias: fp32 ``[B,N]``, log(size) of the tokens if attention is to be proportional to it.
    """

    def __init__(self, session: Session, index: int, head_dim: int = 0) -> None:
        self.session = session
        self.index = index
        self.head_dim = head_dim
        self.intercepts = False
        self.bias: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.scores: dict[str, Tensor] = {}
        reduces = getattr(session.reducer, "reduces", None)
        self.active: bool = reduces is None or reduces(index, session.n_layers)
        self.wants_keys = self.active and "keys" in session.reducer.needs
        self.wants_values = self.active and "values" in session.reducer.needs
        self.wants_scores = [
            name
            for name in filter(is_score, session.reducer.needs)
            if (index in session.listed[name] if name in session.listed else self.active)
        ]

    @property
    def observes(self) -> bool:
        """Whether anything of the layer's attention is wanted, beside its keys."""
        return self.wants_values or bool(self.wants_scores)

    def begin(self, x: Tensor, mask: Tensor | None, is_causal: bool = False) -> "Layer | Tensor | None":
        """To be called first, with the block's input. Gives what the attention is to have as its mask."""
        if mask is not None or is_causal:
            raise NotImplementedError(
                "token merging with an attention mask: required, a mask for the merged tokens; supported, no mask; "
                "missing, what a mask means for tokens that were merged across it"
            )
        session = self.session
        session.enter(self.index, x)
        size = session.sizes[self.index]
        self.bias = None if size is None or not session.prop_attn else size.log()
        if self.intercepts:
            return self if self.bias is not None or self.observes else None
        return self.additive(x.dtype)

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The bias as an additive mask ``[B,1,1,N]``."""
        return None if self.bias is None else self.bias[:, None, None].to(dtype)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        """Note what the reducer needs, of ``q[B,H,N,D]``, ``k[B,G,N,D]`` and ``v[B,G,N,D]``."""
        if self.wants_values:
            self.values = v.transpose(1, 2)
        if not self.wants_scores:
            return
        q, k = in_autocast(q.detach(), k.detach())
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = (padded(x.transpose(1, 2)) for x in (q, k))
        class_token = self.session.class_token
        for name in self.wants_scores:
            rows, spec = q, score_spec(name, class_token=class_token)
            if name.startswith("cls") and not class_token and self.session.mean_query:
                rows, spec = q.mean(1, keepdim=True), ScoreSpec(rows=0, logits=name == "cls:logit")
            self.scores[name] = attention_scores(rows, k, spec=spec, scale=scale, key_bias=self.bias)

    def serves(self, dropout: float) -> bool:
        """Whether `attend` is wanted and can be had; without a bias the model's own attention lacks nothing."""
        return self.bias is not None and dropout == 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Proportional attention of ``[B,H,N,D]``, in the same layout."""
        q, k, v = in_autocast(q, k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        heads_last = (padded(x.transpose(1, 2)) for x in (q, k, v))
        out, _ = attention(*heads_last, scale=scale, key_bias=self.bias)
        return out[..., : v.shape[-1]].transpose(1, 2)

    def rope(self, rope: Tensor | None) -> Tensor | None:
        """The rows of a rotary embedding ``[…,N,D]`` of all patches that belong to the tokens left: ``[B,…,M,D]``."""
        position = self.session.positions[self.index]
        if rope is None or position is None:
            return rope
        while rope.dim() < 4:
            rope = rope[None]
        protect = self.session.protect
        return torch.take_along_dim(rope, position[:, None, protect:, None] - protect, 2)

    def reduce(self, x: Tensor) -> Tensor:
        """The tokens after the attention residual, reduced."""
        session, index = self.session, self.index
        size = session.sizes[index]
        token_map: TokenMap | SoftMap | None = None
        carried = dict(session.carried[index])
        scores, self.scores = self.scores, {}
        for name in [name for name in session.listed if name in scores]:
            scores[name] = carried[name] = carried[name] + scores[name] if name in carried else scores[name]
        if self.active:
            compiling = torch.compiler.is_compiling()
            started = 0.0 if compiling else perf_counter()
            ctx = self._context(x, size, {name: x for name, x in carried.items() if name in session.listed} | scores)
            ctx.extra |= {name: x for name, x in carried.items() if name not in session.listed}
            shown = dict(ctx.extra)
            token_map = session.reducer(ctx)
            carried |= {name: x for name, x in ctx.extra.items() if x is not shown.get(name)}
            carried = {name: self._reduced(x, token_map) for name, x in carried.items()}
            x, merged_size = token_map.merge(x, size=size)
            if session.sized:
                size = merged_size.detach()  # a count: no gradient is wanted for it, nor the graph kept alive by it
            if not compiling:
                session.reducing += perf_counter() - started
            if session.rotary:
                session.positions[index + 1] = self._positions(token_map)
        elif session.rotary:
            session.positions[index + 1] = session.positions[index]
        session.sizes[index + 1] = size
        session.carried[index + 1] = carried
        if session.records or not torch.compiler.is_compiling():
            session.maps[index] = token_map
        return x

    def _context(self, x: Tensor, size: Tensor | None, scores: dict[str, Tensor]) -> TokenContext:
        session, needs = self.session, self.session.reducer.needs
        keys, self.keys = self.keys, None
        values, self.values = self.values, None
        protect, extra = session.protect, {}
        if "vision" in needs:
            extra["vision"] = x
        if "vision_cls" in needs:
            extra["vision_cls"] = x[:, 0]
        n_tokens = session.input[1] if session.input is not None else None
        return TokenContext(
            x,
            keys,
            values,
            scores,
            size,
            protect,
            session.grid if x.shape[1] == n_tokens else None,
            layer=self.index,
            n_layers=session.n_layers,
            extra=extra,
            n_tokens=n_tokens,
        )

    def _reduced(self, x: Tensor, token_map: TokenMap | SoftMap) -> Tensor:
        """What has a value ``x[B,N]`` for each token, for those that are left."""
        return token_map.merge(x[..., None].float())[0][..., 0]

    def finish(self, x: Tensor) -> Tensor:
        """To be called last, with the block's output, which it returns."""
        self.session.leave(self.index, x)
        return x

    def _positions(self, token_map: TokenMap | SoftMap) -> Tensor:
        """int64 ``[B,M]``: the lowest position, in the encoder's input, of the tokens merged into each."""
        if isinstance(token_map, SoftMap):
            raise NotImplementedError("rotary embedding: required, one position per token; a SoftMap has none")
        before = self.session.positions[self.index]
        if before is None:
            return token_map.representative.clamp(min=0)
        assert self.session.input is not None
        slot = torch.where(token_map.assign < 0, token_map.n_out, token_map.assign).long()
        last = before.new_full((before.shape[0], token_map.n_out + 1), self.session.input[1] - 1)
        return last.scatter_reduce(1, slot, before, "amin")[:, : token_map.n_out]


def _count(token_map: TokenMap | SoftMap) -> int | list[int]:
    if isinstance(token_map, SoftMap):
        return token_map.n_out
    counts: list[int] = token_map.counts.tolist()
    return counts if any(count != token_map.n_out for count in counts) else token_map.n_out


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast where that is on, as every other attention does it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def in_backward() -> bool:
    """Whether this runs within a backward pass, which is where gradient checkpointing recomputes layers."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
