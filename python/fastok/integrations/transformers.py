"""transformers' vision encoders: ViT, DeiT, DINOv2 (also with registers), CLIP vision, SigLIP vision.

Keys are what ``k_proj`` of the attention returns. Attention classes keep their forward, in which the interface that has
the attention functions is one of ours: its function finds the layer in place of the mask, and there log(size) and what
the reducer wants to know of the scores. "eager", which writes out the matrix of attention, has log(size) as a mask.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..reducers.context import Reducer
from .session import SHOWN as SHOWN
from .session import Layer, Session, check_class_token
from .swap import Methods, Swaps, calls, check_free, rebound, replaced
from .tower import Interface
from .transformers_attention import NAME, hides_nothing

LIBRARY = "transformers"


def _mask(layer: Layer, x: Tensor, mask: Tensor | None, attention: Any) -> Any:
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    chosen = attention.config._attn_implementation
    if layer.session.prop_attn and attention.training and dropout > 0 and chosen not in ("sdpa", "eager"):
        raise NotImplementedError(
            "proportional attention with dropout: required, an attention that adds a mask to its logits; supported, "
            f"'sdpa' and 'eager' (model.set_attn_implementation('sdpa')); got {chosen!r}"
        )
    return layer.begin(x, None if hides_nothing(mask) or _checked(mask, layer.index) else mask)


def _checked(mask: Tensor | None, index: int) -> bool:
    """In compiled code, have it check while it runs that a mask hides nothing.

    What is compiled cannot look at the mask, and torch 2.11 takes what it compiles for an export (is_exporting is
    folded to True), for which transformers writes out a mask even where there is nothing to hide.
    """
    if mask is None or mask.dtype != torch.bool or not torch.compiler.is_compiling():
        return False
    if index == 0:  # every layer is given the same one
        torch._assert_async(mask.all(), "token merging needs an attention mask that hides nothing")
    return True


def _with_layer(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, Layer):
            attended: tuple[Tensor, Any] = own(module, query, key, value, attention_mask, **options)
            return attended
        layer, scale = attention_mask, options.get("scaling")
        layer.observe(query, key, value, scale)
        if name in ("eager", NAME) or not layer.serves(options.get("dropout", 0.0)):
            attended = own(module, query, key, value, layer.additive(query.dtype), **options)
            return attended
        return layer.attend(query, key, value, scale).transpose(1, 2).contiguous(), None

    return attend


_interface = Interface(_with_layer)


def _attention(base: Any) -> dict[str, Any]:
    return {"forward": rebound(base.forward, ALL_ATTENTION_FUNCTIONS=_interface)}


def _vit_forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    layer: Layer = self._fastok
    mask = _mask(layer, hidden_states, attention_mask, self.attention)
    attended, _ = self.attention(self.layernorm_before(hidden_states), mask, **kwargs)
    x = layer.reduce(self.dropout(attended) + hidden_states)
    return layer.finish(self.dropout(self.mlp(self.layernorm_after(x))) + x)


def _dinov2_forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    layer: Layer = self._fastok
    mask = _mask(layer, hidden_states, attention_mask, self.attention)
    attended, _ = self.attention(self.norm1(hidden_states), attention_mask=mask, **kwargs)
    x = layer.reduce(self.drop_path(self.layer_scale1(attended)) + hidden_states)
    return layer.finish(self.drop_path(self.layer_scale2(self.mlp(self.norm2(x)))) + x)


def _clip_forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    layer: Layer = self._fastok
    mask = _mask(layer, hidden_states, attention_mask, self.self_attn)
    attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), attention_mask=mask, **kwargs)
    x = layer.reduce(hidden_states + attended)
    return layer.finish(x + self.mlp(self.layer_norm2(x)))


def _key_projection(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, x: Tensor) -> Tensor:
        keys: Tensor = base.forward(self, x)
        layer: Layer = self._fastok
        layer.keys = keys.unflatten(-1, (-1, layer.head_dim))
        return keys

    return {"forward": forward}


@dataclass(frozen=True)
class _Family:
    """Where an encoder class keeps what is needed here.

    Attributes:
        module: the Python module of the class.
        name: the class.
        layers: dotted path to its layers.
        attention: the attention's name in a layer.
        forward: the replacement for a layer's forward.
        protect: number of special tokens in front of the patches.
        averaging: the image classifier whose head averages the patches, and whether the class token goes before them.
        class_token: whether the first special token is one.
    """

    module: str
    name: str
    layers: str
    attention: str
    forward: Methods
    protect: Callable[[Any], int]
    averaging: tuple[str, bool] | None = None
    class_token: bool = True


_vit = replaced(forward=_vit_forward)
_dinov2 = replaced(forward=_dinov2_forward)
_clip = replaced(forward=_clip_forward)

_FAMILIES = (
    _Family("vit.modeling_vit", "ViTModel", "layers", "attention", _vit, lambda encoder: 1),
    _Family("deit.modeling_deit", "DeiTModel", "layers", "attention", _vit, lambda encoder: 2),
    _Family(
        "dinov2.modeling_dinov2",
        "Dinov2Model",
        "encoder.layer",
        "attention",
        _dinov2,
        lambda encoder: 1,
        ("Dinov2ForImageClassification", True),
    ),
    _Family(
        "dinov2_with_registers.modeling_dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "encoder.layer",
        "attention",
        _dinov2,
        lambda encoder: 1 + encoder.config.num_register_tokens,
        ("Dinov2WithRegistersForImageClassification", True),
    ),
    _Family(
        "clip.modeling_clip",
        "CLIPVisionModel",
        "encoder.layers",
        "self_attn",
        _clip,
        lambda encoder: 1,
        ("CLIPForImageClassification", False),
    ),
    _Family(
        "siglip.modeling_siglip",
        "SiglipVisionModel",
        "encoder.layers",
        "self_attn",
        _clip,
        lambda encoder: 0,
        ("SiglipForImageClassification", False),
        class_token=False,
    ),
)

SUPPORTED = tuple(family.name for family in _FAMILIES)


def _is(module: nn.Module, family: _Family, name: str) -> bool:
    source = sys.modules.get(f"transformers.models.{family.module}")
    return source is not None and isinstance(module, getattr(source, name))


def is_encoder(module: nn.Module) -> bool:
    """Whether ``module`` is one of the `SUPPORTED`, which it can only be once its class has been imported."""
    return any(_is(module, family, family.name) for family in _FAMILIES)


@dataclass(frozen=True)
class Encoder:
    """A supported encoder as the vision tower of another model.

    Attributes:
        layers: its layers. attentions: their attention modules.
        special: number of special tokens in front of the patches.
        class_token: whether the first of them is one.
    """

    layers: list[Any]
    attentions: list[Any]
    special: int
    class_token: bool


def encoder_of(module: Any) -> Encoder | None:
    """``module`` as a vision tower, if it is one of the `SUPPORTED`."""
    for family in _FAMILIES:
        if _is(module, family, family.name):
            layers = _layers(module, family)
            attentions = [getattr(layer, family.attention) for layer in layers]
            return Encoder(layers, attentions, family.protect(module), family.class_token)
    return None


def patch(model: nn.Module, encoder: Any, reducer: Reducer, swaps: Swaps) -> Session:
    """Put ``reducer`` into ``encoder``, and sizes into the head of an image classifier that averages its tokens."""
    family = next(family for family in _FAMILIES if _is(encoder, family, family.name))
    check_class_token(reducer, family.name, family.class_token)
    layers = _layers(encoder, family)
    session = Session(reducer, len(layers), family.protect(encoder))
    session.class_token = family.class_token
    if "grid" in reducer.needs:
        swaps.swap(encoder.embeddings, session, _embeddings)
    for index, block in enumerate(layers):
        attention = getattr(block, family.attention)
        layer = Layer(session, index, attention.head_dim)
        swaps.swap(block, layer, family.forward)
        if layer.wants_keys:
            swaps.swap(attention.k_proj, layer, _key_projection)
        swaps.swap(attention, layer, _attention)
        layer.intercepts = True
    if getattr(encoder, "use_head", False):
        swaps.swap(encoder.head, session, _pooling_head)
    for module in model.modules():
        if type(module).__name__.endswith("ForMaskedImageModeling"):
            raise TypeError(f"{type(module).__name__} decodes the full grid of patches, which merged tokens are not")
        if family.averaging is not None and _is(module, family, family.averaging[0]):
            final = _FinalTokens(session, class_token=family.averaging[1])
            swaps.swap(encoder, final, _kept_for_classifier)
            swaps.swap(module.get_submodule("classifier"), final, _averaging_classifier)
    return session


def _layers(encoder: nn.Module, family: _Family) -> list[Any]:
    """The encoder's layers, once sure that this version of transformers builds them as expected."""
    try:
        layers: Any = encoder.get_submodule(family.layers)
        for layer in layers:
            layer.get_submodule(f"{family.attention}.k_proj")
            check_free(getattr(layer, family.attention))
            if not calls(type(getattr(layer, family.attention)).forward, "ALL_ATTENTION_FUNCTIONS"):
                raise AttributeError("its attention does not use the attention interface")
    except AttributeError as error:
        raise TypeError(
            f"this transformers version builds {family.name} unlike 5.23, which is supported: {error}"
        ) from error
    return list(layers)


def _embeddings(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = self.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        self._fastok.grid = (1, pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
        return base.forward(self, pixel_values, *args, **kwargs)

    return {"forward": forward}


class _FinalTokens:
    """The encoder's output on its way to the classifier."""

    def __init__(self, session: Session, class_token: bool) -> None:
        self.session = session
        self.class_token = class_token
        self.tokens: Tensor | None = None


def _kept_for_classifier(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        self._fastok.tokens = output[0]
        return output

    return {"forward": forward}


def _averaging_classifier(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, pooled: Tensor) -> Tensor:
        """Replaces the plain average in ``pooled`` by one that counts each token as often as its size."""
        final: _FinalTokens = self._fastok
        tokens, final.tokens = final.tokens, None
        if tokens is not None:
            mean = final.session.mean(tokens[:, final.session.protect :])
            pooled = torch.cat([tokens[:, 0], mean], 1) if final.class_token else mean
        return base.forward(self, pooled)

    return {"forward": forward}


def _pooling_head_forward(self: Any, hidden_state: Tensor) -> Tensor:
    """SigLIP's attention pooling, with log(size) added to the logits."""
    probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
    log_size = self._fastok.log_size(hidden_state.dtype)
    pooled = self.attention(probe, hidden_state, hidden_state, key_padding_mask=log_size)[0]
    return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


_pooling_head = replaced(forward=_pooling_head_forward)
