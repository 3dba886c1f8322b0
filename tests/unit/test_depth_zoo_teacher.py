"""The shipped teacher is what its card says, and sees more than a blind guess."""

import json
from pathlib import Path

import numpy as np
import pytest

import perceptio.rooms
from perceptio.depth.teacher import STEPS, DepthTeacher, TeacherMap, inv_depth_from_metric
from perceptio.rooms.render import render_room

FOLDER = Path(perceptio.rooms.__file__).parent / "zoo" / "teacher"


def test_the_cards_figures_come_out_again() -> None:
    held_out = json.loads((FOLDER / "card.json").read_text())["held_out"]
    teacher = DepthTeacher.from_pretrained(FOLDER)
    rooms = [render_room(held_out["seed"], index, held_out["size"]) for index in range(100)]
    truth = np.stack([inv_depth_from_metric(room.depth_HW).inv_depth_HW for room in rooms]) / STEPS
    found = [teacher([room.rgb_HW3])[0] for room in rooms]
    guess = np.stack([slot.inv_depth_HW for slot in found if isinstance(slot, TeacherMap)]) / STEPS
    assert guess.shape == truth.shape
    error = np.abs(guess - truth).mean()
    assert error == pytest.approx(held_out["first_100_mae"], rel=0.02)
    # the mean of the very maps that are guessed at: no blind map has a squared error below its
    assert error < np.abs(truth.mean(axis=0) - truth).mean()


def test_the_teacher_is_small_and_free() -> None:
    teacher = DepthTeacher.from_pretrained(FOLDER)
    assert teacher.licence == "apache-2.0"
    assert teacher.kind == "relative"
    assert (FOLDER / "model.safetensors").stat().st_size < 6e6
