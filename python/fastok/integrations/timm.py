"""timm's VisionTransformer and Eva families.

Keys are what ``k_norm`` of the attention returns: with bias and after q/k normalisation, before rotary embedding, which
all attention classes of these families call (it is an Identity without normalisation). log(size) goes in through the
``attn_mask`` argument that they all have, fused or not.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..reducers.context import Reducer
from .session import Layer, Session
from .swap import Swaps, replaced

LIBRARY = "timm"
SUPPORTED = ("VisionTransformer", "VisionTransformerDistilled", "Eva")


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
    rotary = getattr(encoder, "rope", None) is not None
    session = Session(reducer, len(encoder.blocks), encoder.num_prefix_tokens, rotary=rotary)
    swaps.swap(encoder, session, _encoder)
    if encoder.attn_pool is not None:
        swaps.swap(encoder.attn_pool, session, _attention_pool)
    for index, block in enumerate(encoder.blocks):
        layer = Layer(session, index)
        swaps.swap(block, layer, _forward_of(block))
        if layer.wants_keys:
            swaps.swap(block.attn.k_norm, layer, _key_norm)
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
    bias = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=bias))))
    return layer.finish(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def _res_post_block_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    layer: Layer = self._fastok
    bias = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.norm1(self.attn(x, attn_mask=bias))))
    return layer.finish(x + self.drop_path2(self.norm2(self.mlp(x))))


def _eva_block_forward(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    layer: Layer = self._fastok
    bias = layer.begin(x, attn_mask, is_causal)
    attended = self.attn(self.norm1(x), rope=layer.rope(rope), attn_mask=bias)
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
    bias = layer.begin(x, attn_mask, is_causal)
    x = layer.reduce(x + self.drop_path1(self.norm1(self.attn(x, rope=layer.rope(rope), attn_mask=bias))))
    return layer.finish(x + self.drop_path2(self.norm2(self.mlp(x))))


_block = replaced(forward=_block_forward)
_res_post_block = replaced(forward=_res_post_block_forward)
_eva_block = replaced(forward=_eva_block_forward)
_eva_block_post_norm = replaced(forward=_eva_block_post_norm_forward)


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
