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
from workflows.zoo.base import corpus, see, text_states
from workflows.zoo.base_model import build_model, build_processor, train_tokenizer
from workflows.zoo.base_packs import BOXES, IGNORED, KIND_SHARES, LENGTH, LESSONS, Packer, lesson, pixels
from workflows.zoo.base_rooms import DEPTH_GRID, EMPTY, GRID, PATCHES, TaughtRoom, cached_rooms, lettered, mirrored
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


def unpacked(processor: InternVLProcessor, ids: list[int], image_text: str) -> list[dict[str, str]]:
    """The chat that token ids hold."""
    turns = [part.split("<|im_end|>")[0] for part in processor.tokenizer.decode(ids).split("<|im_start|>")[1:]]
    chat = [dict(zip(("role", "content"), turn.split("\n", 1), strict=True)) for turn in turns]
    chat[0]["content"] = chat[0]["content"].replace(image_text, processor.image_token)
    return chat


def as_written(processor: InternVLProcessor, chat: list[dict[str, str]]) -> list[int]:
    """The processor's own token ids of a chat about one image."""
    written = processor.apply_chat_template(chat, tokenize=False)
    return processor(images=[[np.zeros((128, 128, 3), np.uint8)]], text=[written]).input_ids[0]


@pytest.mark.parametrize("chat", [True, False])
def test_a_pack_reads_as_the_processor_writes_the_same_chats(
    rooms: list[TaughtRoom], processor: InternVLProcessor, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.zoo.base_packs.CHAT_SHARE", float(chat))
    packer = Packer(processor, rooms, np.random.default_rng(0))
    _, _, pack = packer._drawn(rooms[0])
    assert len(pack.ids) == len(pack.labels) == len(pack.positions) == len(pack.turns) <= LENGTH
    shared = [i for i, turn in enumerate(pack.turns) if turn == 0]
    parts = [shared + [i for i, turn in enumerate(pack.turns) if turn == n] for n in sorted({*pack.turns} - {0})]
    assert len(parts) == 0 if chat else len(parts) > 5
    for part in parts or [shared]:
        ids = [pack.ids[i] for i in part]
        asked = unpacked(processor, ids, packer.image_text)
        assert as_written(processor, asked)[:-1] == ids, "all but the line's end behind the last turn"
        assert [pack.positions[i] for i in part] == list(range(len(part)))
        supervised = processor.tokenizer.decode([pack.labels[i] for i in part if pack.labels[i] != IGNORED])
        assert supervised == "".join(f"{turn['content']}<|im_end|>" for turn in asked if turn["role"] == "assistant")


def test_a_turn_of_a_pack_sees_the_image_and_itself_alone(
    rooms: list[TaughtRoom], processor: InternVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model makes of a turn is what it makes of that turn asked by itself."""
    monkeypatch.setattr("workflows.zoo.base_packs.CHAT_SHARE", 0.0)
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).eval()
    batch = Packer(processor, rooms, np.random.default_rng(1)).batch(2)
    image_BGD = see(model, batch).token_BGD
    packed_BTD = text_states(model, image_BGD, batch)
    ids_T, sees_TT = batch.ids_BT[0], batch.sees_B1TT[0, 0]
    end = int((ids_T != processor.tokenizer.pad_token_id).nonzero().max())
    own_T = sees_TT[end].nonzero()[:, 0]
    alone = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids_T[own_T])[None].masked_scatter(
            (ids_T[own_T] == model.config.image_token_id)[None, :, None], image_BGD[0]
        )
    ).last_hidden_state[0]
    assert len(own_T) < end, "other turns stand before it"
    torch.testing.assert_close(packed_BTD[0, own_T], alone, atol=1e-4, rtol=1e-4)


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


def assert_in_place(cell_G9: npt.NDArray[np.float32], grid: int) -> None:
    """Cells name kind and colour together, and each lies in the box of the object that it shows."""
    seen_G = cell_G9[:, 0] != EMPTY
    assert len(cell_G9) == grid * grid and seen_G.any()
    assert ((cell_G9[:, 1] != EMPTY) == seen_G).all()
    row_G, column_G = np.divmod(np.arange(grid * grid), grid)
    x0, y0, x1, y1 = (cell_G9[seen_G, k] * grid for k in range(2, 6))
    assert ((x0 < column_G[seen_G] + 1) & (x1 > column_G[seen_G])).all()
    assert ((y0 < row_G[seen_G] + 1) & (y1 > row_G[seen_G])).all()


def test_cells_name_objects_and_place_their_boxes(rooms: list[TaughtRoom]) -> None:
    for room in rooms:
        for cell_G9, grid in ((room.token_G9, GRID), (room.patch_P9, PATCHES)):
            assert_in_place(cell_G9, grid)
            assert_in_place(mirrored(cell_G9), grid)
            assert not np.array_equal(mirrored(cell_G9), cell_G9)
            np.testing.assert_allclose(mirrored(mirrored(cell_G9)), cell_G9, atol=1e-6)


def test_one_cell_stands_for_each_object_that_can_be_seen(rooms: list[TaughtRoom]) -> None:
    for room in rooms:
        chosen_G = room.token_G9[:, 7] == 1
        shown, chosen = (np.unique(room.token_G9[at, :6], axis=0) for at in (room.token_G9[:, 0] != EMPTY, chosen_G))
        np.testing.assert_array_equal(shown, chosen)
        assert chosen_G.sum() >= len(chosen) >= 2


def test_names_come_first(rooms: list[TaughtRoom], processor: InternVLProcessor) -> None:
    packer = Packer(processor, rooms, np.random.default_rng(5))
    packer.shares = lesson(0.0)
    asked = [turn for room in rooms for turn in packer._turns(room)]
    assert {turn.kind for turn in asked} == {"name", "attribute"}
    assert not any(word in turn.prompt for turn in asked for word in (" left", " right", " behind ", "camera"))
    assert not any(packer._with_points(rooms[0])[2] for _ in range(20))
    assert [lesson(passed) for passed in (0.1, 0.3, 0.5, 0.61, 1.0)] == [
        shares for _, shares in (*LESSONS, LESSONS[-1])
    ]
    assert lesson(1) is KIND_SHARES and sum(part for part, _ in LESSONS) == pytest.approx(1)


def test_every_answer_counts_once(rooms: list[TaughtRoom], processor: InternVLProcessor) -> None:
    batch = Packer(processor, rooms, np.random.default_rng(6)).batch(3)
    answered_BT = batch.labels_BT != IGNORED
    assert torch.equal(batch.share_BT > 0, answered_BT)
    opens_BT = answered_BT & ~answered_BT.roll(1, 1)
    assert batch.share_BT.sum() == pytest.approx(opens_BT.sum().item(), rel=1e-5)
    assert len(batch.share_BT[answered_BT].unique()) > 1, "answers of several lengths"


def test_an_answer_is_read_from_the_patches_of_what_it_is_about(
    rooms: list[TaughtRoom], processor: InternVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each aim stands at the token before an answer, or at the one that opens a box, and shows these objects alone."""
    monkeypatch.setattr("workflows.zoo.base_packs.POINTS_SHARE", 0.0)
    monkeypatch.setattr("workflows.zoo.base_packs.CHAT_SHARE", 0.0)
    packer = Packer(processor, rooms, np.random.default_rng(3))
    room = rooms[0]
    turns = {turn.prompt: turn for of_kind in room.turns.values() for turn in of_kind if turn.kind not in BOXES}
    _, _, pack = packer._drawn(room)
    checked = 0
    for token, patches_P in pack.aims:
        own = [i for i, n in zip(pack.ids, pack.turns, strict=True) if n == pack.turns[token] > 0]
        turn = turns.get(processor.tokenizer.decode(own).split("<|im_end|>")[0])
        if turn is None:  # a box
            continue
        assert pack.labels[token] == IGNORED != pack.labels[token + 1]
        assert set(room.patch_P9[patches_P, 8] - 1) <= set(turn.about)
        assert patches_P.any() or not turn.about or turn.kind != "attribute"
        checked += 1
    assert checked > 3


def test_letters_are_where_points_are_drawn(rooms: list[TaughtRoom], processor: InternVLProcessor) -> None:
    room = next(room for room in rooms if room.points)
    for points in room.points:
        letter_G2 = lettered(points)
        assert sorted(letter_G2[letter_G2[:, 0] > 0, 0]) == list(range(1, 1 + len(points.xy)))
        assert letter_G2[letter_G2[:, 1].argmax(), 0] == 1 + "ABCDE".index(points.turn.answer[1])
        assert points.closest == points.xy["ABCDE".index(points.turn.answer[1])]
    packer = Packer(processor, [room], np.random.default_rng(0))
    images = [packer.looks(4) for _ in range(8)]
    assert any(batch.letter_BG2.any() for batch in images) and not all(b.letter_BG2.any(2).any(1).all() for b in images)


def test_the_depth_grid_is_two_digits_a_part_and_one_token_each(
    rooms: list[TaughtRoom], processor: InternVLProcessor
) -> None:
    ((_, _, answer, _),) = rooms[0].turns["grid"]
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
