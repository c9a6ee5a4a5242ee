"""Double Sparsity's calibration of transformers models."""

import copy
from pathlib import Path

import pytest
import torch
from fastok.integrations.calibrate import Calibration, calibrate
from fastok.reference.sparse import fisher_sums, most_discriminating
from fastok.testing import assert_same
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=HEADS * HEAD_DIM, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x[B,S,H,D]`` after rotary embedding."""
    half = torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1)
    return x * cos[:, :, None] + half * sin[:, :, None]


def by_hand(model: nn.Module, batches: list[Tensor], statistic: str) -> list[Tensor]:
    """Sums over all tokens, from the hidden states that enter each layer."""
    totals = []
    for index, layer in enumerate(model.model.layers):
        total = 0
        for ids in batches:
            hidden = layer.input_layernorm(model.model(ids, output_hidden_states=True).hidden_states[index])
            q = layer.self_attn.q_proj(hidden).unflatten(-1, (-1, HEAD_DIM))
            k = layer.self_attn.k_proj(hidden).unflatten(-1, (-1, HEAD_DIM))
            if statistic == "qk":
                angles = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
                product = turned(q, *angles) * turned(k, *angles).repeat_interleave(HEADS // KV_HEADS, 2)
            else:
                product = q if statistic == "q" else k
            total = total + product.double().abs().sum((0, 1))
        totals.append(total)
    return totals


@pytest.mark.parametrize("statistic", ["qk", "q", "k"])
@torch.no_grad()
def test_channels_are_those_of_the_sums_by_hand(statistic: str) -> None:
    model, batches = build(), [torch.randint(32, (2, 11)), torch.randint(32, (1, 7))]
    found = calibrate(model, batches, 3, statistic=statistic)
    assert found.channels.shape == (2, KV_HEADS if statistic == "k" else HEADS, 3)
    for channels, total in zip(found.channels, by_hand(model, batches, statistic), strict=True):
        assert_same(channels, total.argsort(dim=-1, descending=True)[:, :3])


@torch.no_grad()
def test_the_release_forgets_all_batches_but_the_last() -> None:
    model, batches = build(), [torch.randint(32, (4, 20)), torch.randint(32, (1, 5))]
    assert_same(calibrate(model, batches, 3, compat=True).channels, calibrate(model, batches[1:], 3).channels)
    assert not torch.equal(calibrate(model, batches, 3).channels, calibrate(model, batches[1:], 3).channels)
    assert_same(
        calibrate(model, batches, 3, statistic="k", compat=True).channels,
        calibrate(model, batches, 3, statistic="k").channels,
    )


@torch.no_grad()
def test_fisher_adds_up_over_batches_and_uses_the_models_scale() -> None:
    model, ids = build(), torch.randint(32, (3, 40))
    first = model.model.layers[0]
    hidden = first.input_layernorm(model.model.embed_tokens(ids))
    angles = model.model.rotary_emb(hidden, torch.arange(40)[None])
    q, k = (
        turned(project(hidden).unflatten(-1, (-1, HEAD_DIM)), *angles)
        for project in (first.self_attn.q_proj, first.self_attn.k_proj)
    )
    for factor in (1, 6):
        for layer in model.model.layers:
            layer.self_attn.scaling = factor * HEAD_DIM**-0.5
        found = calibrate(model, [ids[:2], ids[2:]], 5, statistic="fisher")
        assert_same(found.channels[0], most_discriminating(fisher_sums(q, k, factor * HEAD_DIM**-0.5), 5))


@pytest.mark.parametrize("statistic", ["qk", "k", "fisher"])
def test_padding_does_not_count(statistic: str) -> None:
    model, ids = build(), torch.randint(32, (1, 9))
    padded = torch.cat([ids, torch.randint(32, (1, 6))], 1)
    mask = torch.tensor([[1] * 9 + [0] * 6])
    found = calibrate(model, [{"input_ids": padded, "attention_mask": mask}], 4, statistic=statistic)
    assert_same(found.channels, calibrate(model, [ids], 4, statistic=statistic).channels)


def test_the_model_is_left_as_it_was() -> None:
    model, ids = build(), torch.randint(32, (1, 9))
    before = model(ids).logits
    classes = [type(module) for module in model.modules()]
    calibrate(model, [ids], 2)
    assert [type(module) for module in model.modules()] == classes
    assert_same(model(ids).logits, before)


def test_saving_loading_and_refusing_another_model(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = build()
    found = calibrate(model, [torch.randint(32, (1, 9))], 2)
    found.save(tmp_path / "channels.safetensors")
    loaded = Calibration.load(tmp_path / "channels.safetensors", copy.deepcopy(model).bfloat16())
    assert_same(loaded.channels, found.channels)
    assert (loaded.statistic, loaded.model) == ("qk", "LlamaForCausalLM")
    with pytest.raises(ValueError, match="model must be the one that was calibrated"):
        Calibration.load(tmp_path / "channels.safetensors", build(seed=1))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2)  # adapters are often merged into queries only
    with pytest.raises(ValueError, match="model must be the one that was calibrated"):
        found.check(model)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    numbers = pytest.importorskip("safetensors.torch")
    numbers.save_file({"channels": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Calibration\.save"):
        Calibration.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("channels")
    with pytest.raises(ValueError, match=r"Calibration\.save"):
        Calibration.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("about", "channels"),
    [
        ("{", [[[0]]]),
        ("[]", [[[0]]]),
        ('{"statistic": "qk", "model": ""}', [[[0]]]),
        ('{"statistic": "qk", "model": "", "checksum": "", "more": ""}', [[[0]]]),
        ('{"statistic": "qk", "model": "", "checksum": 0}', [[[0]]]),
        ('{"statistic": "qk", "model": "", "checksum": ""}', [[0]]),
        ('{"statistic": "qk", "model": "", "checksum": ""}', [[[-1]]]),
        ('{"statistic": "qk", "model": "", "checksum": ""}', [[[0.5]]]),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, about: str, channels: list) -> None:
    numbers = pytest.importorskip("safetensors.torch")
    numbers.save_file({"channels": torch.tensor(channels)}, tmp_path / "it", {"fastok.calibration": about})
    with pytest.raises(ValueError, match="path must name a file"):
        Calibration.load(tmp_path / "it")


def test_refusals() -> None:
    model = build()
    with pytest.raises(ValueError, match="r must be within"):
        calibrate(model, [], 9)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [], 2)
    with pytest.raises(ValueError, match="statistic"):
        calibrate(model, [], 2, statistic="v")
    with pytest.raises(ValueError, match=r"batches must have shape \[B,S\] each, .* got \[9\]"):
        calibrate(model, torch.ones(2, 9, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match=r"batches must have tensors or .* got list"):
        calibrate(model, [[1, 2]], 2)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"model must be .* got int 3"):
        calibrate(3, [], 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="q_proj, k_proj"):
        calibrate(nn.Linear(2, 2), [], 2)
