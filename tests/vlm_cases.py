"""Tiny vision-language models with random weights, prompts for them, and what is left of prompts worked out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fastok
import pytest
import torch
import torchvision_shim  # noqa: F401
import transformers
from fastok import SoftMap, TokenMap
from fastok.reducers import TokenContext
from torch import Tensor, nn

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 4,
}
SIDE, N = 6, 36
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 4096,
}
IMAGE, VIDEO = 98, 97


@dataclass(frozen=True)
class Picture:
    """An image in a prompt (or a video): its number, for the random pixels, and its size where that counts."""

    number: int
    size: tuple[int, int] = (24, 24)
    frames: int = 0


Prompt = Sequence[int | Picture]


@dataclass(frozen=True)
class Case:
    """One model class.

    Attributes:
        make: the model.
        tokens: how many tokens an image makes.
        pixels: from the images of all prompts in order to the model's further inputs.
        kept: from an image and bool ``[crops,N]``, the tokens that a reducer keeps, to the places that stay in it.
        crops: how many of how many tokens each an image has.
        order: int64, which token stands at each place that is no newline.
        together: how many crops are not stitched.
        pictures: some images of different kinds.
        keeps_positions: M-RoPE.
    """

    make: Callable[[], nn.Module]
    tokens: Callable[[Picture], int]
    pixels: Callable[[list[list[Picture]]], dict[str, Any]]
    kept: Callable[[Picture, Tensor], Tensor]
    crops: Callable[[Picture], tuple[int, int]]
    order: Callable[[Picture], Tensor] = field(default=lambda picture: torch.arange(N))
    together: Callable[[Picture], int] = field(default=lambda picture: 1)
    pictures: tuple[Picture, ...] = (Picture(1), Picture(2), Picture(3))
    keeps_positions: bool = False
    extra: Callable[[Tensor], dict[str, Any]] = field(default=lambda ids: {})

    def inputs(self, *prompts: Prompt, side: str = "left", mask: bool = True) -> dict[str, Any]:
        """What a processor would make of the prompts."""
        rows = [
            [token for part in prompt for token in ([part] if isinstance(part, int) else self.places(part))]
            for prompt in prompts
        ]
        longest = max(map(len, rows))
        ids, visible = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest).long()
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[i, where], visible[i, where] = torch.tensor(row), 1
        made: dict[str, Any] = {"input_ids": ids}
        if mask:
            made["attention_mask"] = visible
        images = [[part for part in prompt if isinstance(part, Picture)] for prompt in prompts]
        return made | (self.pixels(images) if any(images) else {}) | (self.extra(ids) if any(images) else {})

    def places(self, picture: Picture) -> list[int]:
        return [VIDEO if picture.frames else IMAGE] * self.tokens(picture)


def random_pixels(picture: Picture, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(picture.number))


# ---- LLaVA-1.5 -------------------------------------------------------------------------------------------------------


def clip(**changes: Any) -> Any:
    return transformers.CLIPVisionConfig(**VISION | {"projection_dim": 16} | changes)


def siglip() -> Any:
    return transformers.SiglipVisionConfig(**VISION, vision_use_head=False)


def llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def llava(**changes: Any) -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE, image_seq_length=N, **changes
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def llava_pixels(images: list[list[Picture]]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([random_pixels(p, 3, 24, 24) for row in images for p in row])}


def all_of(picture: Picture, kept: Tensor) -> Tensor:
    return kept.flatten()


LLAVA = Case(llava, lambda p: N, llava_pixels, all_of, lambda p: (1, N))

# ---- LLaVA-NeXT and LLaVA-OneVision ----------------------------------------------------------------------------------

PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24], [72, 72]]


def grid(picture: Picture) -> tuple[int, int]:
    """Rows and columns of crops."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(picture.size, PINPOINTS)
    return height // 24, width // 24


def stitched(picture: Picture, most: int | None = None) -> list[list[tuple[int, int]]]:
    """Crop and token at each place of the stitched map without its padding, resampled to the size of ``most`` crops."""
    rows, columns = grid(picture)
    height, width = rows * SIDE, columns * SIDE
    image_height, image_width = picture.size
    top = left = 0
    if image_width / image_height > width / height:
        top = (height - int(round(image_height * (width / image_width), 7))) // 2
    else:
        left = (width - int(round(image_width * (height / image_height), 7))) // 2
    ys, xs = list(range(top, height - top)), list(range(left, width - left))
    if most is not None and (ratio := (len(ys) * len(xs) / (most * N)) ** 0.5) > 1.1:
        new = int(len(ys) // ratio), int(len(xs) // ratio)
        ys = [ys[int((i + 0.5) * len(ys) / new[0])] for i in range(new[0])]
        xs = [xs[int((i + 0.5) * len(xs) / new[1])] for i in range(new[1])]
    return [[(1 + y // SIDE * columns + x // SIDE, y % SIDE * SIDE + x % SIDE) for x in xs] for y in ys]


def stitched_case(make: Callable[[], nn.Module], pictures: tuple[Picture, ...], most: int | None = None) -> Case:
    def tokens(picture: Picture) -> int:
        return N + sum(len(row) + 1 for row in stitched(picture, most))

    def pixels(images: list[list[Picture]]) -> dict[str, Any]:
        flat = [p for row in images for p in row]
        crops = [random_pixels(p, 1 + grid(p)[0] * grid(p)[1], 3, 24, 24) for p in flat]
        padded = [nn.functional.pad(x, (0,) * 7 + (max(map(len, crops)) - len(x),)) for x in crops]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([p.size for p in flat])}

    def kept(picture: Picture, kept: Tensor) -> Tensor:
        rows = [torch.stack([kept[i] for i in row] + [torch.tensor(True)]) for row in stitched(picture, most)]
        return torch.cat([kept[0], *rows])

    def order(picture: Picture) -> Tensor:
        numbers = [crop * N + token for row in stitched(picture, most) for crop, token in row]
        return torch.tensor([*range(N), *numbers])

    return Case(make, tokens, pixels, kept, lambda p: (1 + grid(p)[0] * grid(p)[1], N), order, pictures=pictures)


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=transformers.Qwen2Config(**TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config).eval()


def videos(images: list[list[Picture]]) -> dict[str, Any]:
    return {"pixel_values_videos": torch.stack([random_pixels(p, p.frames, 3, 24, 24) for row in images for p in row])}


SIZES = (Picture(1, (48, 48)), Picture(2, (24, 57)), Picture(3, (72, 24)))
FRAME = N // 4

MODELS = {
    "LLaVA-1.5": LLAVA,
    "LLaVA-NeXT": stitched_case(llava_next, SIZES),
    "LLaVA-OneVision": stitched_case(onevision, (Picture(1, (24, 48)), Picture(2, (57, 24)), Picture(3, (24, 40))), 2),
    "LLaVA-OneVision, resampled": stitched_case(onevision, (Picture(1, (72, 72)), Picture(2, (60, 72)), SIZES[0]), 2),
    "LLaVA-OneVision, video": Case(
        onevision,
        lambda p: p.frames * FRAME + 1,
        videos,
        lambda p, kept: torch.cat([kept.flatten(), torch.tensor([True])]),
        lambda p: (p.frames, FRAME),
        lambda p: torch.arange(p.frames * FRAME),
        lambda p: p.frames,
        pictures=tuple(Picture(i, frames=3) for i in range(3)),
    ),
}


# ---- Qwen2-VL and Qwen2.5-VL -----------------------------------------------------------------------------------------

PATCH = 4
MROPE = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 3, "num_heads": 4}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 95, "vision_end_token_id": 96}


def qwen2() -> nn.Module:
    vision = QWEN | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=MROPE, **TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def qwen25(full: tuple[int, ...] = (1,)) -> nn.Module:
    vision = QWEN | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"window_size": 2 * 2 * PATCH, "fullatt_block_indexes": list(full)}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=MROPE, **TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_grid(picture: Picture) -> tuple[int, int, int]:
    """Of patches."""
    return max(picture.frames, 1), picture.size[0] // PATCH, picture.size[1] // PATCH


def qwen_tokens(picture: Picture) -> int:
    t, h, w = qwen_grid(picture)
    return t * h * w // 4


def qwen_pixels(images: list[list[Picture]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for pixels, name in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        flat = [p for row in images for p in row if bool(p.frames) == (name == "video_grid_thw")]
        if flat:
            made[pixels] = torch.cat([random_pixels(p, 4 * qwen_tokens(p), 3 * 2 * PATCH**2) for p in flat])
            made[name] = torch.tensor([qwen_grid(p) for p in flat])
    return made


def qwen_case(make: Callable[[], nn.Module], pictures: tuple[Picture, ...]) -> Case:
    return Case(
        make,
        qwen_tokens,
        qwen_pixels,
        all_of,
        lambda p: (1, qwen_tokens(p)),
        lambda p: torch.arange(qwen_tokens(p)),
        pictures=pictures,
        keeps_positions=True,
        extra=lambda ids: {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()},
    )


MIXED = (Picture(1, (40, 24)), Picture(2, (16, 48)), Picture(3, (24, 24), frames=2))

MODELS |= {
    "Qwen2-VL": qwen_case(qwen2, MIXED),
    "Qwen2.5-VL": qwen_case(qwen25, MIXED),
    "Qwen2.5-VL, video": qwen_case(qwen25, MIXED[::-1]),
}


# ---- reducers --------------------------------------------------------------------------------------------------------


class Every:
    """Keeps every ``step``-th token, and nothing of its context but that."""

    def __init__(self, step: int, needs: tuple[str, ...] = ("hidden",)) -> None:
        self.step = step
        self.needs = needs
        self.seen: list[TokenContext] = []

    def __call__(self, ctx: TokenContext) -> TokenMap:
        self.seen.append(ctx)
        batch, n = ctx.hidden.shape[:2]
        return TokenMap.keep(torch.arange(0, n, self.step).repeat(batch, 1), n)

    def kept(self, batch: int, n: int) -> Tensor:
        return (torch.arange(n) % self.step == 0).repeat(batch, 1)


class Ragged:
    """Keeps tokens whose first channel is positive: a different number of every image and crop."""

    needs = ("hidden",)

    def __call__(self, ctx: TokenContext) -> TokenMap:
        kept = ctx.hidden[..., 0] > 0
        counts = kept.sum(1)
        return TokenMap.from_assign(torch.where(kept, kept.cumsum(1) - 1, -1), int(counts.max()), counts)


class Pairs:
    """Merges neighbours."""

    needs = ("hidden",)

    def __call__(self, ctx: TokenContext) -> TokenMap:
        batch, n = ctx.hidden.shape[:2]
        return TokenMap.from_assign((torch.arange(n) // 2).repeat(batch, 1), (n + 1) // 2)


class Fused:
    """Keeps the last five tokens, last first, and appends the sum of all."""

    needs = ("hidden",)

    def __call__(self, ctx: TokenContext) -> SoftMap:
        batch, n = ctx.hidden.shape[:2]
        weights = torch.cat([torch.eye(n).flip(0)[:5], torch.ones(1, n)])
        return SoftMap.from_dense(weights.repeat(batch, 1, 1))


# ---- by hand ---------------------------------------------------------------------------------------------------------


def image_features(case: Case, model: Any, picture: Picture) -> Tensor:
    """``[n,C]``, what the unpatched model puts into a prompt for this image."""
    pixels = case.pixels([[picture]])
    with torch.no_grad():
        get = model.get_video_features if picture.frames else model.get_image_features
        return torch.cat(list(get(**pixels, return_dict=True).pooler_output))


def by_hand(
    case: Case, model: Any, prompt: Prompt, left: Callable[[Picture, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A prompt's embeddings ``[1,L,C]``, and the columns int64 ``[L]`` that they stand for.

    Args:
        left: from an image and its features ``[n,C]`` to what is left of them ``[m,C]`` and where that was, int64 [m].
    """
    embed, parts, columns, at = model.get_input_embeddings(), [], [], 0
    for part in prompt:
        if isinstance(part, int):
            parts.append(embed(torch.tensor([part])))
            columns.append(torch.tensor([at]))
            at += 1
        else:
            features, places = left(part, image_features(case, model, part))
            parts.append(features)
            columns.append(places + at)
            at += case.tokens(part)
    return torch.cat(parts)[None].detach(), torch.cat(columns)


def hand_logits(model: Any, embeds: Tensor, positions: Tensor | None = None) -> Tensor:
    """Of the language model alone."""
    positions = torch.arange(embeds.shape[1])[None] if positions is None else positions
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        return model.lm_head(hidden)


def with_flash(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Have an attention function "flash", which is given all sequences at once as those named after FlashAttention are.

    Returns the cumulative lengths that its calls are going to bring.
    """
    fastok.register_transformers()
    functions, packed = transformers.AttentionInterface(), []

    def flash(module: Any, *args: Any, cu_seq_lens_q: Tensor, max_length_q: int, **options: Any) -> Any:
        packed.append(cu_seq_lens_q.tolist())
        assert cu_seq_lens_q.dtype == torch.int32
        assert int(cu_seq_lens_q.diff().min()) > 0
        assert int(cu_seq_lens_q.diff().max()) <= max_length_q
        return functions["fastok"](module, *args, cu_seq_lens_q=cu_seq_lens_q, max_length_q=max_length_q, **options)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash", flash)
    return packed
