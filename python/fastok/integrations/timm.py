"""timm's VisionTransformer and Eva families.

Keys are what ``k_norm`` of the attention returns: with bias and after q/k normalisation, before rotary embedding, which
all attention classes of these families call (it is an Identity without normalisation). Attention classes keep their
forward, in which ``F.scaled_dot_product_attention`` is one of ours: it finds the layer in place of the mask, and there
log(size) and what the reducer wants to know of the scores. With ``fused_attn = False``, which asks for the matrix of
attention to be written out, log(size) goes in as the ``attn_mask``, unless scores are needed, too. Attention pooling,
one query per image, takes log(size) as a mask.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..reducers.context import Reducer
from .session import SHOWN as _SHOWN
from .session import Layer, Session, check_class_token
from .swap import Swaps, calls, rebound, replaced

LIBRARY = "timm"
SUPPORTED = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
SHOWN = tuple(name for name in _SHOWN if name != "grid")


def is_encoder(module: nn.Module) -> bool:
    """Whether ``module`` is one of the `SUPPORTED`, which it can only be once timm has been imported."""
    vit, eva = sys.modules.get("timm.models.vision_transformer"), sys.modules.get("timm.models.eva")
    return (vit is not None and isinstance(module, vit.VisionTransformer)) or (
        eva is not None and isinstance(module, eva.Eva)
    )


def patch(model: nn.Module, encoder: Any, reducer: Reducer, swaps: Swaps) -> Session:
    """Put ``reducer`` into ``encoder``."""
    if encoder.global_pool == "prr":
        raise TypeError("global_pool='prr' attends to each token once; it cannot take merged tokens' sizes")
    class_token = getattr(encoder, "cls_token", None) is not None
    check_class_token(reducer, f"this {type(encoder).__name__}", class_token)
    rotary = getattr(encoder, "rope", None) is not None
    session = Session(reducer, len(encoder.blocks), encoder.num_prefix_tokens, rotary=rotary)
    session.class_token = class_token
    swaps.swap(encoder, session, _encoder)
    if encoder.attn_pool is not None:
        swaps.swap(encoder.attn_pool, session, _attention_pool)
    for index, block in enumerate(encoder.blocks):
        layer = Layer(session, index)
        swaps.swap(block, layer, _forward_of(block))
        if layer.wants_keys:
            swaps.swap(block.attn.k_norm, layer, _key_norm)
        if calls(type(block.attn).forward, "scaled_dot_product_attention"):
            layer.intercepts = block.attn.fused_attn or layer.observes
        if layer.intercepts:
            swaps.swap(block.attn, layer, _attention if block.attn.fused_attn else _attention_fused)
        elif layer.observes:
            raise TypeError(
                f"no scores or values to be had of {type(block.attn).__name__}, which {type(reducer).__name__} needs"
            )
    return session


def _forward_of(block: nn.Module) -> Any:
    """The replacement for the block's forward, by the class that defines it."""
    vit, eva = sys.modules["timm.models.vision_transformer"], sys.modules.get("timm.models.eva")
    known = [(vit, "Block", _block), (vit, "ResPostBlock", _res_post_block)]
    if eva is not None:
        known += [(eva, "EvaBlock", _eva_block), (eva, "EvaBlockPostNorm", _eva_block_post_norm)]
    for module, name, forward in known:
        if type(block).forward is getattr(module, name).forward and hasattr(block.attn, "k_norm"):
            return forward
    names = ", ".join(name for _, name, _ in known)
    raise TypeError(f"no place for token reduction in a {type(block).__name__}; supported blocks are {names}")


def _block_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    layer: Layer = self._fastok
    mask = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=mask))))
    return layer.finish(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def _res_post_block_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    layer: Layer = self._fastok
    mask = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.norm1(self.attn(x, attn_mask=mask))))
    return layer.finish(x + self.drop_path2(self.norm2(self.mlp(x))))


def _eva_block_forward(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    layer: Layer = self._fastok
    mask = layer.begin(x, attn_mask, is_causal)
    attended = self.attn(self.norm1(x), rope=layer.rope(rope), attn_mask=mask)
    if self.gamma_1 is not None:
        attended = self.gamma_1 * attended
    x = layer.reduce(x + self.drop_path1(attended))
    out = self.mlp(self.norm2(x))
    if self.gamma_2 is not None:
        out = self.gamma_2 * out
    return layer.finish(x + self.drop_path2(out))


def _eva_block_post_norm_forward(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    layer: Layer = self._fastok
    mask = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.norm1(self.attn(x, rope=layer.rope(rope), attn_mask=mask))))
    return layer.finish(x + self.drop_path2(self.norm2(self.mlp(x))))


_block = replaced(forward=_block_forward)
_res_post_block = replaced(forward=_res_post_block_forward)
_eva_block = replaced(forward=_eva_block_forward)
_eva_block_post_norm = replaced(forward=_eva_block_post_norm_forward)


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Layer | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """torch's, with a layer for a mask."""
    if isinstance(attn_mask, Layer):
        layer = attn_mask
        layer.observe(query, key, value, scale)
        if layer.serves(dropout_p):
            return layer.attend(query, key, value, scale)
        attn_mask = layer.additive(query.dtype)  # ours has no dropout
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)


_functional = ModuleType("torch.nn.functional")
vars(_functional).update(vars(F) | {"scaled_dot_product_attention": _scaled_dot_product_attention})


def _attention(base: Any) -> dict[str, Any]:
    return {"forward": rebound(base.forward, F=_functional)}


def _attention_fused(base: Any) -> dict[str, Any]:
    return _attention(base) | {"fused_attn": property(lambda self: True)}


def _key_norm(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, keys: Tensor) -> Tensor:
        keys = base.forward(self, keys)
        self._fastok.keys = keys.transpose(1, 2)
        return keys

    return {"forward": forward}


def _attention_pool(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        log_size = self._fastok.log_size(x.dtype)
        if log_size is not None:
            # The special tokens come first and are not pooled by every model.
            attn_mask = log_size[:, None, None, log_size.shape[1] - x.shape[1] :]
        return base.forward(self, x, attn_mask)

    return {"forward": forward}


def _encoder(base: Any) -> dict[str, Callable[..., Any]]:
    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        if kind not in ("avg", "avgmax") or self.attn_pool is not None:
            return base.pool(self, x, pool_type)
        if not getattr(self, "pool_include_prefix", False):
            x = x[:, self.num_prefix_tokens :]
        mean = self._fastok.mean(x)
        return mean if kind == "avg" else 0.5 * (x.amax(1) + mean)

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if output_fmt == "NCHW":
            raise NotImplementedError(
                "feature maps of merged tokens: required, the full grid; supported, output_fmt='NLC'; "
                "token_map.unmerge of the handle spreads the final tokens over the grid again"
            )
        return base.forward_intermediates(
            self, x, indices, return_prefix_tokens, norm, stop_early, output_fmt, *args, **kwargs
        )

    return {"pool": pool, "forward_intermediates": forward_intermediates}
