"""The shipped language model, its texts, and the quality bench that reads them through small caches."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import fastok
import pytest
import torch
from fastok import sparse
from fastok.models import recall
from fastok.models.recall import BYTES, KEYS, MODEL_DIR, RecallTexts
from torch import Generator

transformers = pytest.importorskip("transformers")
BENCH = Path(__file__).parents[1] / "bench" / "quality_kv.py"


def batch(seed: int = 0, n: int = 4, length: int = 512, **options: float) -> recall.Sequences:
    return RecallTexts("test").batch(n, length, Generator().manual_seed(seed), **options)


@pytest.fixture(scope="module")
def quality_kv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_kv", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality_kv"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"spacing": 4}, {"spacing": 16, "recall_last": 0.25}], ids=str)
def test_texts_repeat_with_the_seed(options: dict) -> None:
    same, again, other = (batch(seed, **options) for seed in (1, 1, 2))
    assert torch.equal(same.tokens, again.tokens)
    assert torch.equal(same.recalled, again.recalled)
    assert not torch.equal(same.tokens, other.tokens)


@pytest.mark.parametrize(("spacing", "last"), [(4, 0.0), (16, 0.25), (64, 0.0), (64, 0.125)])
def test_every_key_comes_twice_with_its_value(spacing: int, last: float) -> None:
    texts = batch(spacing=spacing, recall_last=last)
    pairs = 512 // spacing
    for row, recalled in zip(texts.tokens.tolist(), texts.recalled.tolist(), strict=True):
        seen: dict[int, int] = {}
        for place in (i for i, token in enumerate(row) if BYTES <= token < BYTES + KEYS):
            key, value = row[place : place + 2]
            assert value >= BYTES + KEYS
            assert recalled[place + 1] == (key in seen)
            if key in seen:
                assert seen[key] == value
                assert place >= 512 * (1 - last) or not last
            seen[key] = value
        assert len(seen) == pairs
        assert sum(recalled) == pairs


def test_files_for_testing_are_not_trained_on() -> None:
    train, test = (RecallTexts(split).text for split in ("train", "test"))
    assert len(train) > 5 * len(test) > 1_000_000
    seen = train.numpy().tobytes()
    pieces = [test[start : start + 200].numpy().tobytes() for start in range(0, len(test) - 200, len(test) // 50)]
    assert sum(piece in seen for piece in pieces) <= 5  # files quote each other, and seldom a whole screen


# ---- model -----------------------------------------------------------------------------------------------------------


def test_the_model_is_small_and_a_llama() -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8 * 10**6
    config = model.config
    assert (config.head_dim, config.num_key_value_heads, config.num_attention_heads) == (64, 2, 4)


def test_the_model_recalls(quality_kv: ModuleType) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    texts = batch(n=2, length=1024, spacing=32, recall_last=0.25)
    perplexity, share, with_pairs = quality_kv.answer(model, transformers.DynamicCache(), texts, 768, 256)
    assert share > 0.9
    assert perplexity < 5.0 < with_pairs  # which key comes, nothing tells
    texts.tokens[:, :768][texts.tokens[:, :768] >= BYTES + KEYS] = BYTES + KEYS  # other values to be remembered
    assert quality_kv.answer(model, transformers.DynamicCache(), texts, 768, 256)[1] < 0.1


def test_double_sparsity_finds_what_a_window_and_random_channels_miss(quality_kv: ModuleType) -> None:
    fastok.register_transformers()
    options = {"dtype": torch.bfloat16, "attn_implementation": "fastok"}
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL_DIR, **options).eval()
    training = RecallTexts("train").batch(4, 512, Generator().manual_seed(0)).tokens
    texts = batch(n=4, length=1024, spacing=32, recall_last=0.125)

    def quality(calibration: sparse.Calibration, recent: int = 16) -> tuple[float, float]:
        """Values recalled, and the perplexity of everything."""
        cache = sparse.DoubleSparseCache(calibration, 64, dense_layers=(0,), recent=recent)
        _, recalled, with_pairs = quality_kv.answer(model, cache, texts, 896, 1)
        return recalled, with_pairs

    found = sparse.calibrate(model, [training], 8, statistic="fisher")
    random = [
        torch.rand(4, 4, 64, generator=Generator().manual_seed(draw)).argsort(-1)[..., :8].contiguous()
        for draw in range(4)
    ]
    at_random = [quality(sparse.Calibration(channels, "random", found.model, found.checksum)) for channels in random]
    mean_recalled, mean_perplexity = (sum(x) / len(x) for x in zip(*at_random, strict=True))
    recalled, perplexity = quality(found)
    assert recalled > 0.95
    assert recalled > mean_recalled + 0.02
    assert perplexity < mean_perplexity - 1
    recalled, of_newest = quality(found, recent=64)
    assert recalled < 0.2
    assert perplexity < of_newest / 1.5


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_the_bench_tells_formats_and_methods_apart(quality_kv: ModuleType, tmp_path: Path) -> None:
    file, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    arguments = ["--tokens", "256", "--lengths", "256", "--shares", "0.5", "--json", str(file), "--plot", str(picture)]
    quality_kv.main([*arguments, "--tables", "formats"])
    quality_kv.main([*arguments, "--tables", "sparse"])
    rows = {(row["table"], row["method"]): row for row in json.loads(file.read_text())["rows"]}
    assert {method for table, method in rows if table == "formats"} > set(quality_kv.fastok.KVFormat.presets())
    full, coarse, fine = (rows["formats", name] for name in ("bf16", "kivi-2", "int8"))
    assert full["bits"] == full["whole_bits"] == 16
    assert fine["bits"] > coarse["bits"]
    assert fine["whole_bits"] > coarse["whole_bits"]
    assert abs(fine["perplexity"] - full["perplexity"]) < 0.1
    assert coarse["perplexity"] != full["perplexity"]  # packed bytes were read
    newest, all_tokens = rows["sparse", "most recent"], rows["sparse", "bf16"]
    assert newest["recall"] < all_tokens["recall"]
    assert newest["perplexity_with_pairs"] > all_tokens["perplexity_with_pairs"]
    for name in ("StreamingLLM", "EMA-Sink", "RazorAttention"):
        assert rows["sparse", name]["whole_bits"] < all_tokens["whole_bits"]
    assert rows["sparse", "SnapKV"]["whole_bits"] < rows["sparse", "double sparse, qk"]["whole_bits"]
    random = rows["sparse", "random channels"]
    assert random["draws"] == quality_kv.DRAWS > 1
    assert random["perplexity_sd"] > 0
    assert newest["draws"] == 1
    assert picture.stat().st_size > 0
