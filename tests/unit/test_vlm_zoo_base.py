"""The small base model's tokenizer, processor and packs: what it is taught is what it will be asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, InternVLProcessor

import perceptio.rooms
from workflows.zoo.base import corpus
from workflows.zoo.base_model import build_model, build_processor, train_tokenizer
from workflows.zoo.base_packs import IGNORED, LENGTH, Packer, pixels
from workflows.zoo.base_rooms import DEPTH_GRID, EMPTY, GRID, PATCHES, TaughtRoom, cached_rooms, mirrored
from workflows.zoo.base_score import first_figures, iou, parse_box

SHIPPED = Path(perceptio.rooms.__file__).parent / "zoo" / "base"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> list[TaughtRoom]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workflows.zoo.base_rooms.ROOMS_A_FILE", 4)
        return list(cached_rooms(tmp_path_factory.mktemp("cache"), seed=7, count=4))


@pytest.fixture(scope="module")
def processor(rooms: list[TaughtRoom], tmp_path_factory: pytest.TempPathFactory) -> InternVLProcessor:
    folder = tmp_path_factory.mktemp("processor")
    build_processor(train_tokenizer(corpus(rooms))).save_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoProcessor.from_pretrained(folder).tokenizer)
    return AutoProcessor.from_pretrained(folder)


def test_every_number_below_hundred_is_one_token(processor: InternVLProcessor) -> None:
    for number in [*map(str, range(100)), *(f"0{n}" for n in range(10))]:
        assert len(processor.tokenizer(number).input_ids) == 1
    text = "[[0, 17, 99, 5]]"
    assert len(processor.tokenizer(text).input_ids) == 9
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_any_text_survives_the_tokenizer(processor: InternVLProcessor) -> None:
    text = "Wo ist der Stuhl? 椅子 2048 x\n\n(A)  "
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_a_pack_reads_as_the_processor_writes_the_same_chat(
    rooms: list[TaughtRoom], processor: InternVLProcessor
) -> None:
    packer = Packer(processor, rooms, np.random.default_rng(0))
    _, ids, labels = packer._pack(rooms[0])
    assert len(ids) == len(labels) <= LENGTH
    text = processor.tokenizer.decode(ids)
    turns = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:]]
    chat = [dict(zip(("role", "content"), turn.split("\n", 1), strict=True)) for turn in turns]
    chat[0]["content"] = chat[0]["content"].replace(packer.image_text, processor.image_token)
    written = processor.apply_chat_template(chat, tokenize=False)
    image = np.zeros((128, 128, 3), np.uint8)
    assert processor(images=[[image]], text=[written]).input_ids[0] == ids
    supervised = processor.tokenizer.decode([label for label in labels if label != IGNORED])
    assert supervised == "".join(f"{turn['content']}<|im_end|>" for turn in chat if turn["role"] == "assistant")


def test_pixels_match_the_image_processor(processor: InternVLProcessor) -> None:
    image_HW3 = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    theirs = processor(images=[[image_HW3]], text=[processor.image_token], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels([image_HW3], processor), theirs, atol=1e-5, rtol=1e-5)


def test_model_takes_what_the_processor_gives(processor: InternVLProcessor) -> None:
    model = build_model(processor.tokenizer)
    image_HW3 = np.zeros((90, 200, 3), np.uint8)
    inputs = processor(images=[[image_HW3]], text=[processor.image_token], return_tensors="pt")
    assert (inputs.input_ids == model.config.image_token_id).sum() == GRID * GRID
    assert torch.isfinite(model(**inputs).logits).all()
    assert sum(p.numel() for p in model.parameters()) < 4.5e6  # 9 MB in fp16


def assert_in_place(cell_G7: npt.NDArray[np.float32], grid: int) -> None:
    """Cells name kind and colour together, and each lies in the box of the object that it shows."""
    seen_G = cell_G7[:, 0] != EMPTY
    assert len(cell_G7) == grid * grid and seen_G.any()
    assert ((cell_G7[:, 1] != EMPTY) == seen_G).all()
    row_G, column_G = np.divmod(np.arange(grid * grid), grid)
    x0, y0, x1, y1 = (cell_G7[seen_G, k] * grid for k in range(2, 6))
    assert ((x0 < column_G[seen_G] + 1) & (x1 > column_G[seen_G])).all()
    assert ((y0 < row_G[seen_G] + 1) & (y1 > row_G[seen_G])).all()


def test_cells_name_objects_and_place_their_boxes(rooms: list[TaughtRoom]) -> None:
    for room in rooms:
        for cell_G7, grid in ((room.token_G7, GRID), (room.patch_P7, PATCHES)):
            assert_in_place(cell_G7, grid)
            assert_in_place(mirrored(cell_G7), grid)
            assert not np.array_equal(mirrored(cell_G7), cell_G7)
            np.testing.assert_allclose(mirrored(mirrored(cell_G7)), cell_G7, atol=1e-6)


def test_the_depth_grid_is_two_digits_a_part_and_one_token_each(
    rooms: list[TaughtRoom], processor: InternVLProcessor
) -> None:
    (answer,) = {answer for kind, _, answer in rooms[0].turns if kind == "grid"}
    ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
    assert len(ids) == DEPTH_GRID * DEPTH_GRID
    levels = [int(processor.tokenizer.decode([token])) for token in ids]
    near, far = np.reshape(levels, (DEPTH_GRID, DEPTH_GRID))[[-1, 0]]
    assert near.mean() > far.mean(), "the floor at our feet is closer than the wall"


def test_the_cards_figures_come_out_again_on_a_hundred_rooms() -> None:
    card = json.loads((SHIPPED / "card.json").read_text())
    found = first_figures(SHIPPED, 100)
    assert found == pytest.approx(card["first_100"], abs=0.01), "render or questions changed? score again"
    assert len(found) >= 7


def test_boxes_are_compared_as_inclusive_cells() -> None:
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((0, 0, 4, 4), (5, 5, 9, 9)) == 0
    assert iou(parse_box("I do not know"), parse_box("[[0, 0, 99, 99]]")) == 0
