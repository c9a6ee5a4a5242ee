"""What a smaller KV cache costs: perplexity and recall of fastok's language model, by format and by sparse method.

    python bench/quality_kv.py --json bench/results/quality_kv.json --plot docs/quality-kv.svg

The texts are the standard library's held-out files with key-value pairs among them (fastok.models.recall): every key
stands once in the first part of a text and once more in the last, and there the value is right if the model finds it
most likely. Perplexity, per byte, and recall are both taken on the last part only, a quarter of the text (formats) or
an eighth (sparse methods).

The first part is fed at once, as a prompt: it attends to itself exactly, and is packed (or read sparsely, or evicted)
only then. The last part follows in steps of 16 tokens, of one token for sparse methods, which is how far fastok's
attention reads a cache in place; so all that is measured was told from stored bytes, except what the hot window still
has in full. "bits" are those of a sealed page, parameters and padding included; "whole" are the bytes of the whole
cache, hot window included, over its elements at the end.

Sparse methods keep or read a share of the 4096 tokens. The first layer always attends to everything; in `TidalCache`
the second does too, since it chooses. `SnapKVCache` and `PyramidKVCache` evict from all layers before any key is
asked for again, and keep all tokens that follow.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastok
import torch
import torch.nn.functional as F
from fastok import sparse
from fastok.models.recall import BYTES, MODEL_DIR, RecallTexts, Sequences
from torch import Generator, nn
from transformers import Cache, DynamicCache, LlamaForCausalLM

LENGTHS = (1024, 2048, 4096)
SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
CHANNELS = 8
"""Label channels of 64."""
FULL = "bf16"


@dataclass(frozen=True)
class Method:
    """A way to keep keys and values, and what it is counted by."""

    name: str
    make: Callable[[], Cache]
    bits: float = 16.0
    share: float = 1.0


@dataclass(frozen=True)
class Quality:
    """What one method made of the texts of one length."""

    table: str
    method: str
    length: int
    bits: float
    whole_bits: float
    share: float
    perplexity: float
    recall: float


def formats(model: LlamaForCausalLM) -> list[Method]:
    width = model.config.head_dim
    methods = [Method(FULL, DynamicCache)]
    for name in fastok.KVFormat.presets():
        bits = sum(fastok.KVFormat.preset(name).bits_per_element(width)) / 2
        methods.append(Method(name, lambda name=name: fastok.PackedCache(name, model), bits))
    return methods


def sparse_methods(model: LlamaForCausalLM, length: int, prompt: int) -> list[Method]:
    train = RecallTexts("train")
    calibration = sparse.calibrate(model, [train.batch(4, 512, Generator().manual_seed(0)).tokens], CHANNELS)
    shape, width = calibration.channels.shape, model.config.head_dim
    random = torch.rand(*shape[:2], width, generator=Generator().manual_seed(0)).argsort(-1)[..., :CHANNELS]
    other = sparse.Calibration(random, calibration.statistic, calibration.model, calibration.checksum)
    methods = [Method(FULL, DynamicCache)]
    for share in SHARES:
        n = int(share * length)
        kept = int(share * prompt)

        def double(channels: sparse.Calibration, recent: int = 16, n: int = n) -> Cache:
            return sparse.DoubleSparseCache(channels, n, dense_layers=(0,), recent=recent)

        makes = {
            "Double Sparsity": lambda double=double: double(calibration),
            "random channels": lambda double=double: double(other),
            "most recent": lambda double=double, n=n: double(calibration, n),
            "TidalDecode": lambda n=n: sparse.TidalCache(n, select_layers=(1,)),
            "SnapKV": lambda kept=kept: sparse.SnapKVCache(kept),
            "PyramidKV": lambda kept=kept: sparse.PyramidKVCache(kept, model.config.num_hidden_layers),
        }
        methods += [Method(name, make, share=share) for name, make in makes.items()]
    return methods


@torch.inference_mode()
def answer(model: nn.Module, cache: Cache, texts: Sequences, prompt: int, step: int) -> tuple[float, float]:
    """Perplexity per byte and share of values recalled behind the first ``prompt`` tokens."""
    tokens = texts.tokens
    logits = [model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    for start in range(prompt, tokens.shape[1], step):
        logits.append(model(tokens[:, start : start + step], past_key_values=cache).logits)
    predicted = torch.cat(logits, 1)[:, :-1].float()
    target, recalled = tokens[:, prompt:], texts.recalled[:, prompt:]
    plain = (target < BYTES) & (tokens[:, prompt - 1 : -1] < BYTES)
    loss = F.cross_entropy(predicted[plain], target[plain])
    return math.exp(loss), (predicted.argmax(-1) == target)[recalled].float().mean().item()


def bits_of(cache: Cache, elements: int) -> float:
    """Of all that is stored, per element of the keys and values there were."""
    if isinstance(cache, DynamicCache):
        size = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    else:
        size = cache.nbytes
    return 8 * size / elements


def measure(
    table: str, model: LlamaForCausalLM, methods: list[Method], texts: Sequences, prompt: int, step: int
) -> Iterator[Quality]:
    n, length = texts.tokens.shape
    config = model.config
    elements = 2 * n * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for method in methods:
        cache = method.make()
        perplexity, recall = answer(model, cache, texts, prompt, step)
        whole = bits_of(cache, elements)
        yield Quality(table, method.name, length, method.bits, whole, method.share, perplexity, recall)


def run(folder: Path, tokens: int, lengths: tuple[int, ...], tables: list[str]) -> Iterator[Quality]:
    """Every table's rows, on about ``tokens`` tokens of text per length."""
    fastok.register_transformers()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="fastok").eval()
    texts = RecallTexts("test")
    for table in tables:
        part = 1 / 4 if table == "formats" else 1 / 8
        for length in lengths if table == "formats" else lengths[-1:]:
            batch = texts.batch(max(1, tokens // length), length, Generator().manual_seed(length), recall_last=part)
            prompt = length - int(part * length)
            methods = formats(model) if table == "formats" else sparse_methods(model, length, prompt)
            yield from measure(table, model, methods, batch, prompt, 16 if table == "formats" else 1)


def line(quality: Quality) -> str:
    kept = f"{quality.bits:5.2f} bits" if quality.table == "formats" else f"1/{round(1 / quality.share):<2} tokens"
    return (
        f"{quality.table:8} {quality.length:5}  {quality.method:16} {kept:11} {quality.whole_bits:6.2f} whole  "
        f"perplexity {quality.perplexity:6.3f}  recall {quality.recall:6.1%}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall and perplexity over bits, and over the share of tokens."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "fastok"
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, measured, scale in zip(panels.T, ("recall", "perplexity"), (100, 1), strict=True):
        upper, lower = axes
        kinds = [row for row in rows if row["table"] == "formats"]
        for length in sorted({row["length"] for row in kinds}):
            points = sorted((row["bits"], scale * row[measured]) for row in kinds if row["length"] == length)
            upper.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"{length} tokens")
        longest = [row for row in kinds if row["length"] == max(row["length"] for row in kinds)]
        for row in longest:
            upper.annotate(
                row["method"], (row["bits"], scale * row[measured]), fontsize=7, rotation=40,
                xytext=(3, 5), textcoords="offset points",
            )  # fmt: skip
        upper.set_xscale("log", base=2)
        upper.set_xticks([1.5, 2, 3, 4, 8, 16], ["1.5", "2", "3", "4", "8", "16"])
        upper.set_xlabel("bits per element of a sealed page")
        chosen = [row for row in rows if row["table"] == "sparse"]
        full = next(row for row in chosen if row["method"] == FULL)
        lower.axhline(scale * full[measured], color="grey", linestyle="--", label="all tokens")
        for method in dict.fromkeys(row["method"] for row in chosen if row is not full):
            points = sorted((row["share"], scale * row[measured]) for row in chosen if row["method"] == method)
            lower.plot(*zip(*points, strict=True), "o-", markersize=4, label=method)
        lower.set_xscale("log", base=2)
        lower.set_xticks(SHARES, [f"1/{round(1 / share)}" for share in SHARES])
        lower.set_xlabel(f"share of {full['length']} tokens")
        for panel in axes:
            panel.set_ylabel("values recalled, %" if measured == "recall" else "perplexity per byte")
            panel.grid(alpha=0.3)
        if measured == "perplexity":
            upper.legend()
            lower.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="model folder (default: fastok's)")
    parser.add_argument("--tokens", type=int, default=32768, help="of text, for each length (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="default: %(default)s")
    parser.add_argument("--tables", nargs="+", choices=("formats", "sparse"), default=["formats", "sparse"])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw them there (requirements/plots.txt)")
    options = parser.parse_args(arguments)
    start, rows = time.perf_counter(), []
    for quality in run(options.model, options.tokens, tuple(options.lengths), options.tables):
        rows.append(asdict(quality))
        print(line(quality), flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "tokens": options.tokens}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
