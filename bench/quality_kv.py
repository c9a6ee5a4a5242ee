"""What a smaller KV cache costs: perplexity and recall of fastok's language model, by format and by sparse method.

    python bench/quality_kv.py --json bench/results/quality_kv.json --plot docs/quality-kv.png

The texts are the standard library's held-out files with key-value pairs among them (fastok.models.recall): every key
stands once in the first part of a text and once more in the last, and there its value counts as recalled if the model
finds it the likeliest token. Recall and perplexity (per byte of the file) are both taken on the last part only: a
quarter of the text for formats, an eighth for sparse methods. Perplexity "with pairs" is that of all tokens there, keys
and the values to be recalled included: of the text as it is.

The first part is fed at once, as a prompt: it attends to itself exactly, and is packed, evicted or chosen from only
then. The last part follows in steps of 16 tokens (sparse methods: of one), as many as fastok's attention reads a cache
in place for. So what is measured was told from stored bytes, but for the hot window, which is near and holds few keys.
"bits" are those of sealed pages, parameters and padding included; "whole" is the whole cache at the end, hot window,
labels and all, over the elements of all keys and values.

Sparse methods read or keep a share of the text's tokens. The first layer always reads everything, and `TidalCache`'s
second too, since it chooses. `SnapKVCache` and `PyramidKVCache` evict from all layers, by what the prompt's end attends
to: before any key is asked for. They keep all tokens after the prompt; `H2OCache` goes on evicting. `StreamingCache` (4
sinks) and `EMASinkCache` (a third of it sinks) have no more of the prompt either, in any layer; `RazorCache` gives half
of its share to whole heads and the rest to windows, where that is a head at least. "double sparse" is
`DoubleSparseCache` with the channels that `calibrate` finds by that statistic in 2,048 tokens of the training texts;
"half recent" always reads as many of the newest tokens as of those its labels choose (the others 16 of them); "random
channels" has channels drawn at random, the mean of several draws; "most recent" reads the newest tokens only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastok
import torch
import torch.nn.functional as F
from fastok import sparse, viz
from fastok.models.recall import BYTES, MODEL_DIR, RecallTexts, Sequences
from torch import Generator, nn
from transformers import Cache, DynamicCache, LlamaForCausalLM

LENGTHS = {"formats": (1024, 2048, 4096), "sparse": (2048, 4096)}
SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
CHANNELS = 8
"""Label channels of 64."""
DRAWS = 8
"""Of random channels: one draw recalls up to a third more values than another."""
FULL = "bf16"


@dataclass(frozen=True)
class Table:
    """How texts are made and read: the last part's share, tokens per key, tokens per step."""

    tail: float
    spacing: int
    step: int


TABLES = {"formats": Table(1 / 4, 32, 16), "sparse": Table(1 / 8, 64, 1)}


@dataclass(frozen=True)
class Method:
    """A way to keep keys and values, once or in several draws, and what it is counted by."""

    name: str
    makes: Sequence[Callable[[], Cache]]
    bits: float = 16.0
    share: float = 1.0


@dataclass(frozen=True)
class Quality:
    """What one method made of the texts of one length: means over its draws, and their standard deviations."""

    table: str
    method: str
    length: int
    bits: float
    whole_bits: float
    share: float
    perplexity: float
    recall: float
    perplexity_with_pairs: float
    draws: int
    perplexity_sd: float
    recall_sd: float
    perplexity_with_pairs_sd: float


def formats(model: LlamaForCausalLM) -> list[Method]:
    width = model.config.head_dim
    methods = [Method(FULL, [DynamicCache])]
    for name in fastok.KVFormat.presets():
        bits = sum(fastok.KVFormat.preset(name).bits_per_element(width)) / 2
        methods.append(Method(name, [lambda name=name: fastok.PackedCache(name, model)], bits))
    return methods


def sparse_methods(model: LlamaForCausalLM, length: int, prompt: int, shares: Sequence[float]) -> list[Method]:
    batches = [RecallTexts("train").batch(4, 512, Generator().manual_seed(0)).tokens]
    calibrations = {s: sparse.calibrate(model, batches, CHANNELS, statistic=s) for s in ("qk", "q", "k", "fisher")}
    some, width = calibrations["qk"], model.config.head_dim
    random = []
    for draw in range(DRAWS):
        order = torch.rand(*some.channels.shape[:2], width, generator=Generator().manual_seed(draw)).argsort(-1)
        random.append(sparse.Calibration(order[..., :CHANNELS], "random", some.model, some.checksum))
    methods = [Method(FULL, [DynamicCache])]
    for share in shares:
        n = int(share * length)
        kept = int(share * prompt)

        def double(channels: sparse.Calibration, recent: int = 16, n: int = n) -> Callable[[], Cache]:
            return lambda: sparse.DoubleSparseCache(channels, n, dense_layers=(0,), recent=recent)

        makes: dict[str, list[Callable[[], Cache]]] = {
            **{f"double sparse, {name}": [double(found)] for name, found in calibrations.items()},
            "fisher, half recent": [double(calibrations["fisher"], n // 2)],
            "random channels": [double(channels) for channels in random],
            "most recent": [double(some, n)],
            "TidalDecode": [lambda n=n: sparse.TidalCache(n, select_layers=(1,))],
            "SnapKV": [lambda kept=kept: sparse.SnapKVCache(kept)],
            "H2O": [lambda n=n: sparse.H2OCache(n // 2, n // 2)],
            "PyramidKV": [lambda kept=kept: sparse.PyramidKVCache(kept, model.config.num_hidden_layers)],
            "StreamingLLM": [lambda n=n: sparse.StreamingCache(4, n - 4, model)],
            "EMA-Sink": [lambda n=n: sparse.EMASinkCache(n // 3, n - n // 3, model=model)],
            **razor(model, prompt, share),
        }
        methods += [Method(name, make, share=share) for name, make in makes.items()]
    return methods


def razor(model: LlamaForCausalLM, prompt: int, share: float) -> dict[str, list[Callable[[], Cache]]]:
    """Half the budget for whole heads, rounded to the nearest number of them, and what is left for the windows."""
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    whole = round(share / 2 * heads)
    recent = int((share * heads - whole) / (heads - whole) * prompt)
    if whole == 0:
        return {}
    chosen = sparse.retrieval_heads(model, induction=whole / heads, echo=0, length=500)
    return {"RazorAttention": [lambda: sparse.RazorCache(chosen, recent=recent - 4, share=prompt)]}


@torch.inference_mode()
def answer(model: nn.Module, cache: Cache, texts: Sequences, prompt: int, step: int) -> tuple[float, float, float]:
    """Behind the first ``prompt`` tokens, perplexity per byte, share of values recalled, perplexity of all tokens."""
    tokens = texts.tokens
    logits = [model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    for start in range(prompt, tokens.shape[1], step):
        logits.append(model(tokens[:, start : start + step], past_key_values=cache).logits)
    predicted = torch.cat(logits, 1)[:, :-1].float()
    target, recalled = tokens[:, prompt:], texts.recalled[:, prompt:]
    plain = (target < BYTES) & (tokens[:, prompt - 1 : -1] < BYTES)
    losses = F.cross_entropy(predicted.mT, target, reduction="none")
    found = (predicted.argmax(-1) == target)[recalled].float().mean().item()
    return math.exp(losses[plain].mean()), found, math.exp(losses.mean())


def bits_of(cache: Cache, elements: int) -> float:
    """Of all that is stored, per element of the keys and values there were."""
    if isinstance(cache, DynamicCache):
        size = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    else:
        size = cache.nbytes
    return 8 * size / elements


def measure(model: LlamaForCausalLM, table: str, length: int, n: int, shares: Sequence[float]) -> Iterator[Quality]:
    """One table's rows on ``n`` texts of ``length`` tokens."""
    how, config = TABLES[table], model.config
    generator = Generator().manual_seed(length)
    texts = RecallTexts("test").batch(n, length, generator, spacing=how.spacing, recall_last=how.tail)
    prompt = length - int(how.tail * length)
    elements = 2 * n * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for method in formats(model) if table == "formats" else sparse_methods(model, length, prompt, shares):
        answers = []
        for make in method.makes:
            cache = make()
            answers.append(answer(model, cache, texts, prompt, how.step))
        whole, draws = bits_of(cache, elements), len(answers)
        means = [statistics.fmean(x) for x in zip(*answers, strict=True)]
        spreads = [statistics.stdev(x) if draws > 1 else 0.0 for x in zip(*answers, strict=True)]
        yield Quality(table, method.name, length, method.bits, whole, method.share, *means, draws, *spreads)


def line(quality: Quality) -> str:
    kept = f"{quality.bits:5.2f} bits" if quality.table == "formats" else f"1/{round(1 / quality.share):<2} tokens"
    spread = f"  ({quality.draws} draws, ± {quality.perplexity_sd:.3f}, ± {quality.recall_sd:.1%})"
    return (
        f"{quality.table:8} {quality.length:5}  {quality.method:21} {kept:11} {quality.whole_bits:6.2f} whole  "
        f"perplexity {quality.perplexity:6.3f}, with pairs {quality.perplexity_with_pairs:7.3f}  "
        f"recall {quality.recall:6.1%}{spread if quality.draws > 1 else ''}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall and perplexity over bits, and for each length over the share of tokens; what ``rows`` have of it."""
    formats = [row for row in rows if row["table"] == "formats"]
    lengths = sorted({row["length"] for row in rows if row["table"] == "sparse"})
    panels = [(formats, "formats", "bits", "bits per element")] if formats else []
    for length in lengths:
        of_length = [row for row in rows if row["table"] == "sparse" and row["length"] == length]
        panels.append((of_length, f"sparse, {length} tokens", "share", "share of tokens"))
    pictures, captions = [], []
    for of_panel, caption, axis, x_label in panels:
        longest = max(row["length"] for row in of_panel)
        for measured, scale in (("recall", 100), ("perplexity", 1)):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in of_panel:
                name = f"{row['length']} tokens" if axis == "bits" else row["method"]
                curves.setdefault(name, []).append((row[axis], scale * row[measured]))
            notes = [
                (row[axis], scale * row[measured], row["method"])
                for row in of_panel
                if axis == "bits" and row["length"] == longest and row["method"] != FULL
            ]
            # One point alone is drawn as a line from end to end, which is meant for what reads everything.
            curves = {name: points for name, points in curves.items() if len(points) > 1 or name == FULL}
            title = "values recalled, %" if measured == "recall" else "perplexity per byte"
            x_text = "{:.1f}".format if axis == "bits" else lambda x: f"1/{1 / x:.0f}"
            pictures.append(viz.draw_curves(curves, title, x_label, notes=notes, x_text=x_text))
            captions.append(f"{caption}: {measured}")
    viz.save(viz.picture_grid(pictures, captions, columns=2), path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="model folder (default: fastok's)")
    parser.add_argument("--tokens", type=int, default=16384, help="of text, for each length (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of texts (default: {LENGTHS})")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of tokens, for sparse methods")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--json", type=Path, help="write the figures there, in place of the same tables' and lengths'")
    parser.add_argument("--plot", type=Path, help="draw the figures of --json there")
    options = parser.parse_args(arguments)
    start, rows = time.perf_counter(), []
    fastok.register_transformers()
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="fastok").eval()
    for table in options.tables:
        for length in options.lengths or LENGTHS[table]:
            for quality in measure(model, table, length, max(1, options.tokens // length), options.shares):
                rows.append(asdict(quality))
                print(line(quality), flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        if options.json.exists():
            measured = {(row["table"], row["length"]) for row in rows}
            old = json.loads(options.json.read_text())["rows"]
            rows += [row for row in old if (row["table"], row["length"]) not in measured]
        rows.sort(key=lambda row: (row["table"], row["length"]))
        about = {"torch": torch.__version__, "python": platform.python_version(), "tokens": options.tokens}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
