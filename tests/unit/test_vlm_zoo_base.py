"""The small base model's tokenizer, processor and packs: what it is taught is what it will be asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, InternVLProcessor

from workflows.zoo.base import corpus
from workflows.zoo.base_model import build_model, build_processor, train_tokenizer
from workflows.zoo.base_packs import IGNORED, LENGTH, Packer, pixels
from workflows.zoo.base_rooms import EMPTY, GRID, TaughtRoom, cached_rooms
from workflows.zoo.base_score import iou, parse_box


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
    for number in range(100):
        assert len(processor.tokenizer(str(number)).input_ids) == 1
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


def test_cells_name_objects_and_place_their_boxes(rooms: list[TaughtRoom]) -> None:
    for room in rooms:
        seen_G = room.kind_G != EMPTY
        assert seen_G.any()
        assert ((room.color_G != EMPTY) == seen_G).all()
        row_G, column_G = np.divmod(np.arange(GRID * GRID), GRID)
        x0, y0, x1, y1 = (room.place_G5[seen_G, k] * GRID for k in range(4))
        assert ((x0 < column_G[seen_G] + 1) & (x1 > column_G[seen_G])).all()
        assert ((y0 < row_G[seen_G] + 1) & (y1 > row_G[seen_G])).all()


def test_boxes_are_compared_as_inclusive_cells() -> None:
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert iou((0, 0, 4, 4), (5, 5, 9, 9)) == 0
    assert iou(parse_box("I do not know"), parse_box("[[0, 0, 99, 99]]")) == 0
