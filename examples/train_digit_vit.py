"""Trains the small ViT that fastok ships, on handwritten digits pasted into photographs and clutter.

    python examples/train_digit_vit.py

Takes about half an hour on two cores, writes config.json and model.safetensors (fp16) and prints the accuracy of the
reloaded weights on 2,000 held-out scenes. A ViT learns slowly from scratch, so training leans on things that the
exported model does without: extra heads that name the digit under every patch, trace its ink and redraw it upright;
scenes that start easy; and a window of patches around the digit that grows to the whole scene.
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
from fastok.models.digits import (
    BACKGROUND,
    IMAGE_SIZE,
    MODEL_DIR,
    NUM_CLASSES,
    PATCH_SIZE,
    PIXEL_MEAN,
    PIXEL_STD,
    DigitScenes,
    Scenes,
    held_out,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
BATCH = 64
"""Scenes per optimiser step."""


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, of Muon (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder (default: %(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "train_digit_vit.pt",
        help="where progress is kept; an interrupted run continues from it (default: %(default)s)",
    )
    return parser.parse_args()


def build_model() -> ViTForImageClassification:
    """A 6-layer ViT with 14 x 14 patches; eager attention, whose backward pass is faster than SDPA's on CPUs."""
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        id2label={digit: str(digit) for digit in range(NUM_CLASSES)},
        label2id={str(digit): digit for digit in range(NUM_CLASSES)},
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = 0.5 * sine_positions(config.hidden_size)
    return model


def sine_positions(width: int) -> Tensor:
    """float32 [196, width]: sines and cosines of row and column, a start that already knows which patches are near."""
    place = torch.arange(IMAGE_SIZE // PATCH_SIZE, dtype=torch.float32)
    angles = place[:, None] * torch.logspace(0.0, -1.5, width // 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    side = len(place)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(PATCHES, width)


class DigitTrainer(nn.Module):
    """The ViT plus heads for dense targets, without which it takes far longer to find out what to look at."""

    INK_LAYER = 2

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()
        width = self.model.config.hidden_size
        self.patch_head = nn.Linear(width, BACKGROUND + 1)
        self.ink_head = nn.Linear(width, PATCH_SIZE**2)
        self.glyph_head = nn.Linear(width, 64)
        # Most patches show no digit and would otherwise dominate the patch loss.
        self.register_buffer("patch_weights", torch.tensor([1.0] * NUM_CLASSES + [0.2]), persistent=False)
        self._kept: Tensor | None = None
        self.model.vit.embeddings.register_forward_hook(self._drop_tokens)

    def _drop_tokens(self, module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
        if self._kept is None:
            return tokens
        return torch.cat((tokens[:, :1], take(tokens[:, 1:], self._kept)), dim=1)

    def loss(self, scenes: Scenes, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Training loss and class logits [n, 10]; ``kept`` int64 [n, k] names the patches to look at, None is all."""
        self._kept = kept
        output = self.model.vit(scenes.pixels, output_hidden_states=True)
        tokens = output.last_hidden_state
        logits = self.model.classifier(tokens[:, 0])
        patches = self.patch_head(tokens[:, 1:]).float()
        ink = self.ink_head(output.hidden_states[self.INK_LAYER][:, 1:]).float()
        glyphs = self.glyph_head(tokens).float()

        side = IMAGE_SIZE // PATCH_SIZE
        patch_labels = scenes.patch_labels[:, :, None]
        ink_target = scenes.ink.view(-1, side, PATCH_SIZE, side, PATCH_SIZE).transpose(2, 3).flatten(3).flatten(1, 2)
        if kept is not None:
            patch_labels, ink_target = take(patch_labels, kept), take(ink_target, kept)
        patch_labels = patch_labels[:, :, 0]
        # The class token and each patch on the digit redraw it; background patches have nothing to redraw.
        glyph_error = (glyphs - scenes.glyphs.flatten(1)[:, None]).square().mean(-1)
        inked = (patch_labels != BACKGROUND).float()
        glyph_loss = glyph_error[:, 0].mean() + (glyph_error[:, 1:] * inked).sum() / inked.sum()
        loss = (
            F.cross_entropy(logits.float(), scenes.labels)
            + F.cross_entropy(patches.flatten(0, 1), patch_labels.flatten(), weight=self.patch_weights)
            + 3.0 * F.binary_cross_entropy_with_logits(ink, ink_target)
            + 5.0 * glyph_loss
        )
        return loss, logits


def take(values: Tensor, kept: Tensor) -> Tensor:
    """[n, patches, width] and int64 [n, k] to [n, k, width]."""
    return values.gather(1, kept[:, :, None].expand(-1, -1, values.shape[-1]))


def choose_patches(patch_labels: Tensor, window: int, generator: Generator) -> Tensor | None:
    """int64 [n, window**2]: a random square of patches that holds the digit; None when the square is the whole scene.

    A square keeps background and clutter as dense as they are. Thinning out the background alone would be a leak: the
    places of the patches left over would draw the digit.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    if window >= side:
        return None
    inked = (patch_labels != BACKGROUND).view(-1, side, side)
    starts = []
    for lines in (inked.any(2), inked.any(1)):
        first = lines.float().argmax(1)
        last = side - 1 - lines.flip(1).float().argmax(1)
        low = (last + 1 - window).clamp(0, side - window)
        high = first.clamp(max=side - window)
        # A digit wider than the window leaves low above high; it is then cut at a random side.
        share = torch.rand(len(lines), generator=generator)
        starts.append((low + share * (high - low)).round().long())
    offsets = torch.arange(window)
    rows, columns = (start[:, None] + offsets for start in starts)
    return (rows[:, :, None] * side + columns[:, None]).flatten(1)


def window_side(progress: float) -> int:
    """Side of the square of patches to look at: small at first for speed, the whole scene at the end."""
    return 8 if progress < 0.55 else 11 if progress < 0.8 else IMAGE_SIZE // PATCH_SIZE


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine."""
    warm_up = max(1, steps // 40)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def moving_average(average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
    """Exponential average whose memory grows with the run, so that the random start is soon forgotten."""
    return torch.lerp(current, average, min(0.998, (1 + int(steps)) / (10 + int(steps))))


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 matrix products beat float32 ones on this CPU."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(4096, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
        for _ in range(3):
            start = time.perf_counter()
            left @ right
            elapsed = time.perf_counter() - start
        seconds.append(elapsed)
    return seconds[1] < 0.8 * seconds[0]


def train(arguments: argparse.Namespace) -> ViTForImageClassification:
    """Trains for ``arguments.steps`` steps and returns the ViT with averaged weights."""
    torch.manual_seed(arguments.seed)
    trainer = DigitTrainer()
    average = AveragedModel(trainer.model, avg_fn=moving_average)
    # Muon needs about a third of the scenes AdamW does, but suits only the matrices inside the layers.
    matrices = [p for p in trainer.model.vit.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in trainer.parameters() if id(p) not in inside]
    optimisers: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    }
    peaks = {"muon": arguments.learning_rate, "adamw": arguments.learning_rate / 2}
    parts = {"trainer": trainer, "average": average, **optimisers}
    first = 0
    run = (arguments.steps, arguments.learning_rate, arguments.seed)
    if arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint)
        if saved["run"] != run:
            raise SystemExit(f"{arguments.checkpoint} belongs to another run; remove it or pass --checkpoint")
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    scenes = DigitScenes("train")
    bfloat16 = has_fast_bfloat16()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=arguments.steps, completed=first)
        loss_mean, accuracy = 0.0, 0.0
        for step in range(first, arguments.steps):
            done = step / arguments.steps
            for name, optimiser in optimisers.items():
                optimiser.param_groups[0]["lr"] = peaks[name] * schedule(step, arguments.steps)
            # One random stream per step, so that a continued run sees the scenes it would have seen.
            stream = np.random.SeedSequence([arguments.seed, step]).generate_state(1)
            generator = Generator().manual_seed(int(stream[0]))
            easy = max(0.0, 1.0 - done / 0.3)
            batch = scenes.batch(BATCH, generator, clutter=1.0 - 0.9 * easy, min_size=32.0 + 12.0 * easy)
            kept = choose_patches(batch.patch_labels, window_side(done), generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss, logits = trainer.loss(batch, kept)
            loss.backward()
            hits = (logits.argmax(1) == batch.labels).float().mean().item()
            loss_mean += 0.03 * (loss.item() - loss_mean)
            accuracy += 0.03 * (hits - accuracy)
            nn.utils.clip_grad_norm_(trainer.parameters(), 3.0)
            for optimiser in optimisers.values():
                optimiser.step()
                optimiser.zero_grad()
            average.update_parameters(trainer.model)
            status = f"loss {loss_mean:.3f}  training accuracy {accuracy:.1%}"
            progress.update(task, advance=1, description=status)
            if (step + 1) % 100 == 0:
                progress.console.print(f"step {step + 1}: {status}")
                state = {name: part.state_dict() for name, part in parts.items()}
                partial = arguments.checkpoint.with_suffix(".part")
                torch.save({"run": run, "step": step + 1, **state}, partial)
                partial.replace(arguments.checkpoint)
    averaged: ViTForImageClassification = average.module
    return averaged


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Writes fp16 weights that ``from_pretrained`` loads as float32, the fast type on most CPUs."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    ).save_pretrained(folder)


@torch.inference_mode()
def evaluate(folder: Path, scenes: Scenes) -> float:
    """Top-1 accuracy of the saved model."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    hits = 0
    for pixels, labels in zip(scenes.pixels.split(50), scenes.labels.split(50), strict=True):
        hits += int((model(pixels).logits.argmax(1) == labels).sum())
    return hits / len(scenes.labels)


def main() -> None:
    """Trains, saves, and scores what was saved."""
    arguments = parse_arguments()
    start = time.perf_counter()
    model = train(arguments)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    save(model, arguments.out)
    scenes = held_out(2000)
    print(f"held-out top-1 accuracy on {len(scenes.labels)} scenes: {evaluate(arguments.out, scenes):.2%}")
    arguments.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
