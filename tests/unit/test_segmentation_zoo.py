"""The shipped segmenter is what its card says, on rooms it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perceptio.segmentation.teacher import MaskTeacher
from workflows.zoo import segmenter_score as scoring
from workflows.zoo.segmenter_rooms import box_of, draw_prompts, example, mirrored

SHIPPED = Path(scoring.__file__).parents[2] / "perceptio" / "rooms" / "zoo" / "segmenter"


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((SHIPPED / "card.json").read_text())


@pytest.fixture(scope="module")
def teacher() -> MaskTeacher:
    torch.set_num_threads(1)
    return MaskTeacher.from_pretrained(SHIPPED)


def test_the_card_belongs_to_these_weights_and_names_the_licence(card: dict[str, Any], teacher: MaskTeacher) -> None:
    assert card["digest"] == teacher.digest
    assert teacher.licence == card["license"] == "apache-2.0"
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 13e6


def test_the_cards_figures_come_out_again_on_a_hundred_rooms(card: dict[str, Any], teacher: MaskTeacher) -> None:
    found = scoring.score(teacher, (100,))["100"]
    for prompt, row in card["scores"]["100"].items():
        assert found[prompt]["miou"] == pytest.approx(row["miou"], abs=0.005), "render changed? run with --score"
        assert found[prompt]["blind"] == pytest.approx(row["blind"], abs=0.005)


def test_a_click_finds_more_of_its_object_than_any_blind_disc(card: dict[str, Any]) -> None:
    low, _ = card["scores"]["200"]["point_prompt"]["gain_per_room_95"]
    assert low > 0


def test_the_teacher_draws_closer_than_the_filled_box_on_some_objects(teacher: MaskTeacher) -> None:
    closer = []
    for index in range(12):
        item = example(scoring.HELD_OUT_SEED, index, 128)
        boxes = [box_of(mask_HW) for mask_HW in item.masks]
        for box, mask_HW, drawn in zip(boxes, item.masks, teacher(item.rgb_HW3, boxes), strict=True):
            x0, y0, x1, y1 = map(int, box)
            filled_HW = np.zeros_like(mask_HW)
            filled_HW[y0:y1, x0:x1] = True
            closer.append(scoring.iou(drawn.mask_HW, mask_HW) > scoring.iou(filled_HW, mask_HW))
    assert np.mean(closer) > 0.2


def test_prompts_and_targets_show_the_same_object_also_when_mirrored() -> None:
    item = example(101, 0, 128)
    for shown in (item, mirrored(item)):
        batch = draw_prompts([shown], boxes=True, size=256, count=3, rng=np.random.default_rng(0))
        for (corner, far), target_HW in zip(batch.points_MP2, batch.target_MHW, strict=True):
            x0, y0, x1, y1 = (value / 4 for value in (*corner.tolist(), *far.tolist()))
            ys, xs = np.nonzero(target_HW.numpy())
            assert abs(xs.min() - x0) < 0.1 * (x1 - x0) + 2
            assert abs(ys.max() + 1 - y1) < 0.1 * (y1 - y0) + 2
