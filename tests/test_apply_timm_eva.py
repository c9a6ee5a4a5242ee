"""fastok.integrations.apply on timm's Eva family, against the published method written on the models' submodules."""

import copy
from typing import Any

import pytest
import torch
from fastok.integrations import apply
from fastok.reducers import ToMe
from fastok.testing import assert_accurate, assert_same
from test_reducers_tome import published_groups, published_merge
from timm_cases import N, eva, images
from timm_cases import one_thread_without_gradients as one_thread_without_gradients
from torch import Tensor, nn

apply_rot_embed_cat = pytest.importorskip("timm.layers").apply_rot_embed_cat

EVAS = {
    "absolute positions": {},
    "rope": {"use_rot_pos_emb": True},
    "mixed rope": {"use_rot_pos_emb": True, "rope_type": "mixed"},
    "rope, registers": {"use_rot_pos_emb": True, "rope_type": "dinov3", "num_reg_tokens": 2, "global_pool": "token"},
    "rope, post-norm": {"use_rot_pos_emb": True, "use_post_norm": True},
    "rope, attention pooling": {"use_rot_pos_emb": True, "class_token": False, "global_pool": "map"},
    "rope, grouped queries": {"use_rot_pos_emb": True, "attn_type": "rope", "num_kv_heads": 2, "qkv_fused": False},
    "layer scale, qkv split": {"init_values": 0.3, "qkv_fused": False, "swiglu_mlp": True},
}


@pytest.mark.parametrize("options", EVAS.values(), ids=EVAS)
def test_eva_family(options: dict[str, Any]) -> None:
    model, pixels = eva(**options), images()
    plain = model(pixels)
    with apply(model, ToMe(6)) as handle:
        merged = model(pixels)
        n = N + model.num_prefix_tokens
        assert handle.stats.tokens == [n - 6, n - 12, n - 18, n - 24]
        if model.rope is not None:
            assert_same(model._fastok.positions[-1], handle.token_map.representative)
    assert merged.shape == plain.shape
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, plain)
    with apply(model, ToMe(0)):
        assert_same(model(pixels), plain)


def published_eva(model: Any, pixels: Tensor, reducer: ToMe) -> Tensor:
    """The published method in an average-pooling Eva; a token is rotated as its lowest original member was."""
    x, rope = model._pos_embed(model.patch_embed(pixels))
    size, members = torch.ones(x.shape[:2], dtype=x.dtype), [[[i] for i in range(N + 1)] for _ in pixels]
    for i, block in enumerate(model.blocks):
        attn, y = block.attn, block.norm1(x)
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = nn.functional.linear(y, attn.qkv.weight, bias).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        rows = torch.stack([rope[[min(group) - 1 for group in of_sample[1:]]] for of_sample in members])[:, None]
        rotated = [torch.cat([z[:, :, :1], apply_rot_embed_cat(z[:, :, 1:], rows)], 2) for z in (q, k)]
        logits = rotated[0] @ rotated[1].mT * 8**-0.5
        if i > 0 and reducer.prop_attn:
            logits = logits + size.log()[:, None, None]
        x = x + attn.proj(attn.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        groups = [published_groups(metric, reducer.r, 1) for metric in k.mean(1)]
        x, size = published_merge(x, size, groups)
        members = [
            [[original for j in group for original in before[j]] for group in of_sample]
            for of_sample, before in zip(groups, members, strict=True)
        ]
        x = x + block.mlp(block.norm2(x))
    mean = (model.norm(x)[:, 1:] * size[:, 1:, None]).sum(1) / N
    return model.head(model.fc_norm(mean))


@pytest.mark.parametrize("prop_attn", [True, False])
def test_eva_with_rope_gives_the_published_logits(prop_attn: bool) -> None:
    model, pixels, reducer = eva(use_rot_pos_emb=True, scale_attn_inner=True), images(), ToMe(6, prop_attn)
    with apply(model, reducer):
        logits = model(pixels)
    truth = published_eva(copy.deepcopy(model).double(), pixels.double(), reducer)
    assert_accurate(logits, truth, published_eva(model, pixels, reducer), factor=4)


def test_eva_rope_rows_are_those_of_the_lowest_member() -> None:
    """One layer reduces, the next must see the rows that pruning the embedding by hand selects."""
    model, pixels = eva(use_rot_pos_emb=True, depth=2), images()
    seen: list[Tensor] = []
    attention = model.blocks[1].attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["rope"]), with_kwargs=True)
    with apply(model, ToMe([10])) as handle:
        model(pixels)
        table = nn.functional.pad(model.rope.get_embed(), (0, 0, 1, 0))  # a row for the class token, not rotated
        expected = handle.token_map.prune(table.expand(2, -1, -1))[:, None, 1:]
    assert_same(seen[0], expected)
