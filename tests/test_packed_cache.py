"""``PackedCache`` in transformers models: read in place, or unpacked, with the same meaning."""

import copy
import warnings
from typing import Any

import fastok
import pytest
import torch
from fastok import Code, KVFormat
from fastok.testing import assert_accurate, assert_same
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
fastok.register_transformers()
PackedCache = fastok.PackedCache

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "Mistral, sliding window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 20}),
    "Qwen2, biases": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "Qwen3, normed queries and keys": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "Gemma 2, softcap, alternating windows": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 24}),
    "Phi-3, heads of 24 channels": ("Phi3Config", "Phi3ForCausalLM", {"hidden_size": 96, "head_dim": 24}),
}
over_models = pytest.mark.parametrize("name", MODELS)
SMALL_PAGES = KVFormat(Code(4, "channel"), Code(4, "token"), group=8, page=8, hot=8)
EXACT = KVFormat(Code(4, "channel"), Code(4, "token"), hot=4096)
FORMATS = {
    "int8": KVFormat(Code(8, "token"), Code(8, "token"), page=8, hot=8),
    "4 bits": SMALL_PAGES,
    "signs and trits": KVFormat(Code(1.5, "channel"), Code(1.58, "channel"), group=8, page=8, hot=8),
    "two classes": KVFormat(
        Code(4, "channel", low_bits=2), Code(4, "token", channel_scale=True, low_bits=2), 16, 16, 8
    ),
}


def build(name: str, attention: str = "fastok", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config, model, changes = MODELS[name]
    config = getattr(transformers, config)(**SIZES | changes, attn_implementation=attention)
    return getattr(transformers, model)(config).eval().to(dtype)


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def contents(cache: Any, length: int) -> list[tuple[Tensor, Tensor]]:
    """The first ``length`` keys and values of each layer."""
    return [(k[:, :, :length], v[:, :, :length]) for k, v in (layer.unpacked() for layer in cache.layers)]


def check_step(
    name: str, cache: Any, tokens: Tensor, model: nn.Module, at: Tensor | None = None, **options: Any
) -> None:
    """The next step's logits (of the rows ``at[B,S]``) are those of the same model on the unpacked cache."""
    length = cache.get_seq_length()
    before = contents(cache, length)
    got = model(tokens, past_key_values=cache, **options).logits
    if tokens.shape[1] <= 16:  # read in place, after what the new tokens push out of the hot window was sealed
        before = contents(cache, length)
    results = []
    for dtype in (torch.float64, torch.float32):
        same = transformers.DynamicCache()
        for index, (k, v) in enumerate(before):
            same.update(k.to(dtype), v.to(dtype), index)
        results.append(build(name, "eager", dtype)(tokens, past_key_values=same, **options).logits)
    if at is not None:
        got, results = got[at], [x[at] for x in results]
    assert_accurate(got, *results, factor=4)


@over_models
@torch.no_grad()
def test_nothing_sealed_changes_nothing(name: str) -> None:
    model, prompt = build(name), ids(2, 30)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(prompt, **options)
    assert_same(model.generate(prompt, past_key_values=PackedCache(EXACT, model), **options), wanted)


@over_models
@pytest.mark.parametrize("fmt", FORMATS)
@torch.no_grad()
def test_steps_read_what_is_stored(name: str, fmt: str) -> None:
    model = build(name)
    cache = PackedCache(FORMATS[fmt], model)
    model(ids(2, 45), past_key_values=cache)
    assert cache.layers[0].kv.n_pages > 0
    check_step(name, cache, ids(2, 1, seed=2), model)
    check_step(name, cache, ids(2, 5, seed=3), model)  # several rows at once
    check_step(name, cache, ids(2, 21, seed=4), model)  # more than are read in place
    check_step(name, cache, ids(2, 1, seed=5), model)
    assert cache.get_seq_length() == 45 + 1 + 5 + 21 + 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches(side: str) -> None:
    name = "Llama"
    model, prompt = build(name), ids(2, 40)
    mask = torch.ones_like(prompt)
    if side == "left":
        mask[1, :13] = 0
    else:
        mask[1, -13:] = 0
    cache = PackedCache(SMALL_PAGES, model)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model(prompt, attention_mask=mask, position_ids=position, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    options = {"attention_mask": mask, "position_ids": position[:, -1:] + 1}
    check_step(name, cache, ids(2, 1, seed=2), model, **options)


@torch.no_grad()
def test_prompts_attend_exactly() -> None:
    model, prompt = build("Llama"), ids(2, 45)
    got = model(prompt, past_key_values=PackedCache("kivi-2", model)).logits
    assert_same(got, model(prompt, use_cache=False).logits)


@torch.no_grad()
def test_other_attention_implementations_are_right_and_warn() -> None:
    prompt, step = ids(2, 45), ids(2, 1, seed=2)
    logits = {}
    for attention in ("fastok", "sdpa", "eager"):
        model = build("Llama", attention)
        cache = PackedCache(SMALL_PAGES, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(prompt, past_key_values=cache)
            logits[attention] = model(step, past_key_values=cache).logits
        warned = [one for one in caught if "unpacked in every step" in str(one.message)]
        assert bool(warned) == (attention != "fastok")
    error = (logits["sdpa"] - logits["eager"]).abs().max()
    assert (logits["fastok"] - logits["sdpa"]).abs().max() <= 8 * error + 1e-6


@torch.no_grad()
def test_beams_and_sampling() -> None:
    model, prompt = build("Llama"), ids(2, 30)
    options: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    wanted = model.generate(prompt, **options)
    assert_same(model.generate(prompt, past_key_values=PackedCache(EXACT, model), **options), wanted)
    # Sealed bytes follow the beams: in place and unpacked choose the same.
    fmt = FORMATS["int8"]
    other = build("Llama", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unpacked = other.generate(prompt, past_key_values=PackedCache(fmt, other), **options)
    assert_same(model.generate(prompt, past_key_values=PackedCache(fmt, model), **options), unpacked)
    torch.manual_seed(0)
    sampled = model.generate(prompt, past_key_values=PackedCache(fmt, model), max_new_tokens=8, do_sample=True)
    assert sampled.shape == (2, 38)


@torch.no_grad()
def test_prompts_in_chunks() -> None:
    """``generate(prefill_chunk_size=…)``: exact while hot; later chunks attend to packed ones, and all are stored."""
    model, prompt = build("Llama"), ids(2, 61)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    chunks = options | {"prefill_chunk_size": 20}
    wanted = model.generate(prompt, **options)
    assert_same(model.generate(prompt, past_key_values=PackedCache(EXACT, model), **chunks), wanted)
    cache = PackedCache(SMALL_PAGES, model)
    model.generate(prompt, past_key_values=cache, **chunks)
    assert cache.get_seq_length() == 66
    assert cache.layers[0].kv.seq_lens.unique().tolist() == [66]


@torch.no_grad()
def test_the_language_model_of_a_vision_language_model() -> None:
    """LLaVA with an image in the prompt: exact while nothing is sealed, and read in place behind it."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=63, attn_implementation="fastok"
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    prompt = ids(1, 40).clamp(max=62)
    prompt[0, 5:21] = 63
    options: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 32, 32), "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(prompt, **options)
    assert_same(model.generate(prompt, past_key_values=PackedCache(EXACT, model), **options), wanted)
    cache = PackedCache(SMALL_PAGES, model)
    assert model.generate(prompt, past_key_values=cache, **options).shape == (1, 48)
    assert cache.layers[0].kv.n_pages == (47 - 8) // 8


@torch.no_grad()
def test_a_conversation_goes_on() -> None:
    model = build("Llama")
    cache = PackedCache(SMALL_PAGES, model)
    first = model.generate(ids(1, 30), past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert cache.get_seq_length() == 39
    again = torch.cat([first, ids(1, 25, seed=3)], 1)
    second = model.generate(again, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert second.shape == (1, 75)
    assert cache.get_seq_length() == 74


@torch.no_grad()
def test_cropping_forgets_the_newest() -> None:
    name = "Llama"
    model, prompt = build(name), ids(2, 45)
    cache = PackedCache(SMALL_PAGES, model)
    model(prompt, past_key_values=cache)
    before = [layer.unpacked() for layer in cache.layers]
    for length in (43, 20, 5):  # within the hot window, then within sealed pages
        cache.crop(length - cache.get_seq_length())
        assert cache.get_seq_length() == length
        for layer, (k, v) in zip(cache.layers, before, strict=True):
            assert_same(layer.unpacked()[0], k[:, :, :length])
            assert_same(layer.unpacked()[1], v[:, :, :length])
    check_step(name, cache, ids(2, 1, seed=2), model)


@torch.no_grad()
def test_batches_are_repeated_selected_and_forgotten() -> None:
    model, prompt = build("Llama"), ids(2, 45)
    cache = PackedCache(SMALL_PAGES, model)
    model(prompt, past_key_values=cache)
    k, v = cache.layers[1].unpacked()
    cache.batch_repeat_interleave(2)
    assert_same(cache.layers[1].unpacked()[0], k.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_same(cache.layers[1].unpacked()[1], v[[1, 0]])
    check_step("Llama", cache, ids(2, 1, seed=2), model)
    cache.reset()
    assert cache.get_seq_length() == 0
    model(prompt[:1], past_key_values=cache)
    assert cache.get_seq_length() == 45


@torch.no_grad()
def test_salient_tokens_are_those_that_probes_attend_to() -> None:
    model, prompt = build("Llama"), ids(1, 200)
    cache = PackedCache("zipcache-4/2", model)
    model(prompt, past_key_values=cache)
    kv = cache.layers[0].kv
    assert kv.n_pages == 0  # 200 tokens are less than the hot window and a page
    assert not cache.layers[0].observes
    longer = PackedCache(FORMATS["two classes"], model)
    model(prompt, past_key_values=longer)
    high = fastok.reference.kv_layout.unpack_bits(longer.layers[0].kv.classes, 16).sum()
    total = 2 * longer.layers[0].kv.n_pages * 16
    assert 0.5 * total < high < 0.7 * total


@torch.no_grad()
def test_memory_is_told() -> None:
    model = build("Llama", dtype=torch.bfloat16)
    cache = PackedCache("kivi-2", model)
    assert cache.nbytes == 0
    assert "empty" in cache.summary()
    model(ids(1, 2000), past_key_values=cache)
    assert cache.nbytes == sum(layer.kv.nbytes for layer in cache.layers)
    dense_bytes = 2 * 2 * 2 * 2000 * 32 * 2
    assert cache.bits_per_element == pytest.approx(16 * cache.nbytes / dense_bytes)
    assert cache.nbytes < dense_bytes / 3
    assert "2000 tokens" in cache.summary()


@torch.no_grad()
def test_recording_scores_while_decoding() -> None:
    model = build("Llama")
    cache = PackedCache(SMALL_PAGES, model)
    model(ids(1, 45), past_key_values=cache)
    with fastok.record_scores(fastok.ScoreSpec(rows="last")) as recorded:
        model(ids(1, 1, seed=2), past_key_values=cache)
    assert recorded[0][0].shape == (1, 46)
    assert recorded[0][0].sum().item() == pytest.approx(1, abs=1e-5)


def test_refusals() -> None:
    model = build("Llama")
    with pytest.raises(ValueError, match="kivi-2"):
        PackedCache("kivi-3", model)
    with pytest.raises(TypeError, match="model_or_config"):
        PackedCache("kivi-2", 3)
    cache = PackedCache(SMALL_PAGES, model)
    model(ids(1, 45), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="gradients"):
        model(ids(1, 1), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.layers[0].crop(3)
    k = torch.zeros(1, 4, 2, 32)
    checked = PackedCache(SMALL_PAGES, model, check=True)
    model(ids(1, 45), past_key_values=checked)
    with pytest.raises(ValueError, match="v must be finite, got nan at"):
        checked.update(torch.zeros(1, 2, 1, 32), torch.full((1, 2, 1, 32), torch.nan), 0)
    with pytest.raises(NotImplementedError, match="v: required, 16 channels beside 32 of k; supported, equally many"):
        fastok.kv_pack(k, k[..., :16], "kivi-2")
