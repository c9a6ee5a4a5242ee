"""``PackedCache`` in vision-language models with pictures in padded prompts, and with values narrower than keys."""

import warnings
from typing import Any

import fastok
import pytest
import torch
from fastok.testing import assert_accurate, assert_same
from kv_cases import dense_decode
from test_packed_cache import EXACT, FORMATS, contents, ids
from torch import Tensor

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from vlm_cases import Case  # noqa: E402

over_models = pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2-VL", "Qwen2.5-VL"])
NEW = 12


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(name: str, models: dict[str, Any]) -> Any:
    if name not in models:
        torch.manual_seed(0)
        models[name] = vlm.MODELS[name].make()
        models[name].lm_head.weight.data[vlm.VIDEO :] = 0  # so as not to say placeholders
    models[name].set_attn_implementation("fastok")
    return models[name]


def prompts(case: Case, **how: Any) -> dict[str, Any]:
    """Two of different lengths, one with two pictures between its words."""
    first, second = case.pictures[:2]
    return case.inputs([*range(2, 22), first, 30, 31], [40, second, *range(41, 50), first, 51], **how)


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], cache: Any = None, **more: Any) -> tuple[Tensor, Tensor]:
    """The tokens, and the logits of the new ones ``[B,NEW,vocabulary]``."""
    how = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sdpa unpacks
        made = model.generate(**inputs, past_key_values=cache, **how)
    return made.sequences, torch.stack(made.logits, 1)


@over_models
def test_nothing_sealed_changes_nothing(name: str, model: Any) -> None:
    for side in ("left", "right") if name == "LLaVA-1.5" else ("left",):
        inputs = prompts(vlm.MODELS[name], side=side)
        wanted, logits = generate(model, inputs)
        tokens, same = generate(model, inputs, fastok.PackedCache(EXACT, model))
        assert_same(tokens, wanted)
        torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["int8", "4 bits", "signs and trits", "two classes"])
@over_models
def test_steps_read_what_is_stored(name: str, model: Any, fmt: str) -> None:
    """Read in place, pictures included, padding not stored, tokens sealed on the way; and near the dense cache."""
    inputs = prompts(vlm.MODELS[name])
    cache, dense = fastok.PackedCache(FORMATS[fmt], model), transformers.DynamicCache()
    steps: list[tuple[Tensor, ...]] = []
    decode = fastok.integrations.packed_cache.attention_decode

    def noting(q: Tensor, kv: Any, **how: Any) -> tuple[Tensor, Tensor]:
        out, lse = decode(q, kv, **how)
        steps.append((q, *kv.unpack(), kv.seq_lens, out))
        return out, lse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastok.integrations.packed_cache, "attention_decode", noting)
        _, logits = generate(model, inputs, cache)
    _, exact = generate(model, inputs, dense)
    assert cache.layers[0].kv.n_pages >= 2
    assert_same(cache.layers[0].kv.seq_lens[:, 0].long(), inputs["attention_mask"].sum(1) + NEW - 1)
    assert len(steps) == 2 * (NEW - 1)  # every step of both layers
    for q, k, v, lengths, out in steps:
        truth, peer = (dense_decode(q.to(t), k.to(t), v.to(t), lengths, scale=8**-0.5)[0]
                       for t in (torch.float64, torch.float32))  # fmt: skip
        assert_accurate(out, truth, peer, floor=4e-6 * truth.abs().max())
    assert_same(logits[:, 0], exact[:, 0])  # prompts attend exactly
    if fmt == "int8":
        assert (logits - exact)[:, 1].abs().max() < 0.02 * exact.std()


@over_models
def test_beams(name: str, model: Any) -> None:
    inputs = prompts(vlm.MODELS[name])
    wanted, _ = generate(model, inputs, num_beams=2)
    assert_same(generate(model, inputs, fastok.PackedCache(EXACT, model), num_beams=2)[0], wanted)


# ---- keys and values of different widths -----------------------------------------------------------------------------


def latent(attention: str = "fastok", dtype: torch.dtype = torch.float32) -> Any:
    """Multi-head latent attention, which caches 32 latent channels as keys and 16 rotary ones as values."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=24,
        first_k_dense_replace=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval().to(dtype)


@pytest.mark.parametrize("fmt", ["int8", "4 bits", "signs and trits"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a cache that")  # what is cached is no key yet: it is unpacked
def test_values_narrower_than_keys(fmt: str) -> None:
    model, prompt = latent(), ids(2, 45)
    cache = fastok.PackedCache(FORMATS[fmt], model)
    exact = fastok.PackedCache(EXACT, model)
    assert_same(
        model.generate(prompt, past_key_values=exact, max_new_tokens=8, do_sample=False),
        model.generate(prompt, max_new_tokens=8, do_sample=False),
    )
    model(prompt, past_key_values=cache)
    assert cache.layers[0].widths == (32, 16)
    assert cache.bits_per_element == pytest.approx(8 * cache.nbytes / (2 * 2 * 45 * (32 + 16)))
    for new in (1, 5, 1):
        tokens = ids(2, new, seed=new)
        got = model(tokens, past_key_values=cache).logits
        before = contents(cache, cache.get_seq_length() - new)
        assert (before[0][0].shape[-1], before[0][1].shape[-1]) == (32, 16)
        results = []
        for dtype in (torch.float64, torch.float32):
            same = transformers.DynamicCache()
            for index, (k, v) in enumerate(before):
                same.update(k.to(dtype), v.to(dtype), index)
            results.append(latent("eager", dtype)(tokens, past_key_values=same).logits)
        assert_accurate(got, *results, factor=4)


@pytest.mark.parametrize("widths", [(32, 48), (64, 40)], ids=str)
@pytest.mark.parametrize("fmt", ["int8", "signs and trits"])
@torch.no_grad()
def test_layers_take_keys_and_values_of_any_widths(fmt: str, widths: tuple[int, int]) -> None:
    """Zeros are added to the narrower ones, which changes nothing of what is read in place."""
    cache = fastok.PackedCache(FORMATS[fmt])
    k, v = (torch.randn(2, 2, 30, width) for width in widths)
    cache.update(k[:, :, :29], v[:, :, :29], 0)
    got = cache.layers[0].unpacked()
    assert [x.shape[-1] for x in got] == [*widths]
    if fmt == "int8":
        assert all((stored - x[:, :, :29]).abs().max() <= x.abs().max() / 127
                   for x, stored in zip((k, v), got, strict=True))  # fmt: skip
    cache.update(k[:, :, 29:], v[:, :, 29:], 0)
    q, lengths = torch.randn(2, 1, 4, widths[0]), torch.full((2, 2), 30)
    out, lse = cache.layers[0].attend(q, 0.3, None, None)
    stored = [x.transpose(1, 2) for x in cache.layers[0].unpacked()]
    truth, peer = (dense_decode(*(x.to(t) for x in (q, *stored)), lengths, scale=0.3)
                   for t in (torch.float64, torch.float32))  # fmt: skip
    assert_accurate(out, truth[0], peer[0], floor=4e-6 * truth[0].abs().max())
    assert_accurate(lse, truth[1], peer[1], floor=4e-6 * truth[1].abs().max())
