"""Referring expressions: what a person may say that means exactly one object of a room.

Positions and distances are compared by quantiles of an object's visible pixels. One object comes before another only if
it does so at its near end, in its middle and at its far end, with a margin in the middle; all else is called undecided,
and no expression is made of it.

Shape legend: H, W image height and width; O objects of the room; Q the quantiles 10, 50, 90 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceptio.rooms.room import FLOOR, Room, RoomObject

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CLEAR_SHARE = 0.003  # least share of the image for an object that can be recognised
X_MARGIN = 0.05  # of the image's width
Z_MARGIN = 1.08  # ratio of distances
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Sight:
    """What is seen of each object: measured from `Room.instance_HW` and `Room.depth_HW`."""

    objects: tuple[RoomObject, ...]
    pixels_O: Floats  # visible pixels
    clear_O: Bools  # enough of it is visible
    center_O2: Floats  # mean x, y of the visible pixels as shares of width and height; nan where nothing is visible
    x_OQ: Floats  # share of the width
    z_OQ: Floats  # metres
    box_O4: npt.NDArray[np.int64]  # first and last visible column and row: x0, y0, x1, y1
    left_OO: Bools  # [a, b]: a is clearly to the left of b
    near_OO: Bools  # [a, b]: a is clearly closer to the camera than b


def look(room: Room) -> Sight:
    """The `Sight` of a room."""
    height, width = room.instance_HW.shape
    count = len(room.objects)
    pixels_O = np.asarray(room.visible_pixels, np.float64)
    center_O2, x_OQ, z_OQ = np.full((count, 2), np.nan), np.full((count, 3), np.nan), np.full((count, 3), np.nan)
    box_O4 = np.zeros((count, 4), np.int64)
    labels, depths = room.instance_HW.ravel(), room.depth_HW.ravel()
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(count + 1))
    for i in range(count):
        at = order[ends[i] : ends[i + 1]]
        if not len(at):
            continue
        y, x = np.divmod(at, width)
        center_O2[i] = (x.mean() + 0.5) / width, (y.mean() + 0.5) / height
        middle = (np.array([0.1, 0.5, 0.9]) * (len(at) - 1)).astype(int)
        x_OQ[i] = (np.sort(x)[middle] + 0.5) / width
        z_OQ[i] = np.sort(depths[at])[middle]
        box_O4[i] = x.min(), y.min(), x.max(), y.max()
    clear_O = pixels_O >= CLEAR_SHARE * height * width
    both_OO = clear_O[:, None] & clear_O[None]
    left_OO = both_OO & (x_OQ[:, None] < x_OQ[None]).all(-1) & (x_OQ[:, None, 1] + X_MARGIN < x_OQ[None, :, 1])
    near_OO = both_OO & (z_OQ[:, None] < z_OQ[None]).all(-1) & (z_OQ[:, None, 1] * Z_MARGIN < z_OQ[None, :, 1])
    return Sight(room.objects, pixels_O, clear_O, center_O2, x_OQ, z_OQ, box_O4, left_OO, near_OO)


@dataclass(frozen=True)
class Expression:
    """A phrase, the one object that it means, and the construction that made it."""

    form: str
    text: str
    target: int


def classes(objects: tuple[RoomObject, ...]) -> dict[str, tuple[int, ...]]:
    """Every noun phrase that fits an object ("red chair", "small box", "red object"), with all objects that it fits."""
    found: dict[str, list[int]] = {}
    for o in objects:
        for noun in (o.kind, "object"):
            for words in ((noun,), (o.color, noun), (o.size, noun), (o.size, o.color, noun)):
                found.setdefault(" ".join(words), []).append(o.index)
    return {phrase: tuple(members) for phrase, members in found.items()}


def names(objects: tuple[RoomObject, ...], sized: bool = True) -> dict[int, list[str]]:
    """For each object the phrases of kind, colour and (if `sized`) size that fit no other object, shortest first."""
    unique: dict[int, list[str]] = {o.index: [] for o in objects}
    for phrase, members in classes(objects).items():
        words = phrase.split()
        if len(members) == 1 and words[-1] != "object" and (sized or words[0] not in ("small", "large")):
            unique[members[0]].append("the " + phrase)
    return {i: sorted(phrases, key=lambda p: (p.count(" "), p)) for i, phrases in unique.items()}


def expressions(sight: Sight) -> list[Expression]:
    """All expressions of a room whose objects are clearly visible, each with exactly one meaning among all objects."""
    groups = classes(sight.objects)
    found = [*_by_name(sight), *_by_support(sight, groups)]
    for phrase, members in groups.items():
        if len(members) > 1 and sight.clear_O[list(members)].all():
            found += [*_by_place(sight, phrase, members), *_by_anchor(sight, phrase, members)]
    return [e for e in found if sight.clear_O[e.target]]


def _by_name(sight: Sight) -> Iterator[Expression]:
    for target, phrases in names(sight.objects).items():
        o = sight.objects[target]
        for text in phrases:
            if text != "the " + o.kind:
                yield Expression("attribute" if o.color in text.split() else "size", text, target)


def _by_place(sight: Sight, phrase: str, members: tuple[int, ...]) -> Iterator[Expression]:
    """The ends and the inner places of a class in its order from left to right, and from near to far."""
    row = sorted(members, key=lambda i: sight.x_OQ[i, 1])
    before = sight.left_OO
    if all(before[row[0], i] for i in row[1:]):
        yield Expression("absolute", f"the leftmost {phrase}", row[0])
        if sight.x_OQ[row[0], 1] < 0.45 and sight.x_OQ[row[1], 1] > 0.55:
            yield Expression("absolute", f"the {phrase} on the left", row[0])
    if all(before[i, row[-1]] for i in row[:-1]):
        yield Expression("absolute", f"the rightmost {phrase}", row[-1])
        if sight.x_OQ[row[-1], 1] > 0.55 and sight.x_OQ[row[-2], 1] < 0.45:
            yield Expression("absolute", f"the {phrase} on the right", row[-1])
    if len(row) > 2 and all(before[a, b] for k, a in enumerate(row) for b in row[k + 1 :]):
        for place in range(1, min(len(row) - 1, len(ORDINALS))):
            yield Expression("ordinal", f"the {ORDINALS[place]} {phrase} from the left", row[place])
            yield Expression("ordinal", f"the {ORDINALS[place]} {phrase} from the right", row[-1 - place])
    line = sorted(members, key=lambda i: sight.z_OQ[i, 1])
    if all(sight.near_OO[line[0], i] for i in line[1:]):
        yield Expression("absolute", f"the {phrase} closest to the camera", line[0])
    if all(sight.near_OO[i, line[-1]] for i in line[:-1]):
        yield Expression("absolute", f"the {phrase} farthest from the camera", line[-1])


def _by_anchor(sight: Sight, phrase: str, members: tuple[int, ...]) -> Iterator[Expression]:
    """The one of a class that stands in a relation to a named object, where all the others clearly stand opposite."""
    inside = list(members)
    relations = (
        ("to the left of", sight.left_OO, sight.left_OO.T),
        ("to the right of", sight.left_OO.T, sight.left_OO),
        ("in front of", sight.near_OO, sight.near_OO.T),
        ("behind", sight.near_OO.T, sight.near_OO),
    )
    for anchor, phrases in names(sight.objects).items():
        if anchor in members or not phrases or not sight.clear_O[anchor]:
            continue
        for words, holds_OO, fails_OO in relations:
            holds, fails = holds_OO[inside, anchor], fails_OO[inside, anchor]
            if holds.sum() == 1 and (holds | fails).all():
                yield Expression("relative", f"the {phrase} {words} {phrases[0]}", inside[int(holds.argmax())])


def _by_support(sight: Sight, groups: dict[str, tuple[int, ...]]) -> Iterator[Expression]:
    for anchor, phrases in names(sight.objects).items():
        if not phrases or not sight.clear_O[anchor]:
            continue
        for phrase, members in groups.items():
            resting = [i for i in members if _rests_on(sight.objects, i, anchor)]
            if len(resting) == 1 and sight.objects[resting[0]].support == anchor:
                yield Expression("support", f"the {phrase} on {phrases[0]}", resting[0])


def _rests_on(objects: tuple[RoomObject, ...], i: int, anchor: int) -> bool:
    """Whether an object rests on another, directly or through what lies between."""
    below = objects[i].support
    return below != FLOOR and (below == anchor or _rests_on(objects, below, anchor))
