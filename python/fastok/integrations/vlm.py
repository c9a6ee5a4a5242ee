"""Vision-language models of transformers: image tokens are reduced between the vision tower and the language model.

Outside, nothing changes: callers, and ``generate``, count the tokens of the original prompt. The model's ``forward``
makes shorter embeddings, attention mask and position ids of them and hands these to the forward of its class. What a
cache holds of the original prompt it notes on the cache, for the calls that continue it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from ..reducers.context import Reducer
from ..token_map import SoftMap, TokenMap
from . import traced
from .prompt import History, Layout, Span, rearrange
from .session import Stats
from .swap import Methods
from .visual import Reduced, Visual, reduce
from .vlm_calls import check_call, check_positions, starts, with_visuals

SHOWN = ("hidden", "grid", "text", "keys", "values", "vision", "vision_cls", "crops", "valid", "cls", "column")
"""What a reducer between vision tower and language model can be shown; the scores also with a role behind a colon."""


@dataclass(frozen=True)
class Modality:
    """How a model takes images, or videos.

    Attributes:
        name: ``"image"`` or ``"video"``.
        pixels: the argument of the model's forward.
        arguments: names of the others that go to ``get_…_features``.
    """

    name: str
    pixels: str
    arguments: tuple[str, ...]

    @property
    def getter(self) -> str:
        """The model's method for their features."""
        return f"get_{self.name}_features"


class Family(Protocol):
    """What `PromptSession` has to know of a model class.

    Attributes:
        modalities: in the order in which the model puts them into prompts.
        keeps_positions: whether tokens keep the positions they had (M-RoPE); else positions have no gaps.
        forwards_options: whether the model's further arguments go to ``get_…_features``.
        traces: whether `visuals` reads nothing on the host, so that a compiled graph can hold it.
    """

    modalities: tuple[Modality, ...]
    keeps_positions: bool
    forwards_options: bool
    traces: bool

    @property
    def seconds(self) -> float:
        """What scores, or reductions within the tower, took in its last run."""

    def begin(self, core: Any, modality: Modality, arguments: dict[str, Any], *, unseen: bool) -> None:
        """The vision tower is about to run; ``unseen`` if its features go nowhere but into the language model."""

    def visuals(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> list[Visual]:
        """What it made of each image: one for each of ``output.pooler_output``."""


class PromptSession:
    """One reducer at work between the vision tower and the language model of one model. Remembers the last prompt."""

    def __init__(self, reducer: Reducer, family: Family) -> None:
        self.reducer = reducer
        self.family = family
        self.layout: Layout | None = None
        self.traces = family.traces and not getattr(reducer, "ragged", False)
        self.fresh: list[Visual] = []
        self.left: dict[str, Tensor] = {}
        self.reduced: list[Reduced] = []
        self.tokens_in: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        self.seconds: float | None = None
        self.unseen = False
        # Here and not by decorators, which would make `import fastok` import the compiler. They are functions of the
        # class, since a copy of the model has a session of its own.
        self._show = torch.compiler.disable(
            PromptSession._show_images, reason="which tokens of the tower belong to which image is read on the host"
        )
        self._counted = torch.compiler.disable(
            PromptSession._count, reason="how long the shortened prompts are depends on what is in them"
        )

    @property
    def token_map(self) -> list[TokenMap | SoftMap]:
        """One map for each image of the last prompt that had any."""
        if self.seconds is None:
            raise RuntimeError("no prompt with images was seen since apply (a compiled forward records nothing)")
        return [image.token_map for image in self.reduced]

    @property
    def patches(self) -> list[list[Tensor]]:
        """For each image of the last prompt that had any, each picture that it was encoded as."""
        if self.seconds is None:
            raise RuntimeError("no prompt with images was seen since apply (a compiled forward records nothing)")
        return [image.patches for image in self.reduced]

    @property
    def stats(self) -> Stats:
        """Of the last prompt that had images."""
        after = [len(image.source) for image in self.reduced]
        stages: list[int | list[int]] = [after if len(set(after)) > 1 else after[0]] if after else []
        return Stats(stages, self.seconds, self.tokens_in, after, self.prompts)

    def encode(self, core: Any, own: Callable[..., Any], modality: Modality, arguments: dict[str, Any]) -> Any:
        """``get_…_features``, whose features carry along what the reducer will have to be shown."""
        wanted = arguments.pop("return_dict", None)
        self.family.begin(core, modality, arguments, unseen=self.unseen)
        output = own(core, **arguments, return_dict=True)
        if self.traces and torch.compiler.is_compiling():
            self.fresh = self.family.visuals(core, modality, arguments, output)
        else:
            self._show(self, core, modality, arguments, output)
        return output if (core.config.return_dict if wanted is None else wanted) else output.to_tuple()

    @contextmanager
    def features_unseen(self) -> Iterator[None]:
        """While nobody but this session sees what ``get_…_features`` returns."""
        self.unseen = True
        try:
            yield
        finally:
            self.unseen = False

    def _show_images(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> None:
        visuals = self.family.visuals(core, modality, arguments, output)
        for visual in visuals:
            visual.seconds = self.family.seconds / len(visuals)
        features = output.pooler_output
        if isinstance(features, Tensor):
            features._fastok = visuals  # type: ignore[attr-defined]
        else:
            for tensor, visual in zip(features, visuals, strict=True):
                tensor._fastok = visual

    def forward(self, core: Any, own: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> Any:
        """The model's forward ``own``, of a shorter prompt."""
        cache = given.get("past_key_values")
        history: History | None = getattr(cache, "_fastok", None)
        self.layout = None
        features = self._features(core, given, options)
        ids, x = given.get("input_ids"), given.get("inputs_embeds")
        if (not features and history is None) or (ids is None and x is None):
            return own(core, **given, **options)
        batch, width = (ids if x is None else x).shape[:2]  # type: ignore[union-attr]
        cached = 0 if cache is None else int(cache.get_seq_length())
        history = History.none(batch) if history is None else history.rows(batch)
        seen = history.seen(cached)
        check_call(given, options, batch, seen, width)
        if history.places and width > 1:
            check_positions(core, given.get("position_ids"), history, seen)
        mask = given.get("attention_mask")
        past = history.past_mask(mask, cached, batch) if cached else None
        now = None if mask is None else mask[:, seen:]
        spans: list[Span] = []
        if features:
            x = core.get_input_embeddings()(ids) if x is None else x
            self.layout, spans = self._laid_out(core, features, ids, x, now)
        positions = self._positions(core, given, seen, width)
        layout = self.layout
        if layout is not None:
            assert x is not None
            given |= {"input_ids": None, "inputs_embeds": layout.embeddings(x, spans), "mm_encoder_outputs": None}
            given |= {modality.pixels: None for modality in self.family.modalities}
            now = layout.mask(now)
            positions = self._selected(positions, batch)
        if positions is not None and cached and not self.family.keeps_positions:
            positions = (positions - history.removed.to(positions.device)[:, None]).clamp(min=0)
        whole = _joined(past, now, batch, cached, width if self.layout is None else self.layout.column.shape[1])
        given |= {"attention_mask": whole, "position_ids": positions}
        wanted = options.pop("return_dict", None)
        output = own(core, **given, **options, return_dict=True)
        if features:
            self._note(output, history, seen + width, cached, whole)
            for name, left in self.left.items():
                if hasattr(output, f"{name}_hidden_states"):
                    setattr(output, f"{name}_hidden_states", left.to(x))
            self.left = {}
        return output if (core.config.return_dict if wanted is None else wanted) else output.to_tuple()

    def _features(self, core: Any, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """By modality, the features of the images in this call."""
        self.fresh = []
        encoded = given.get("mm_encoder_outputs") or {}
        found: dict[str, Any] = {}
        for modality in self.family.modalities:
            output, pixels = encoded.get(modality.name), given.get(modality.pixels)
            if pixels is not None and given.get("mm_encoder_outputs") is not None:
                raise ValueError(f"{modality.pixels} and mm_encoder_outputs were given; a model takes one of them")
            if output is None and pixels is not None and len(pixels) > 0:
                arguments = {name: given[name] for name in modality.arguments if given.get(name) is not None}
                arguments |= options if self.family.forwards_options else {}
                get = getattr(core, modality.getter)
                with self.features_unseen():
                    output = get(**{modality.pixels: pixels}, **arguments | {"return_dict": True})
            if output is not None:
                found[modality.name] = output.pooler_output
        return found

    def _positions(self, core: Any, given: dict[str, Any], seen: int, width: int) -> Tensor | None:
        """Position ids ``[…,B,S]`` of the original prompt; None: the language model is to number tokens itself."""
        positions: Tensor | None = given.get("position_ids")
        if positions is None and self.family.keeps_positions:
            x = given.get("inputs_embeds")
            ids = given.get("input_ids")
            own = dict(given, past_key_values=OriginalLength(seen))
            own["inputs_embeds"] = x if ids is None else ids[..., None]  # only its shape and device count
            names = inspect.signature(core.compute_3d_position_ids).parameters
            positions = core.compute_3d_position_ids(**{name: own.get(name) for name in names})
            if positions is None:
                positions = torch.arange(seen, seen + width, device=own["inputs_embeds"].device)[None]
        return None if positions is None else positions[..., -width:]

    def _selected(self, positions: Tensor | None, batch: int) -> Tensor | None:
        """Position ids of the shorter prompt."""
        layout = self.layout
        if positions is None or layout is None:
            return positions
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if not self.family.keeps_positions:
            return layout.compact(positions)
        if positions.dim() == 3 and positions.shape[0] == 4:
            # The first row counts tokens, by which the language model tells sequences apart; it must have no gaps.
            return torch.cat([layout.compact(positions[0])[None], layout.gather(positions[1:], 0)])
        return layout.gather(positions, 0)

    def _laid_out(
        self, core: Any, features: dict[str, Any], ids: Tensor | None, x: Tensor, mask: Tensor | None
    ) -> tuple[Layout, list[Span]]:
        """Where everything goes, and what is left of the images."""
        places = {}
        for modality in self.family.modalities:
            token = getattr(core.config, f"{modality.name}_token_id")
            if ids is None:
                embedded = core.get_input_embeddings()(torch.tensor(token, device=x.device))
                places[modality.name] = (x == embedded).all(-1)
            else:
                places[modality.name] = ids == token
        wants_text = "text" in self.reducer.needs
        if traced.traceable(self.fresh, len(x)) and not (wants_text and mask is not None):
            return self._traced(next(iter(places.values())), x)
        fresh, self.fresh = self.fresh, []
        return self._counted(self, features, fresh, places, ids, x, mask)

    def _traced(self, placeholders: Tensor, x: Tensor) -> tuple[Layout, list[Span]]:
        """As `_counted`, in a compiled graph, where nothing is recorded."""
        visuals, self.fresh = self.fresh, []
        each, n = len(visuals) // len(x), visuals[0].hidden.shape[1]
        texts = traced.text_of(x, placeholders, each, n) if "text" in self.reducer.needs else None
        images = []
        for i, visual in enumerate(visuals):
            text = None if texts is None else texts[i // each : i // each + 1]
            images.append(traced.reduced(visual, self.reducer, text))
        self.reduced, self.tokens_in, self.prompts, self.seconds = [], [], [], None
        self.left = {self.family.modalities[0].name: torch.cat([image.features for image in images])}
        return traced.rearrange(placeholders, images, n)

    def _count(
        self,
        features: dict[str, Any],
        fresh: list[Visual],
        places: dict[str, Tensor],
        ids: Tensor | None,
        x: Tensor,
        mask: Tensor | None,
    ) -> tuple[Layout, list[Span]]:
        for tensor, visual in zip(next(iter(features.values())), fresh, strict=False):
            tensor._fastok = visual
        placed = self._placed({name: with_visuals(x) for name, x in features.items()}, places, ids, x, mask)
        spans = [image.span for image in placed]
        layout = rearrange(x.shape[1], len(x), spans, mask, x.device)
        self.left = {
            name: torch.cat([image.reduced.features for image in placed if image.modality == name]) for name in features
        }
        self._remember(placed, layout)
        return layout, spans

    def _placed(
        self,
        features: dict[str, list[Tensor]],
        places: dict[str, Tensor],
        ids: Tensor | None,
        x: Tensor,
        mask: Tensor | None,
    ) -> list["_Placed"]:
        """What is left of each image, in the order in which they are in the prompts."""
        is_text = ~torch.stack(list(places.values())).any(0)
        is_text = is_text if mask is None else is_text & mask.bool()
        wants_text = "text" in self.reducer.needs
        placed, known = [], {}
        for name, images in features.items():
            for image, (row, start) in zip(images, starts(name, places[name], images), strict=True):
                words: Any = None
                if wants_text:
                    words = row if ids is None else tuple(ids[row][is_text[row]].tolist())
                if (id(image), words) not in known:  # beams share an image
                    text = x[row][is_text[row]][None] if wants_text else None
                    known[id(image), words] = reduce(image, image._fastok, self.reducer, text)  # type: ignore[attr-defined]
                reduced = known[id(image), words]
                span = Span(row, start, len(image), reduced.features, reduced.source)
                placed.append(_Placed(name, image, reduced, span))
        return sorted(placed, key=lambda image: (image.span.row, image.span.start))

    def _remember(self, placed: list["_Placed"], layout: Layout) -> None:
        # Without features: a copy of the model, or memory, shall not hang on their graph.
        self.reduced = [replace(image.reduced, features=image.reduced.features.detach()[:0]) for image in placed]
        self.tokens_in = [image.span.length for image in placed]
        removed = layout.removed.tolist()
        self.prompts = [(after + gone, after) for after, gone in zip(layout.lengths, removed, strict=True)]
        took = {id(image.reduced): image.reduced.seconds for image in placed}
        took |= {id(image.features): image.features._fastok.seconds for image in placed}  # type: ignore[attr-defined]
        self.seconds = sum(took.values())

    def _note(self, output: Any, history: History, columns: int, cached: int, mask: Tensor | None) -> None:
        """On the cache, what it now holds: ``columns`` of the original prompt."""
        layout, cache = self.layout, output.get("past_key_values")
        assert layout is not None
        traced_shorter = not self.prompts and columns - cached != layout.column.shape[1]
        if cache is not None and (history.places or traced_shorter or any(a != b for a, b in self.prompts)):
            removed = history.removed.to(layout.removed.device) + layout.removed
            History(columns, cached + layout.column.shape[1], mask, removed).note_on(cache)


@dataclass(eq=False)
class _Placed:
    """One image in a prompt: its features before, and what is left of them."""

    modality: str
    features: Tensor
    reduced: Reduced
    span: Span


class OriginalLength:
    """Stands for a cache where transformers asks it only for its length, and means that of the original prompt."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        """The length."""
        return self.length


def _joined(past: Tensor | None, now: Tensor | None, batch: int, cached: int, width: int) -> Tensor | None:
    """The mask of what is in the cache and of what is new, ``[B,cached + width]``; None if all is to be seen."""
    like = past if now is None else now
    if like is None:
        return None
    past = like.new_ones(batch, cached) if past is None else past.to(like)
    return torch.cat([past, like.new_ones(batch, width) if now is None else now], 1)


# ---- methods of the model's classes ----------------------------------------------------------------------------------


@cache
def core_methods(family: Family | type[Family]) -> Methods:
    """For the model without a language-modelling head; the state is a `PromptSession`."""

    def methods(base: Any) -> dict[str, Callable[..., Any]]:
        found: dict[str, Callable[..., Any]] = {"forward": _core_forward(base.forward)}
        for modality in family.modalities:
            found[modality.getter] = _features_getter(getattr(base, modality.getter), modality)
        return found

    return methods


def _core_forward(own: Any) -> Callable[..., Any]:
    arguments = _arguments(own)

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given, options = arguments(self, args, kwargs)
        return self._fastok.forward(self, own, given, options)

    return forward


def _features_getter(own: Any, modality: Modality) -> Callable[..., Any]:
    arguments = _arguments(own)

    @wraps(own)
    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        given, options = arguments(self, args, kwargs)
        return self._fastok.encode(self, own, modality, given | options)

    return get


def _arguments(own: Any) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """From a call's arguments to those that ``own`` has names for, and the others."""
    signature = inspect.signature(own)
    names = [name for name in signature.parameters if name not in ("self", "kwargs")]

    def split(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if args:
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            options = given.pop("kwargs", {})
            return {name: given[name] for name in given if name != "self"}, dict(options)
        named = {name: x for name, x in kwargs.items() if name in names}
        return named, {name: x for name, x in kwargs.items() if name not in names}

    return split


def head_methods(base: Any) -> dict[str, Any]:
    """For the model with a language-modelling head; the state is the `PromptSession` of the model inside."""
    own_loss: Callable[[Any], Callable[..., Tensor]] = base.loss_function.fget

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise NotImplementedError(
                "logits_to_keep: required, the logits of single tokens of a prompt that will be shorter; supported, an "
                "int, the number of last ones"
            )
        return base.forward(self, *args, **kwargs)

    @wraps(base.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self: Any, input_ids: Any, next_sequence_length: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        history: History | None = getattr(kwargs.get("past_key_values"), "_fastok", None)
        if history is not None and next_sequence_length is not None and kwargs.get("is_first_iteration"):
            next_sequence_length -= history.columns - history.places  # what is new was counted from the cache's length
        return base.prepare_inputs_for_generation(self, input_ids, next_sequence_length, *args, **kwargs)

    @wraps(base._prepare_position_ids_for_generation)
    def _prepare_position_ids_for_generation(self: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        cache = model_kwargs.get("past_key_values")
        if getattr(cache, "_fastok", None) is not None:
            length = OriginalLength(cache._fastok.seen(int(cache.get_seq_length())))  # type: ignore[union-attr]
            model_kwargs = model_kwargs | {"past_key_values": length}
        return base._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)

    @wraps(base._prepare_multimodal_encoder_kwargs_for_generation)
    def _prepare_multimodal_encoder_kwargs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._fastok.features_unseen():
            return base._prepare_multimodal_encoder_kwargs_for_generation(self, *args, **kwargs)

    @wraps(base._expand_multimodal_outputs)
    def _expand_multimodal_outputs(
        self: Any, input_ids: Any, mm_encoder_output: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in mm_encoder_output.values():
            if isinstance(getattr(output, "pooler_output", None), Tensor):
                output.pooler_output = with_visuals(output.pooler_output)  # a list keeps what rows carry
        return base._expand_multimodal_outputs(self, input_ids, mm_encoder_output, *args, **kwargs)

    def create_masks_for_generate(
        self: Any, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """The mask as it is: how long prompts will be is not known yet."""
        return attention_mask

    @property  # type: ignore[misc]
    def loss_function(self: Any) -> Callable[..., Tensor]:
        own = own_loss(self)
        layout: Layout | None = self._fastok.layout
        if layout is None:
            return own

        def shortened(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return own(logits, layout.labels(labels), *args, **kwargs)

        return shortened

    return {
        "forward": forward,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
        "_prepare_position_ids_for_generation": _prepare_position_ids_for_generation,
        "_prepare_multimodal_encoder_kwargs_for_generation": _prepare_multimodal_encoder_kwargs_for_generation,
        "_expand_multimodal_outputs": _expand_multimodal_outputs,
        "create_masks_for_generate": create_masks_for_generate,
        "loss_function": loss_function,
    }
