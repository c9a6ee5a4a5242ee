"""Trains the small language model that fastok ships, on Python's standard library and on remembering key-value pairs.

    python examples/train_recall_lm.py

Takes under an hour on two cores, writes config.json and model.safetensors (bf16), and prints the perplexity of held-out
text and the share of values recalled, at several lengths. Short sequences dense with pairs come first: looking back is
learned there and stretched later. On a machine that has other work, set OMP_WAIT_POLICY=passive: threads that wait for
each other would spin, which costs more than the training.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastok.models.recall import BYTES, MODEL_DIR, VOCABULARY, RecallTexts
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, nn
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 4096
"""Tokens per optimiser step."""
STAGES = ((0.08, 64, 4), (0.21, 256, 16), (0.50, 512, 32), (0.66, 1024, 32), (0.76, 2048, 32), (1.0, 4096, 32))
"""Up to which share of the steps sequences have which length and which spacing of keys: at first nothing but pairs."""
DENSE = (256, 8)
"""Length and spacing in every fourth step after the first stage, so that looking back is not forgotten."""


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2300, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak, of Muon (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--far",
        type=float,
        default=0.0,
        help="in two of three steps of the longest stage, keys come again only in this last share of a sequence, so "
        "that they are far from where they came first; 0: anywhere, as for the shipped weights (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder (default: %(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "train_recall_lm.pt",
        help="where progress is kept; an interrupted run continues from it (default: %(default)s)",
    )
    return parser.parse_args()


def build_model() -> LlamaForCausalLM:
    """Four layers of width 256: four query heads of 64 channels share two KV heads."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Scales every matrix by its fan-in, and has one head of the first layer look at the token before.

    Recall needs such a head: the token behind a key must know which key that was. Found by chance, it takes longer
    than all the rest of the training. All embeddings share their first channel, from which this head's queries are its
    keys turned by one position.
    """
    config = model.config
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 2:
            out = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=out * weight.shape[1] ** -0.5)
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding)
    embedding[:, 0] = 0.5 * config.hidden_size**0.5
    turn, half = model.model.rotary_emb.inv_freq, config.head_dim // 2
    attention = model.model.layers[0].self_attn
    query, key = (x.weight[: config.head_dim] for x in (attention.q_proj, attention.k_proj))
    for weight, start in ((query, torch.cat([turn.cos(), -turn.sin()])), (key, torch.ones(2 * half))):
        weight *= 0.1
        weight[:, 0] = 1.3 * start
    key[half:, 0] = 0.0


def stage_at(step: int, steps: int) -> tuple[int, int]:
    """Tokens per sequence and per key."""
    progress = step / steps
    if progress >= STAGES[0][0] and step % 4 == 3:
        return DENSE
    return next((length, spacing) for end, length, spacing in STAGES if progress < end)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine."""
    warm_up = max(1, steps // 40)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Trains for ``arguments.steps`` steps."""
    torch.manual_seed(arguments.seed)
    model = build_model()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimisers: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    }
    peaks = {"muon": arguments.learning_rate, "adamw": arguments.learning_rate / 2}
    parts = {"model": model, **optimisers}
    first = 0
    run = (arguments.steps, arguments.learning_rate, arguments.seed, arguments.far)
    if arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint)
        if saved["run"] != run:
            raise SystemExit(f"{arguments.checkpoint} belongs to another run; remove it or pass --checkpoint")
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    texts = RecallTexts("train")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=arguments.steps, completed=first)
        loss_mean, recall, status = 6.0, 0.0, ""
        for step in range(first, arguments.steps):
            length, spacing = stage_at(step, arguments.steps)
            for name, optimiser in optimisers.items():
                optimiser.param_groups[0]["lr"] = peaks[name] * schedule(step, arguments.steps)
            # One random stream per step, so that a continued run sees the texts it would have seen.
            stream = np.random.SeedSequence([arguments.seed, step]).generate_state(1)
            generator = Generator().manual_seed(int(stream[0]))
            # At random places a key seldom is most of the sequence away from where it came first.
            last = arguments.far if length == STAGES[-1][1] and step % 4 < 2 else 0.0
            batch = texts.batch(TOKENS // length, length, generator, spacing=spacing, recall_last=last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch.tokens, use_cache=False).logits[:, :-1]
            target, recalled = batch.tokens[:, 1:], batch.recalled[:, 1:]
            # Where nothing tells the next token (a key, a key's first value) there is nothing to learn.
            losses = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
            told = recalled | (target < BYTES)
            loss = losses[told].mean() + losses[recalled].mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers.values():
                optimiser.step()
                optimiser.zero_grad()
            hits = (logits.argmax(-1) == target)[recalled].float().mean().item()
            if (length, spacing) != DENSE:
                loss_mean += 0.05 * (losses[told].mean().item() - loss_mean)
                recall += 0.05 * (hits - recall)
                status = f"length {length}  loss {loss_mean:.3f}  recall {recall:.1%}"
            progress.update(task, advance=1, description=status)
            if (step + 1) % 50 == 0:
                progress.console.print(f"step {step + 1}: {status}")
                state = {name: part.state_dict() for name, part in parts.items()}
                partial = arguments.checkpoint.with_suffix(".part")
                torch.save({"run": run, "step": step + 1, **state}, partial)
                partial.replace(arguments.checkpoint)
    return model


@torch.inference_mode()
def evaluate(folder: Path, length: int, tokens: int = 65536) -> tuple[float, float]:
    """Perplexity per byte of held-out text, and the share of values recalled, of the saved model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = RecallTexts("test")
    batch = texts.batch(max(1, tokens // length), length, Generator().manual_seed(1), recall_last=0.25)
    loss, hits, text, recalled = 0.0, 0, 0, 0
    for row, again in zip(batch.tokens.split(1), batch.recalled.split(1), strict=True):
        logits = model(row).logits[0, :-1]
        target, again = row[0, 1:], again[0, 1:]
        plain = (target < BYTES) & (row[0, :-1] < BYTES)
        losses = F.cross_entropy(logits, target, reduction="none")
        loss, text = loss + losses[plain].sum().item(), text + int(plain.sum())
        hits, recalled = hits + int((logits.argmax(-1) == target)[again].sum()), recalled + int(again.sum())
    return math.exp(loss / text), hits / recalled


def main() -> None:
    """Trains, saves, and scores what was saved."""
    arguments = parse_arguments()
    start = time.perf_counter()
    model = train(arguments)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    model.bfloat16().save_pretrained(arguments.out)
    for length in (1024, 2048, 4096):
        perplexity, recall = evaluate(arguments.out, length)
        print(f"{length} tokens: perplexity per byte {perplexity:.3f}, values recalled {recall:.1%}")
    arguments.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
