"""Where the patches of images went in a vision-language model, and pictures of that."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
import vlm_cases as vlm  # noqa: E402
from fastok import apply, viz  # noqa: E402
from fastok.cli import main  # noqa: E402
from fastok.reducers import DivPrune, RecoverableCompression, ToMe  # noqa: E402
from fastok.testing import assert_same  # noqa: E402
from vlm_cases import Case, Every, Fused, Pairs, Picture  # noqa: E402

over_models = pytest.mark.parametrize("name", vlm.MODELS)


def run(model: Any, inputs: dict[str, Any], reducer: Any, **where: Any) -> Any:
    with apply(model, reducer, **where) as handle, torch.no_grad():
        model(**inputs)
    return handle


def grids(case: Case, name: str, picture: Picture) -> list[Tensor]:
    """Token ``b * N + i`` at each place of each picture, worked out from the sizes of the image."""
    crops, n = case.crops(picture)
    if name.startswith("Qwen"):
        t, h, w = vlm.qwen_grid(picture)
        return list(torch.arange(t * h * w // 4).view(t, h // 2, w // 2))
    side = int(n**0.5)
    whole = list(torch.arange(crops * n).view(crops, side, side))
    if name == "LLaVA-1.5" or "video" in name:
        return whole
    rows = vlm.stitched(picture, 2 if "OneVision" in name else None)
    return [whole[0], torch.tensor([[crop * n + token for crop, token in row] for row in rows])]


@over_models
def test_patches_say_where_each_token_of_a_picture_went(name: str) -> None:
    case, step = vlm.MODELS[name], 3
    model = case.make()
    a, b, _ = case.pictures
    handle = run(model, case.inputs([5, a, 6, b, 7]), Every(step))
    assert len(handle.patches) == 2
    for picture, patches, left in zip((a, b), handle.patches, handle.stats.tokens_out, strict=True):
        crops, n = case.crops(picture)
        kept = case.kept(picture, Every(step).kept(crops, n))  # by place in the prompt, newlines among them
        rank = kept.cumsum(0) - 1
        newline = case.kept(picture, torch.zeros(crops, n, dtype=torch.bool))
        place = torch.full((crops * n,), -1)
        place[case.order(picture)] = torch.where(kept, rank, -1)[~newline]
        place[torch.arange(crops * n) % n % step != 0] = -1  # a resampled map shows tokens of others
        for got, tokens in zip(patches, grids(case, name, picture), strict=True):
            assert got.dtype == torch.int64
            assert torch.equal(got, place[tokens])
        assert int(rank[-1]) + 1 == left
        assert all(int(slots.max()) < left for slots in patches)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-OneVision, video", "Qwen2.5-VL"])
def test_patches_of_merged_and_of_weighted_tokens(name: str) -> None:
    case = vlm.MODELS[name]
    picture = case.pictures[0]
    n = case.crops(picture)[1]
    inputs = case.inputs([5, picture, 6])
    model, tokens = case.make(), grids(case, name, picture)
    frame, token = torch.stack(tokens).flatten() // n, torch.stack(tokens).flatten() % n
    (merged,) = run(model, inputs, Pairs()).patches
    assert torch.equal(torch.stack(merged).flatten(), frame * -(-n // 2) + token // 2)
    (fused,) = run(model, inputs, Fused()).patches
    # The last five have a slot each, last first, before what all are in.
    assert torch.equal(torch.stack(fused).flatten(), frame * 6 + (n - 1 - token).clamp(max=5))


def test_patches_of_a_tower_that_merges_in_its_layers() -> None:
    model, case = vlm.llava(), vlm.LLAVA
    handle = run(model, case.inputs([5, Picture(1), 6]), ToMe(r=4), place="layers")
    ((slots,),) = handle.patches
    assign = handle.token_map[0].assign[0].long()
    first = torch.stack([(assign == slot).nonzero()[0, 0] for slot in range(int(assign.max()) + 1)])
    # Left in raster order of their first members, whatever the numbers in the map.
    assert torch.equal(slots.flatten(), first.argsort().argsort()[assign])
    assert sorted(set(slots.flatten().tolist())) == list(range(handle.stats.tokens_out[0]))


def test_patches_are_of_vision_language_models() -> None:
    model = vlm.llava()
    with apply(model, Every(2)) as handle, pytest.raises(RuntimeError, match="no prompt with images was seen"):
        _ = handle.patches
    with (
        apply(model.model.vision_tower, ToMe(r=2)) as handle,
        pytest.raises(TypeError, match="patches are of a vision-language model's images"),
    ):
        _ = handle.patches


def test_a_picture_is_drawn_from_its_patches() -> None:
    case, picture = vlm.MODELS["LLaVA-NeXT"], Picture(2, (24, 57))
    handle = run(case.make(), case.inputs([5, picture, 6]), Every(2))
    ((thumbnail, crops),) = handle.patches
    white = Image.new("RGB", (114, 48), "white")
    drawn = viz.draw_patches(white, crops, side=10 * crops.shape[1])
    assert drawn.size[0] == 10 * crops.shape[1]
    cell = drawn.size[1] // crops.shape[0]
    for y, row in enumerate(crops.tolist()):
        for x, slot in enumerate(row):
            assert (drawn.getpixel((10 * x + 5, cell * y + cell // 2))[0] == 255) == (slot >= 0)
    token_map = handle.token_map[0]
    by_map = viz.draw_tokens(white, token_map, (vlm.SIDE, vlm.SIDE), sample=0)
    assert by_map.tobytes() == viz.draw_patches(white, thumbnail).tobytes()


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (torch.zeros(2, 2), TypeError, "slots must be integers, got torch.float32"),
        (torch.ones(2, 2) > 0, TypeError, "slots must be integers, got torch.bool"),
        (torch.zeros(4).long(), ValueError, "slots must be"),
        (torch.zeros(0, 3).long(), ValueError, "slots must be"),
        (torch.full((1, 2), -2), ValueError, "slots must be"),
    ],
)
def test_wrong_slots_are_named(slots: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        viz.draw_patches(Image.new("RGB", (4, 4)), slots)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<pad>": 1, "what": 2, "<image>": vlm.IMAGE}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )


def checkpoint(folder: Path, tokenizer: Any, model: nn.Module) -> Path:
    """A model and its processor as `from_pretrained` finds them."""
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    if isinstance(model, transformers.LlavaNextForConditionalGeneration):
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Images

        sizes["image_grid_pinpoints"] = vlm.PINPOINTS
        kind = transformers.LlavaNextProcessor
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Images

        kind = transformers.LlavaProcessor
    processor = kind(
        image_processor=Images(**sizes),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((90, 60), 80).save(path)
    return path


@pytest.mark.parametrize(("make", "pictures"), [(vlm.llava, 1), (vlm.llava_next, 2)], ids=["LLaVA-1.5", "LLaVA-NeXT"])
def test_the_command_draws_a_checkpoint(
    make: Any, pictures: int, photo: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = checkpoint(tmp_path / "model", tokenizer, make()), tmp_path / "out.png"
    command = ["viz", str(photo), "--model", str(folder), "--reducer", "DivPrune(keep=9)", "--out", str(out)]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    from fastok.integrations import drawing

    model, processor = drawing.load(str(folder))
    shown, captions = drawing.draw(model, processor, Image.open(photo).convert("RGB"), DivPrune(keep=9), "what")
    assert len(shown) == 1 + pictures
    assert captions[0] == "original"
    if pictures == 1:
        assert captions[1] == "9 of 36 tokens"
        assert shown[1].width == shown[1].height  # what the processor cut out
    else:
        assert captions[1].startswith("thumbnail: ")
        assert captions[2].startswith("crops: ")
        assert shown[2].width > shown[2].height


def test_mistakes_at_the_command_line_are_told_in_one_line(
    photo: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "model", tokenizer, vlm.llava())
    encoder = tmp_path / "encoder"
    transformers.CLIPVisionModel(vlm.clip()).save_pretrained(encoder)
    for arguments, message in (
        (["--model", str(folder), "--reducer", "DivPrune(kept=9)"], "--reducer: must be like 'DivPrune(keep=64)', got"),
        (["--model", str(folder), "--reducer", "Nothing"], "the reducers are VTCCLS, AveragePool"),
        (["--model", str(folder), "--reducer", "__import__('os')"], "the reducers are VTCCLS, AveragePool"),
        (["--model", str(folder), "--reducer", "DivPrune(keep=open('x'))"], "--reducer: must be like"),
        (["--model", str(folder), "--reducer", "TokenContext(1)"], "--reducer: must be like"),
        (["--model", str(encoder)], "CLIPVisionModel; supported are LlavaForConditionalGeneration"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(["viz", str(photo), *arguments, "--out", str(tmp_path / "out.png")]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("fastok: ")
    from fastok.integrations import drawing

    with pytest.raises(
        OSError, match=r"RecoverableCompression\(.*\) in LlavaOnevisionForConditionalGeneration: .*class token"
    ):
        drawing.draw(vlm.onevision(), None, Image.open(photo), RecoverableCompression(), "what")


@over_models
def test_a_copy_of_a_reduced_model_is_one_of_its_own(name: str) -> None:
    case = vlm.MODELS[name]
    model, picture = case.make(), case.pictures[0]
    first, second = (case.inputs([5, x, 6]) for x in (picture, Picture(7, picture.size, picture.frames)))
    with apply(model, Every(2)) as handle, torch.no_grad():
        plain, kept = model(**first).logits, handle.patches
        other = copy.deepcopy(model)
        expected = model(**second).logits
        model(**first)
        assert_same(other(**second).logits, expected)
        assert [[x.tolist() for x in image] for image in handle.patches] == [[x.tolist() for x in y] for y in kept]
    with torch.no_grad():
        assert_same(other(**first).logits, plain)  # still reduces
