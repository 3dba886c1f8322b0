"""What a room is: its objects, and the exact arrays that a renderer makes of it.

Shape legend: H, W image height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BACKGROUND = -1  # value of `instance_HW` on walls, floor and ceiling
FLOOR = -1  # value of `RoomObject.support` for an object that stands on the floor


@dataclass(frozen=True)
class RoomObject:
    """One piece of furniture or one thing, as a person would name it."""

    index: int  # position in `Room.objects`, and its value in `instance_HW`
    kind: str  # "chair", "lamp", ... one of furniture.KINDS
    color: str  # "red", ... one of furniture.COLORS
    size: str  # "small" or "large"
    support: int  # index of the object that it rests on, or FLOOR


@dataclass(frozen=True)
class Room:
    """A rendered room with exact ground truth; a pure function of (seed, index, size)."""

    seed: int
    index: int
    rgb_HW3: npt.NDArray[np.uint8]
    depth_HW: npt.NDArray[np.float32]  # metres along the camera's viewing axis, every pixel finite and > 0
    instance_HW: npt.NDArray[np.int16]  # object index, or BACKGROUND; visible pixels only
    objects: tuple[RoomObject, ...]

    @property
    def visible_pixels(self) -> tuple[int, ...]:
        """Number of visible pixels per object, in the order of `objects`."""
        counts = np.bincount(self.instance_HW[self.instance_HW >= 0].ravel(), minlength=len(self.objects))
        return tuple(int(n) for n in counts)


@dataclass(frozen=True)
class Question:
    """One question about a room, with the one right answer."""

    kind: str  # referring | points | distance | count | attribute | yes_no | choice | box
    form: str  # which construction made it, e.g. "attribute", "ordinal", "support", "points_3"
    prompt: str  # what the user says, in full
    answer: str  # what a perfect model says
    expression: str = ""  # referring and box: the bare expression, e.g. "the lamp on the small table"
    objects: tuple[int, ...] = ()  # referring: the objects meant, in the order named
    choices: tuple[str, ...] = ()  # the closed set of answers, where there is one
    points_xy: tuple[tuple[int, int], ...] = ()  # points: pixel positions, in letter order
    image_HW3: npt.NDArray[np.uint8] | None = None  # points: the room with the points drawn in
    about: tuple[int, ...] = ()  # answered in words: the objects that the answer is read from
