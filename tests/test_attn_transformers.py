"""attn_implementation="fastok" in transformers' own models, against its eager attention."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import fastok
import pytest
import torch
import torchvision_shim  # noqa: F401
from fastok import ScoreSpec
from fastok.integrations import transformers_attention
from fastok.testing import assert_accurate, assert_same
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
DECODERS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "Mistral, sliding window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**TEXT, sliding_window=6)
    ),
    "Gemma 2, softcap, alternating windows": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0)
    ),
    "Gemma 3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA, layer_types=LAYER_TYPES)),
    "Qwen 2.5": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)),
    "gpt-oss, sinks": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**TEXT, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    ),
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 4,
}
ENCODERS: dict[str, Any] = {
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
}
over_decoders = pytest.mark.parametrize("name", DECODERS)
LENGTH = 13
LEFT, RIGHT = torch.ones(2, LENGTH, dtype=torch.long), torch.ones(2, LENGTH, dtype=torch.long)
LEFT[0, :4], RIGHT[0, -4:] = 0, 0
MASKS = {"none": None, "ones": torch.ones_like(LEFT), "left": LEFT, "right": RIGHT}


@pytest.fixture(autouse=True)
def _one_thread_and_registered() -> Iterator[None]:
    fastok.register_transformers()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def build(make: Any) -> tuple[Any, Any]:
    """The same random model twice: with eager attention, and with ours."""
    torch.manual_seed(0)
    eager = make().eval()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastok")
    return eager, ours


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


# ---- logits ----------------------------------------------------------------------------------------------------------


@over_decoders
@pytest.mark.parametrize("padding", MASKS)
def test_decoders(name: str, padding: str) -> None:
    eager, ours = build(DECODERS[name])
    mask = MASKS[padding]
    seen = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    agree(ours(tokens(), attention_mask=mask).logits[seen], eager(tokens(), attention_mask=mask).logits[seen])


@pytest.mark.parametrize("name", ENCODERS)
def test_vision_encoders(name: str) -> None:
    eager, ours = build(ENCODERS[name])
    pixels = torch.randn(2, 3, 28, 28)
    agree(ours(pixels).last_hidden_state, eager(pixels).last_hidden_state)


@pytest.mark.parametrize("padding", MASKS)
def test_text_encoders_with_padding(padding: str) -> None:
    for make in (
        lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(**TEXT, local_attention=6, global_attn_every_n_layers=2)
        ),
    ):  # fmt: skip
        eager, ours = build(make)
        mask = MASKS[padding]
        seen = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
        agree(
            ours(tokens(), attention_mask=mask).last_hidden_state[seen],
            eager(tokens(), attention_mask=mask).last_hidden_state[seen],
        )


def test_a_language_model_with_an_image() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=3,
    )
    eager, ours = build(lambda: transformers.LlavaForConditionalGeneration(config))
    prompt = torch.cat([torch.full((1, 49), 3), tokens(1) + 1], 1).clamp(max=VOCABULARY - 1)
    inputs = {"input_ids": prompt, "pixel_values": torch.randn(1, 3, 28, 28)}
    agree(ours(**inputs).logits, eager(**inputs).logits)


ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def test_encoder_decoders_with_cross_attention() -> None:
    eager, ours = build(lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**ENCODER_DECODER)))
    inputs = {"input_ids": tokens(), "attention_mask": RIGHT}
    agree(
        ours(**inputs, decoder_input_ids=tokens(length=5)).logits,
        eager(**inputs, decoder_input_ids=tokens(length=5)).logits,
    )
    assert_same(*(model.generate(**inputs, num_beams=2, max_new_tokens=6) for model in (ours, eager)))
    config = transformers.WhisperConfig(
        **ENCODER_DECODER, max_source_positions=20, max_target_positions=32, num_mel_bins=8
    )
    eager, ours = build(lambda: transformers.WhisperForConditionalGeneration(config))
    sound = torch.randn(2, 8, 40)
    agree(ours(sound, decoder_input_ids=tokens()).logits, eager(sound, decoder_input_ids=tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_sdpa(dtype: torch.dtype) -> None:
    eager, ours = build(DECODERS["Llama"])
    sdpa = copy.deepcopy(eager).to(dtype)
    sdpa.set_attn_implementation("sdpa")
    truth = eager(tokens(), attention_mask=LEFT).logits[LEFT.bool()].double()
    peer = sdpa(tokens(), attention_mask=LEFT).logits[LEFT.bool()]
    assert_accurate(ours.to(dtype)(tokens(), attention_mask=LEFT).logits[LEFT.bool()], truth, peer)


def test_autocast() -> None:
    _, ours = build(DECODERS["Llama"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(ours(tokens()).logits).all()


@over_decoders
def test_several_sequences_in_one_row(name: str) -> None:
    _, ours = build(DECODERS[name])
    positions = torch.cat([torch.arange(5), torch.arange(3), torch.arange(5)])[None]
    ids = tokens(1)
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    starts = torch.tensor([0, 5, 8, 13], dtype=torch.int32)
    told = ours(
        ids, position_ids=positions, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=5, max_length_k=5
    ).logits
    # gpt-oss does not show its masks where sequences begin.
    for result in (told,) if "gpt-oss" in name else (packed, told):
        agree(result, torch.cat([ours(part).logits for part in ids.split([5, 3, 5], 1)], 1))


# ---- caches and generation -------------------------------------------------------------------------------------------


@over_decoders
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name: str, cache: str) -> None:
    eager, ours = build(DECODERS[name])
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        options = options | {"max_new_tokens": 9, "do_sample": False, "disable_compile": True}
        inputs = {"input_ids": tokens(), "attention_mask": LEFT}
        expected = eager.generate(**inputs, **options)
        assert_same(ours.generate(**inputs, **options, cache_implementation=cache), expected)


@over_decoders
@pytest.mark.parametrize("static", [False, True])
def test_chunked_prefill_and_decoding(name: str, static: bool) -> None:
    """The cache after one piece of the prompt, then several tokens at once, then one by one."""
    eager, ours = build(DECODERS[name])
    ids, mask = tokens(), LEFT
    full = eager(ids, attention_mask=mask).logits
    cache: Any = transformers.DynamicCache(config=ours.config)
    if static:
        cache = transformers.StaticCache(config=ours.config, max_cache_len=20)
    done = 0
    for piece in (5, 4, 1, 1, 2):
        logits = ours(
            ids[:, done : done + piece], attention_mask=mask[:, : done + piece], past_key_values=cache,
            position_ids=torch.arange(done, done + piece).expand(2, -1),
        ).logits  # fmt: skip
        seen = mask[:, done : done + piece].bool()
        agree(logits[seen], full[:, done : done + piece][seen])
        done += piece


def test_no_mask_has_a_row_per_query() -> None:
    sizes: list[int] = []
    forward = transformers_attention.attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        sizes.append(attention_mask.numel())
        return forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("fastok", spy)
    try:
        for name in DECODERS:
            for mask in (None, MASKS["ones"], LEFT):
                build(DECODERS[name])[1](tokens(), attention_mask=mask)
    finally:
        fastok.register_transformers()
    assert max(sizes) <= 2 * LENGTH * len(transformers_attention._windows)
    assert sizes.count(0) == 2 * sum(x > 0 for x in sizes)  # without padding nothing is stored


def test_sinks_do_not_depend_on_the_batch() -> None:
    q, k, v, sinks = torch.randn(6, 5, 37, 16), torch.randn(6, 5, 37, 16), torch.randn(6, 5, 37, 16), torch.randn(5)

    def attend(*qkv: Tensor) -> Tensor:
        return transformers_attention.attention_forward(nn.Module(), *qkv, None, is_causal=True, s_aux=sinks)[0]

    whole = attend(q, k, v)
    for i in range(6):
        assert_same(attend(*(x[i : i + 1].clone() for x in (q, k, v))), whole[i : i + 1])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma 2, softcap, alternating windows", "gpt-oss, sinks"])
def test_training_step(name: str) -> None:
    eager, ours = build(DECODERS[name])
    labels = tokens().masked_fill(RIGHT == 0, -100)
    gradients = []
    for model in (eager.train(), ours.train(), ours):
        if len(gradients) == 2:
            model.zero_grad()
            model.activation_checkpointing_enable()
        with torch.enable_grad():
            model(tokens(), attention_mask=RIGHT, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    agree(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[1])


# ---- scores ----------------------------------------------------------------------------------------------------------


@over_decoders
def test_recorded_scores_are_those_of_the_eager_attentions(name: str) -> None:
    eager, ours = build(DECODERS[name])
    seen = LEFT.bool()
    attentions = eager(tokens(), attention_mask=LEFT, output_attentions=True).attentions
    with fastok.record_scores(ScoreSpec(), ScoreSpec(rows="last", heads="none")) as recorded:
        logits = ours(tokens(), attention_mask=LEFT).logits
    assert_same(logits, ours(tokens(), attention_mask=LEFT).logits)
    assert [layer.layer for layer in recorded] == [0, 1, 2]
    for (sums, last), attention in zip(recorded, attentions, strict=True):
        visible = attention * seen[:, None, :, None]  # rows of padding see nothing in ours
        agree(sums, visible[..., :LENGTH].sum(2).mean(1))
        agree(last, attention[:, :, -1, :LENGTH])


@pytest.mark.parametrize("name", ENCODERS)
def test_output_attentions_gives_the_compact_scores(name: str) -> None:
    eager, ours = build(ENCODERS[name])
    pixels = torch.randn(2, 3, 28, 28)
    attentions = eager(pixels, output_attentions=True).attentions
    with fastok.record_scores(ScoreSpec(rows=0)) as recorded:
        compact = ours(pixels, output_attentions=True).attentions
    assert len(recorded) == len(compact) == len(attentions) == 2
    for scores, attention, layer in zip(compact, attentions, recorded, strict=True):
        agree(scores, attention[:, :, 0].mean(1))
        assert_same(layer[0], scores)


@pytest.mark.parametrize("name", ["Llama", *ENCODERS])
def test_output_attentions_without_a_recorder_is_an_error(name: str) -> None:
    _, ours = build((DECODERS | ENCODERS)[name])
    x = tokens() if name in DECODERS else torch.randn(2, 3, 28, 28)
    with pytest.raises(NotImplementedError, match=r"output_attentions=True: .*with fastok.record_scores"):
        ours(x, output_attentions=True)
    ours(x)


def test_recorders_nest_and_follow_generation() -> None:
    _, ours = build(DECODERS["Llama"])
    with fastok.record_scores() as outer:
        ours(tokens())
        with fastok.record_scores(ScoreSpec(rows="last")) as inner:
            ours.generate(tokens(), max_new_tokens=3, do_sample=False)
        with pytest.raises(RuntimeError, match="recording already"), outer:
            pass
    ours(tokens())
    assert (len(outer), len(inner)) == (12, 9)
    assert [layer[0].shape[1] for layer in inner] == [LENGTH] * 3 + [LENGTH + 1] * 3 + [LENGTH + 2] * 3
    assert outer[0][0].sum() == pytest.approx(2 * LENGTH)
    outer.clear()
    assert len(outer) == 0
    with pytest.raises(TypeError, match="specs must be"):
        fastok.record_scores("last")


def test_recording_while_training_with_checkpoints() -> None:
    _, ours = build(DECODERS["Llama"])
    ours.train()
    ours.activation_checkpointing_enable()
    with torch.enable_grad(), fastok.record_scores() as recorded:
        ours(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert [layer.layer for layer in recorded] == [0, 1, 2]
    assert not recorded[0][0].requires_grad


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma 2, softcap, alternating windows"])
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    _, ours = build(DECODERS[name])
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for mask in (LEFT, None):
        seen = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
        agree(
            compiled(tokens(), attention_mask=mask, use_cache=False).logits[seen],
            ours(tokens(), attention_mask=mask).logits[seen],
        )
    with fastok.record_scores(), pytest.raises(Exception, match="record_scores"):
        compiled(tokens(), attention_mask=LEFT, use_cache=False)


def test_compiled_decoding_step_with_a_static_cache() -> None:
    torch._dynamo.reset()
    eager, ours = build(DECODERS["Llama"])
    full = eager(tokens()).logits
    cache = transformers.StaticCache(config=ours.config, max_cache_len=20)
    ours(tokens()[:, :-3], past_key_values=cache)
    compiled = torch.compile(ours.forward, fullgraph=True, backend="eager")
    for i in range(LENGTH - 3, LENGTH):
        step = compiled(tokens()[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
        agree(step[:, 0], full[:, i])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused_by_name() -> None:
    _, ours = build(DECODERS["Llama"])
    with pytest.raises(NotImplementedError, match=r"attention_mask: required, \[2, 1, 13, 13\]"):
        ours(tokens(), attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    config = transformers.LlamaConfig(**TEXT, attention_dropout=0.1)
    dropping = transformers.LlamaForCausalLM(config).train()
    dropping.set_attn_implementation("fastok")
    with pytest.raises(NotImplementedError, match=r"dropout: required, 0.1; .*attention_dropout"):
        dropping(tokens())
    dropping.eval()(tokens())
    _, chunked = build(
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **TEXT, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
            )
        )
    )
    with pytest.raises(NotImplementedError, match=r"mask_function: required, chunked_overlay"):
        chunked(tokens())
    _, relative = build(
        lambda: transformers.T5Model(
            transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        )
    )
    with pytest.raises(NotImplementedError, match="position_bias: required"):
        relative(input_ids=tokens(), decoder_input_ids=tokens())
    q = torch.randn(2, 4, 5, 8)
    for argument in ("position_bias", "cache", "sinks"):
        with pytest.raises(NotImplementedError, match=f"^{argument}: required, Tensor"):
            transformers_attention.attention_forward(nn.Module(), q, q, q, None, **{argument: q})
    with pytest.raises(NotImplementedError, match="attention_mask: required, one that places 5 causal queries among 4"):
        transformers_attention.attention_forward(nn.Module(), q, q[:, :, 1:], q[:, :, 1:], None)


def test_transformers_is_imported_by_registering_only() -> None:
    code = (
        "import sys, fastok\n"
        "with fastok.record_scores(): pass\n"
        "assert 'transformers' not in sys.modules\n"
        "fastok.register_transformers(); fastok.register_transformers()\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert 'fastok' in ALL_ATTENTION_FUNCTIONS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
