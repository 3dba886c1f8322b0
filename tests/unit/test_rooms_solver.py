"""The independent solver finds every answer again, and refuses what is ambiguous."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import BACKGROUND, FLOOR, Room, RoomObject
from perceptio.rooms.solver import solve


def disagreements(seed: int, count: int, size: int) -> tuple[int, list[str]]:
    """Number of questions asked, and those to which the solver has another answer."""
    asked, wrong = 0, []
    for index in range(count):
        room = render_room(seed, index, size)
        for q in ask(room):
            asked += 1
            found = solve(q.prompt, room, q.points_xy)
            if found != (q.objects if q.kind == "referring" else q.answer):
                wrong.append(f"room {index}: {q.prompt!r}: {q.objects or q.answer}, not {found}")
    return asked, wrong


def two_balls() -> Room:
    instance_HW = np.full((20, 20), BACKGROUND, np.int16)
    depth_HW = np.full((20, 20), 5, np.float32)
    for i, (x, z) in enumerate(((2, 1.0), (12, 2.0))):
        instance_HW[8:12, x : x + 4], depth_HW[8:12, x : x + 4] = i, z
    objects = (RoomObject(0, "ball", "red", "small", FLOOR), RoomObject(1, "ball", "blue", "small", FLOOR))
    return Room(0, 0, np.zeros((20, 20, 3), np.uint8), depth_HW, instance_HW, objects)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Please segment the leftmost ball in this image.", (0,)),
        ("Segment the blue ball and the red ball.", (1, 0)),
        ("Mark the ball to the right of the red ball in this image, please.", (1,)),
        ("Give me a mask of the ball farthest from the camera.", (1,)),
        ("Which is closer to the camera, the blue ball or the red ball?", "the red ball"),
        ("Is the blue ball to the left of the red ball?", "No"),
        ("How many red or green objects are in this room?", "1"),
        ("Is there a red ball in this room?", "Yes"),
        ("Where is the red ball?", "[[10, 40, 25, 55]]"),
    ],
)
def test_answers_in_a_room_painted_by_hand(prompt: str, answer: str | tuple[int, ...]) -> None:
    assert solve(prompt, two_balls()) == answer


@pytest.mark.parametrize("prompt", ["Segment the small ball.", "Segment the red sofa.", "What is the weather like?"])
def test_a_question_without_exactly_one_answer_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"not one|cannot read"):
        solve(prompt, two_balls())


def test_another_room_has_another_answer() -> None:
    room = two_balls()
    mirrored = replace(room, instance_HW=room.instance_HW[:, ::-1], depth_HW=room.depth_HW[:, ::-1])
    assert solve("Segment the leftmost ball.", mirrored) == (1,)


def test_the_solver_agrees_on_100_rooms() -> None:
    asked, wrong = disagreements(seed=8, count=100, size=64)
    assert asked > 800
    assert not wrong


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_the_solver_agrees_on_2000_rooms(record: Callable[..., None]) -> None:
    asked, wrong = disagreements(seed=9, count=2000, size=128)
    record(rooms=2000, questions=asked, disagreements=len(wrong))
    assert asked > 16000
    assert not wrong
