"""Packed caches of sequences of different lengths: padding is neither stored nor part of any group."""

from typing import Any

import fastok
import pytest
import torch
from fastok import Code, KVFormat, attention_decode, kv_pack
from fastok.integrations.unpadded import Unpadded
from fastok.testing import assert_accurate, assert_same
from kv_cases import FORMATS as EVERY
from kv_cases import NAMES, dense_decode, keys_values, salient
from test_packed_cache import FORMATS, SMALL_PAGES, build, check_step, ids
from torch import Tensor

transformers = pytest.importorskip("transformers")
COMPAT = KVFormat(Code(1.5, "channel", compat=True), Code(1.58, "channel", gamma=0.5, compat=True), 8, 8, hot=8)
over_sides = pytest.mark.parametrize("side", ["left", "right"])


# ---- sequences of different lengths ----------------------------------------------------------------------------------


def alone(cache: fastok.PackedKV, b: int, one: fastok.PackedKV) -> None:
    """Sequence b of ``cache`` holds what ``one`` does, byte for byte."""
    for g in range(one.hot_len.shape[1]):
        pages = int((cache.counts[b, g].sum(-1) > 0).sum())
        assert pages == one.n_pages
        for page in range(pages):
            assert torch.equal(cache.record(b, g, page), one.record(0, g, page))
    assert_same(cache.hot_len[b], one.hot_len[0])
    n = int(one.hot_len.max())
    assert_same(cache.hot_k[b, :, :n], one.hot_k[0, :, :n])
    assert_same(cache.hot_v[b, :, :n], one.hot_v[0, :, :n])


@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_packed_as_if_each_were_alone(name: str) -> None:
    """Also those that seal their first page later, and what is behind the end may be anything."""
    fmt = EVERY[name]
    full = 2 * fmt.page + fmt.hot + 3
    lengths = torch.tensor([full, 0, fmt.page + fmt.hot - 1, full, fmt.page + fmt.hot + 1])
    k, v = keys_values(5, full, 2, 64)
    high = salient(fmt, 5, 2, full)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:] = v[b, length:] = torch.nan
    cache = kv_pack(k, v, fmt, salient=high, seq_lens=lengths)
    assert_same(cache.seq_lens, lengths[:, None].expand(5, 2).int())
    more = keys_values(5, fmt.page + 1, 2, 64)
    compat = fmt.key.compat or fmt.value.compat  # hard channels of the whole batch
    for step in range(2):
        for b, length in enumerate(lengths.tolist()):
            own = None if high is None else high[b : b + 1, :, :length]
            one = kv_pack(k[b : b + 1, :length], v[b : b + 1, :length], fmt, salient=own)
            if step:
                one.append(*(x[b : b + 1] for x in more))
            if not compat:
                alone(cache, b, one)
            elif one.n_pages == 0:
                assert cache.hot_len[b, 0] == one.hot_len[0, 0]
        cache.append(*more)


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "zipcache-4/2"])
def test_decoding_sequences_of_different_lengths(name: str) -> None:
    fmt = EVERY[name]
    full = 2 * fmt.page + fmt.hot
    lengths = torch.tensor([full, 3, fmt.page + fmt.hot])
    k, v = keys_values(3, full, 2, 64)
    cache = kv_pack(k, v, fmt, seq_lens=lengths)
    q = torch.randn(3, 2, 4, 64)
    stored = cache.unpack()
    truth, peer = (dense_decode(q.to(t), *(x.to(t) for x in stored), lengths[:, None].expand(3, 2))
                   for t in (torch.float64, torch.float32))  # fmt: skip
    out, lse = attention_decode(q, cache)
    floor = 4e-6 * truth[0].abs().max()
    assert_accurate(out, truth[0], peer[0], floor=floor)
    assert_accurate(lse, truth[1], peer[1], floor=4e-6 * truth[1].abs().max())


def test_lengths_are_checked() -> None:
    k = torch.randn(2, 9, 1, 32)
    with pytest.raises(ValueError, match=r"seq_lens must be within \[0, 10\), got 10"):
        kv_pack(k, k, "kivi-2", seq_lens=torch.tensor([10, 3]))
    with pytest.raises(ValueError, match="seq_lens must have shape"):
        kv_pack(k, k, "kivi-2", seq_lens=torch.tensor([3]))
    with pytest.raises(TypeError, match="seq_lens must be an integer"):
        kv_pack(k, k, "kivi-2", seq_lens=torch.tensor([3.0, 3.0]))


def test_places_of_what_is_stored() -> None:
    hidden = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    places = Unpadded.of(hidden)
    assert places.positions(6)[:, :6].tolist() == [[2, 3, 4, 5, 6, 7], [0, 1, 2, 5, 6, 7], [0, 1, 2, 3, 4, 5]]
    x = torch.arange(1.0, 5).view(1, 1, 4, 1).expand(3, 1, 4, 1)
    assert places.spread(x, 6)[:, 0, :, 0].tolist() == [[0, 0, 1, 2, 3, 4], [1, 2, 3, 0, 0, 4], [1, 2, 3, 4, 0, 0]]
    cropped, stored = places.crop(4)
    assert stored.tolist() == [2, 3, 4]
    assert cropped.positions(4).tolist() == [[2, 3, 4, 5], [0, 1, 2, 4], [0, 1, 2, 3]]
    assert places.crop(7)[1].tolist() == [5, 5, 7]
    bias = torch.arange(6.0).expand(3, 6)
    assert places.of_stored(bias)[:2, :4].tolist() == [[2, 3, 4, 5], [0, 1, 2, 5]]
    assert places.of_stored(bias[:, None].expand(3, 2, 6))[1, 1, :4].tolist() == [0, 1, 2, 5]


# ---- models ----------------------------------------------------------------------------------------------------------


def padded_prompt(side: str, total: int = 70, padding: int = 13) -> tuple[Tensor, dict[str, Any]]:
    mask = torch.ones(3, total, dtype=torch.long)
    (mask[1, :padding] if side == "left" else mask[1, -padding:]).zero_()
    mask[2] = mask[1].flip(0) if side == "both" else mask[2]
    return ids(3, total), {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@over_sides
@pytest.mark.parametrize("fmt", [name for name in FORMATS if name != "two classes"])
@torch.no_grad()
def test_pages_are_those_of_the_sequence_without_padding(fmt: str, side: str) -> None:
    model, (prompt, options) = build("Llama"), padded_prompt(side)
    cache, dense = fastok.PackedCache(FORMATS[fmt], model), transformers.DynamicCache()
    for one in (cache, dense):
        model(prompt, past_key_values=one, **options)
    for layer, exact in zip(cache.layers, dense.layers, strict=True):
        for b, mask in enumerate(options["attention_mask"].bool()):
            k, v = (x[b : b + 1, :, mask].transpose(1, 2) for x in (exact.keys, exact.values))
            alone(layer.kv, b, kv_pack(k, v, FORMATS[fmt]))


@over_sides
@pytest.mark.parametrize("fmt", ["4 bits", "two classes", "compat"])
@torch.no_grad()
def test_steps_behind_padding(fmt: str, side: str) -> None:
    model, (prompt, options) = build("Llama"), padded_prompt(side)
    cache = fastok.PackedCache(FORMATS.get(fmt, COMPAT), model)
    model(prompt, past_key_values=cache, **options)
    mask, position = options["attention_mask"], options["position_ids"][:, -1:]
    for new in (1, 3, 19, 1):
        mask = torch.cat([mask, torch.ones(3, new, dtype=torch.long)], 1)
        where = position + torch.arange(1, new + 1)
        check_step("Llama", cache, ids(3, new, seed=new), model, attention_mask=mask, position_ids=where)
        position = position + new
    # Into the prompt, and other batches.
    cache.crop(-(cache.get_seq_length() - 66))
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    mask, position = mask[[1, 0, 1], :66], position[[1, 0, 1]] - position.max() + 66
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    check_step("Llama", cache, ids(3, 1, seed=9), model, attention_mask=mask, position_ids=position)


@over_sides
@pytest.mark.parametrize("fmt", ["4 bits", "compat"])
@torch.no_grad()
def test_padding_of_later_chunks(fmt: str, side: str) -> None:
    """It is stored like tokens, and seen by nobody."""
    model, (prompt, options) = build("Llama"), padded_prompt(side)
    cache = fastok.PackedCache(FORMATS.get(fmt, COMPAT), model)
    model(prompt, past_key_values=cache, **options)
    mask = options["attention_mask"]
    for new in (30, 1, 6, 1):
        more = torch.ones(3, new, dtype=torch.long)
        if new > 1:
            (more[0, : new // 2] if side == "left" else more[0, -(new // 2) :]).zero_()
        mask = torch.cat([mask, more], 1)
        where = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        got_at = more.bool()
        check_step("Llama", cache, ids(3, new, seed=new), model, at=got_at, attention_mask=mask, position_ids=where)
    assert cache.get_seq_length() == 70 + 38
    assert cache.layers[0].kv.seq_lens[:, 0].tolist() == [108, 95, 108]


@torch.no_grad()
def test_sliding_windows_behind_padding() -> None:
    name = "Mistral, sliding window"
    model, (prompt, options) = build(name), padded_prompt("left")
    cache = fastok.PackedCache(SMALL_PAGES, model)
    model(prompt, past_key_values=cache, **options)
    mask = torch.cat([options["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    position = options["position_ids"][:, -1:] + 1
    check_step(name, cache, ids(3, 1, seed=2), model, attention_mask=mask, position_ids=position)


@torch.no_grad()
def test_generating_behind_padding() -> None:
    """In the hot window nothing is lost: beams and sequences of a padded batch are those of the dense cache."""
    model, (prompt, options) = build("Llama"), padded_prompt("left")
    mask = options["attention_mask"]
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    wanted = model.generate(prompt, **how)
    exact = KVFormat(SMALL_PAGES.key, SMALL_PAGES.value, 8, 8, hot=200)
    assert_same(model.generate(prompt, past_key_values=fastok.PackedCache(exact, model), **how), wanted)
    cache = fastok.PackedCache(SMALL_PAGES, model)
    assert model.generate(prompt, past_key_values=cache, **how).shape == (3, 82)
    assert cache.layers[0].kv.seq_lens[:, 0].tolist() == [81, 81, 68, 68, 81, 81]
