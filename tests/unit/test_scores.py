"""Figures from predictions, against values counted by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from perceptio.data.maps import pack_map
from perceptio.data.masks import masks_to_rle
from workflows.evaluate import PASSES
from workflows.held_out import STEPS, Blind, Picture
from workflows.scores import NO_BASELINE, Metric, Predictions, score

SIDE = 8
LEFT_TO_RIGHT, RIGHT_TO_LEFT = 0, 1  # codes, each of a whole map that grows that way
FLAT = np.full((SIDE, SIDE), 0.5)


def decode(codes_BN: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """One code a map: a ramp from 0 to 1, towards the right or towards the left."""
    ramp_SS = np.tile(np.linspace(0, 1, SIDE, dtype=np.float32), (SIDE, 1))
    return np.stack([ramp_SS if code == LEFT_TO_RIGHT else ramp_SS[:, ::-1] for (code,) in codes_BN])


def box_mask(x0: int, x1: int) -> npt.NDArray[np.bool_]:
    mask_HW = np.zeros((SIDE, SIDE), bool)
    mask_HW[:, x0:x1] = True
    return mask_HW


def turn(kind: str, answer: str, **more: Any) -> dict[str, Any]:
    blank = {"kind": kind, "form": kind, "prompt": "?", "answer": answer, "expression": "", "objects": []}
    return blank | {"choices": [], "points": []} | more


def points(xs: list[int], closest: str) -> dict[str, Any]:
    letters = [f"({letter})" for letter in "ABCDE"[: len(xs)]]
    return turn("points", closest, choices=letters, points=[{"x": x, "y": 3} for x in xs])


def picture(name: str, asked: dict[str, Any], masks: tuple[npt.NDArray[np.bool_], ...] = ()) -> Picture:
    """A scene whose teacher's map grows to the right."""
    map_SS = np.round(decode(np.array([[LEFT_TO_RIGHT]]))[0] * STEPS).astype(np.uint16)
    packed = pack_map(map_SS)
    rle = tuple(masks_to_rle(np.stack(masks))) if masks else ()
    return Picture(name, name, b"", (SIDE, SIDE), (asked,), rle, (LEFT_TO_RIGHT,), packed, packed, None)


def reply(text: str = "", code: int = LEFT_TO_RIGHT, masks: tuple[npt.NDArray[np.bool_], ...] = ()) -> dict[str, Any]:
    rle = masks_to_rle(np.stack(masks)) if masks else []
    return {"text": text, "codes": [code], "masks": rle, "well_formed": True}


def figures(pictures: list[Picture], model: list[dict[str, Any]], **passes: Predictions) -> dict[str, Metric]:
    said: dict[str, Predictions] = {key: {} for key in PASSES}
    said |= {"model": {(p.id, 0): row for p, row in zip(pictures, model, strict=True)}} | passes
    answers = {"yes_no": Counter({"Yes": 3, "No": 1})}
    blind = Blind(FLAT, np.array([RIGHT_TO_LEFT]), None, answers)
    return score(pictures, said, blind, decode, resamples=10, seed=0).metrics


def test_ciou_sums_pixels_and_giou_means_shares() -> None:
    """One mask of 4 columns found by half and one column too many; one of 1 column missed altogether."""
    pictures = [
        picture("a", turn("referring", "Sure.", objects=[0]), (box_mask(0, 4), box_mask(5, 7))),
        picture("b", turn("referring", "Sure.", objects=[1]), (box_mask(0, 6), box_mask(7, 8))),
    ]
    found = figures(pictures, [reply(masks=(box_mask(2, 5),)), reply(masks=(box_mask(5, 7),))])
    assert found["referring_ciou"].value == pytest.approx((2 + 0) / (5 + 3))
    assert found["referring_giou"].value == pytest.approx((2 / 5 + 0) / 2)
    assert found["referring_ciou"].baseline == pytest.approx((4 + 0) / (4 + 7))
    assert found["referring_ciou"].against == "largest object, the best blind mask"


def test_the_masks_of_two_objects_are_judged_together() -> None:
    asked = turn("referring", "Sure.", objects=[0, 1])
    both = [picture("a", asked, (box_mask(0, 2), box_mask(6, 8)))]
    assert figures(both, [reply(masks=(box_mask(6, 8), box_mask(0, 2)))])["referring_ciou"].value == 1
    assert figures(both, [reply(masks=(box_mask(0, 2),))])["referring_ciou"].value == 0.5


def test_closest_points_count_every_size_of_set_alike() -> None:
    """Two right answers of two among three points, none of one among four: the mean of 1 and 0, whatever the counts."""
    pictures = [
        picture("a", points([0, 3, 6], "(C)")),
        picture("b", points([6, 3, 0], "(A)")),
        picture("c", points([0, 2, 4, 6], "(D)")),
    ]
    found = figures(pictures, [reply("(C)"), reply("(A)"), reply("(A)")])
    assert found["closest_point_accuracy"].value == pytest.approx(0.5)
    assert found["closest_point_accuracy"].baseline == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert (found["closest_point_accuracy_3"].value, found["closest_point_accuracy_4"].value) == (1, 0)


def test_the_closest_point_is_read_off_the_map_that_was_written() -> None:
    """The words are wrong throughout; the first map is the teacher's, the second is its mirror image."""
    pictures = [picture("a", points([0, 3, 6], "(C)")), picture("b", points([6, 3, 0], "(A)"))]
    found = figures(pictures, [reply("(B)", LEFT_TO_RIGHT), reply("(B)", RIGHT_TO_LEFT)])
    assert found["closest_point_accuracy"].value == 0
    assert found["closest_point_on_generated_map"].value == 0.5
    assert found["closest_point_on_reconstruction"].value == 1
    assert found["closest_point_on_generated_map"].baseline == pytest.approx(1 / 3)


def test_a_map_that_was_not_written_whole_is_read_nowhere() -> None:
    cut = reply("(C)") | {"codes": []}
    found = figures([picture("a", points([0, 3, 6], "(C)"))], [cut])
    assert "closest_point_on_generated_map" not in found
    assert "generated_depth_mae" not in found


def test_maps_are_judged_beside_mean_map_other_image_and_codebook() -> None:
    pictures = [picture("a", turn("", "")), picture("b", turn("", ""))]
    found = figures(pictures, [reply(code=LEFT_TO_RIGHT), reply(code=RIGHT_TO_LEFT)])
    mirror = float(np.abs(np.linspace(-1, 1, SIDE)).mean())  # error of a map turned round
    assert found["reconstruction_mae"].value == pytest.approx(0, abs=1e-4)
    assert found["reconstruction_mae"].baseline == pytest.approx(mirror / 2, abs=1e-4)
    assert found["generated_depth_mae"].value == pytest.approx(mirror / 2, abs=1e-4)
    assert found["code_accuracy"].value == 0.5
    assert found["code_accuracy"].baseline == 0  # the usual code is the mirror's


def test_questions_stand_beside_the_usual_answer_and_the_image_removed() -> None:
    choices = ["Yes", "No"]
    right = {"a": "Yes", "b": "No", "c": "No"}
    pictures = [picture(name, turn("yes_no", answer, choices=choices)) for name, answer in right.items()]
    blank = {("a", 0): reply("Yes"), ("b", 0): reply("Yes")}
    found = figures(pictures, [reply("Yes"), reply("No"), reply("Sure.")], blank=blank)
    assert found["yes_no_accuracy"].value == pytest.approx(2 / 3)
    assert found["yes_no_readable"].value == pytest.approx(2 / 3), "a wrong answer is one, `Sure.` is none"
    assert found["yes_no_readable"].against == NO_BASELINE
    assert found["yes_no_accuracy"].baseline == pytest.approx(1 / 3)
    assert found["yes_no_accuracy_vs_image_removed"].value == 1
    assert found["yes_no_accuracy_vs_image_removed"].baseline == 0.5


def test_well_formed_without_the_grammar_beside_the_untrained_start() -> None:
    pictures = [picture("a", turn("", "")), picture("b", turn("", ""))]
    free = {("a", 0): reply(), ("b", 0): reply() | {"well_formed": False}}
    found = figures(pictures, [reply(), reply()], free=free)["well_formed_without_grammar"]
    assert (found.value, found.against) == (0.5, NO_BASELINE)
