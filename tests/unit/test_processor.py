"""The processor: prompts out, replies in; and a Perceptio made of an InternVL, or refused with what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, GotOcr2ImageProcessor, InternVLForConditionalGeneration

from perceptio.data.collator import count_image_tokens
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor, Request
from perceptio.vocabulary import extend_tokenizer
from tests.tiny import tiny_model, tiny_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> PerceptioProcessor:
    return PerceptioProcessor.from_pretrained(folder)


def requests() -> list[Request]:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return [Request(image, "What is it?"), Request(image, "Please segment the lamp in this image.", "on", "off")]


def test_it_comes_back_by_its_auto_class(processor: PerceptioProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    # the configuration beside it says which class it is
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, PerceptioProcessor)
    assert again.vocabulary == processor.vocabulary
    assert not again.depth_after_text
    assert (again.depth_tokens, again.max_objects) == (processor.depth_tokens, processor.max_objects) == (4, 2)
    for key, value in processor.ask(requests()).items():
        torch.testing.assert_close(again.ask(requests())[key], value)


def test_prompts_are_padded_on_the_left_and_end_where_the_reply_begins(processor: PerceptioProcessor) -> None:
    asked = processor.ask(requests())
    ids_BT, mask_BT = asked["input_ids"], asked["attention_mask"]
    assert torch.equal(mask_BT, (ids_BT != processor.tokenizer.pad_token_id).long())
    assert 0 in mask_BT[:, 0] and torch.equal(mask_BT.sort(dim=1).values, mask_BT)
    for ids in ids_BT.tolist():
        assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    slots = int((ids_BT == processor.image_token_id).sum())
    assert slots == len(asked["pixel_values"]) * processor.image_seq_length


def test_replies_are_read_up_to_their_end_and_never_mended(processor: PerceptioProcessor) -> None:
    known, asked = processor.vocabulary, requests()
    word = processor.tokenizer.encode("red", add_special_tokens=False)
    end = processor.tokenizer.eos_token_id
    block = known.block_of_codes([1, 0, 7, 1])
    whole = processor.read([known.seg_id, *block, *word, end, known.seg_id], asked[0])
    assert (whole.objects, whole.codes, list(whole.text_ids), whole.problem) == (1, (1, 0, 7, 1), word, "")
    short = processor.read([*block[:-2], known.depth_end_id, *word], asked[0])
    assert short.codes == () and short.text_ids == () and short.problem.startswith("position 4: token")
    late = processor.read([*block, *word, known.seg_id, *word], asked[0])
    assert late.codes == (1, 0, 7, 1) and list(late.text_ids) == word and "cannot follow phase 'text'" in late.problem
    assert processor.read(word, asked[1]).problem.startswith("position 0")
    assert "ends after 2 of 4 codes" in processor.read(block[:3], asked[0]).problem


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text_model", ["qwen2", "llama"])
def test_an_internvl_becomes_a_perceptio(tmp_path: Path, text_model: str, tied: bool) -> None:
    parts = tiny_parts(tmp_path / "parts", text_model=text_model, tied=tied)
    torch.manual_seed(0)
    model = PerceptioForConditionalGeneration.from_pretrained(
        parts["base"], sam2=parts["sam2"], codebook=parts["codebook"], max_objects=3
    )
    processor = PerceptioProcessor.from_pretrained(parts["base"], codebook=parts["codebook"], max_objects=3)
    assert processor.vocabulary == model.config.vocabulary and processor.depth_tokens == model.config.depth_tokens
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = PerceptioForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    asked = processor.ask(requests())
    with torch.no_grad():
        assert torch.equal(again.eval()(**asked).logits, model.eval()(**asked).logits)
    # what it was before it still is
    base = InternVLForConditionalGeneration.from_pretrained(parts["base"])
    torch.testing.assert_close(model.get_parameter("model.vision_tower.embeddings.cls_token"),
                               base.get_parameter("model.vision_tower.embeddings.cls_token"))  # fmt: skip


def internvl_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows of tiles by InternVL's rule: nearest aspect ratio, of equals the last that is half filled."""
    grids = [(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most]
    best, gap = (1, 1), float("inf")
    for columns, rows in sorted(set(grids), key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < gap or (difference == gap and width * height > 0.5 * side * side * columns * rows):
            best, gap = (columns, rows), difference
    return best


def test_one_to_twelve_tiles_and_a_thumbnail_are_read_as_each_image_alone_is(folder: Path) -> None:
    model = PerceptioForConditionalGeneration.from_pretrained(folder).eval()
    processor = PerceptioProcessor.from_pretrained(folder)
    side = processor.image_processor.size["height"]
    processor.image_processor = GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    rng = np.random.default_rng(0)
    sizes = [(side, side), (side, 2 * side), (3 * side, 4 * side)]
    asked = [Request(rng.integers(0, 256, (*size, 3), dtype=np.uint8), "What is it?", "off", "off") for size in sizes]
    batch = processor.ask(asked)
    slots_B = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert slots_B == [tiles * processor.image_seq_length for tiles in (1, 2 + 1, 12 + 1)]
    assert slots_B == [count_image_tokens(processor, *size) for size in sizes]
    assert len(batch["pixel_values"]) == 17
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**processor.ask([request])).logits[:, -1] for request in asked])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-3, "the images must matter"
    for height, width in rng.integers(20, 900, (40, 2)).tolist():
        columns, rows = internvl_grid(height, width, side, 12)
        tiles = columns * rows + (columns * rows > 1)
        assert count_image_tokens(processor, height, width) == tiles * processor.image_seq_length, (height, width)


def test_what_is_missing_or_too_much_is_named(parts: dict[str, Path], folder: Path) -> None:
    load = PerceptioForConditionalGeneration.from_pretrained
    with pytest.raises(ValueError, match=r"model_type 'internvl', expected 'perceptio': pass sam2= and codebook="):
        load(parts["base"])
    with pytest.raises(ValueError, match=r"model_type 'perceptio', expected 'internvl'"):
        load(folder, sam2=parts["sam2"], codebook=parts["codebook"])
    with pytest.raises(ValueError, match=r"\['device_map'\] are for a Perceptio folder"):
        load(parts["base"], sam2=parts["sam2"], codebook=parts["codebook"], device_map="auto")
    with pytest.raises(ValueError, match=r"got one of sam2= and codebook=, expected both"):
        load(folder, codebook=parts["codebook"])
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: config\.json and model\.safetensors missing, expected a depth"
    ):
        load(parts["base"], sam2=parts["sam2"], codebook="nowhere")
    with pytest.raises(ValueError, match=r"it has no spatial tokens: pass codebook=FOLDER"):
        PerceptioProcessor.from_pretrained(parts["base"])
    with pytest.raises(ValueError, match=r"already extended with 8 depth codes, got 16"):
        extend_tokenizer(PerceptioProcessor.from_pretrained(folder).tokenizer, 16)


def test_a_reply_is_read_from_a_tensor_as_from_a_list(processor: PerceptioProcessor) -> None:
    known, asked = processor.vocabulary, requests()
    ids = [known.seg_id, *known.block_of_codes([1, 0, 7, 1]), *processor.tokenizer.encode("red")]
    assert processor.read(torch.tensor(ids), asked[0]) == processor.read(ids, asked[0])  # type: ignore[arg-type]
    assert processor.read(ids, asked[0]).well_formed


def test_control_tokens_and_ids_of_no_token_are_no_words(processor: PerceptioProcessor) -> None:
    word = processor.tokenizer.encode("red")
    for token in ("<|im_start|>", "<IMG_CONTEXT>", "<img>", processor.tokenizer.pad_token):
        reply = processor.read([*word, processor.tokenizer.convert_tokens_to_ids(token), *word], requests()[0])
        assert f"position {len(word)}" in reply.problem and "(control)" in reply.problem, token
        assert list(reply.text_ids) == word
    for beyond in (len(processor.tokenizer), -1):
        assert "(control) cannot follow" in processor.read([beyond], requests()[0]).problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": "yes"}, "segmentation is 'yes', expected one of auto, on, off"),
        ({"depth": False}, "depth is False, expected one of auto, on, off"),
        ({"rgb_HW3": np.zeros((60, 90, 3))}, r"request 1: image is float64 \(60, 90, 3\), expected uint8 \(H, W, 3\)"),
        ({"rgb_HW3": np.zeros((60, 90, 4), np.uint8)}, r"image is uint8 \(60, 90, 4\), expected uint8 \(H, W, 3\)"),
        ({"rgb_HW3": np.zeros((0, 90, 3), np.uint8)}, r"image is uint8 \(0, 90, 3\), expected uint8 \(H, W, 3\)"),
        ({"rgb_HW3": np.zeros((60, 90), np.uint8)}, r"image is uint8 \(60, 90\), expected uint8 \(H, W, 3\)"),
    ],
)
def test_a_request_of_another_kind_is_refused(
    processor: PerceptioProcessor, changes: dict[str, Any], message: str
) -> None:
    first, second = requests()
    with pytest.raises(ValueError, match=message):
        processor.ask([first, dataclasses.replace(second, **changes)])


def test_an_image_of_three_rows_is_no_image_of_three_channels(processor: PerceptioProcessor) -> None:
    strip_HW3 = np.random.default_rng(0).integers(0, 256, (3, 90, 3), dtype=np.uint8)
    asked = processor.ask([Request(strip_HW3, "What is it?")])["pixel_values"]
    tall = processor.ask([Request(strip_HW3.repeat(30, 0), "What is it?")])["pixel_values"]
    assert (asked[:, 0].mean() - tall[:, 0].mean()).abs() < 0.1, "the red channel is the red channel"


def test_nothing_asked_and_a_blank_question_are_refused(processor: PerceptioProcessor) -> None:
    with pytest.raises(ValueError, match="got no requests, expected at least one"):
        processor.ask([])
    with pytest.raises(ValueError, match="request 1: its question is blank"):
        processor.ask([*requests()[:1], Request(requests()[0].rgb_HW3, " \n")])


def test_image_tokens_that_do_not_fit_the_image_are_refused_with_both_numbers(folder: Path) -> None:
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    asked = PerceptioProcessor.from_pretrained(folder).ask(requests()[:1])
    ids_BT = torch.cat([asked["input_ids"], torch.full((1, 1), model.config.image_token_id)], dim=1)
    with pytest.raises(ValueError, match=r"tokens: 65, features: 64"):
        model.hidden_states(ids_BT, torch.ones_like(ids_BT), asked["pixel_values"])
