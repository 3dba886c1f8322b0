"""A second way to every answer: from the words of a question, the masks, the depth and the objects' names alone.

It shares no geometry with the questions. They compare quantiles with margins; this compares plain means, without
margins. So where both agree on many rooms, the margins are wide enough and the words mean what they say.

Shape legend: H, W image height and width; O objects.
"""

from __future__ import annotations

import re
from typing import TypeVar

import numpy as np

from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.room import Room

T = TypeVar("T")

_ORDINALS = {"second": 1, "third": 2, "fourth": 3}
_COLOR = "|".join(COLORS)
_NOUN = "|".join((*KINDS, "object"))
_PHRASE = rf"the (?:(?:{'|'.join(_ORDINALS)}|leftmost|rightmost) )?(?:(?:small|large) )?(?:(?:{_COLOR}) )?(?:{_NOUN})\b"
_RELATION = "to the left of|to the right of|in front of|behind|on"
_PLACE = "(?:on|from) the (?:left|right)|(?:closest to|farthest from) the camera"
_TAIL = rf"(?: (?:{_PLACE}|(?:{_RELATION}) {_PHRASE})\b)?"
_EXPRESSION = re.compile(_PHRASE + _TAIL)


def solve(prompt: str, room: Room, points_xy: tuple[tuple[int, int], ...] = ()) -> str | tuple[int, ...]:
    """The answer to a question, as its text; for a request for masks, the indices of the objects meant, as named.

    `points_xy` are the places of the lettered points, in letter order. Raises ValueError if the question has no answer,
    more than one, or words that no question here uses.
    """
    question, *options = prompt.split("\n")
    if options:
        lines = dict(line.split(". ", 1) for line in options[:-1])
        return _one([letter for letter, text in lines.items() if text in _fitting(question, room)], prompt)
    if points_xy:
        return f"({'ABCDE'[int(np.argmin([room.depth_HW[y, x] for x, y in points_xy]))]})"
    answers = _fitting(question, room)
    if answers:
        return _one(sorted(answers), prompt)
    texts = _EXPRESSION.findall(question)
    if not texts:
        raise ValueError(f"cannot read the question {prompt!r}: it names no object")
    return tuple(_meant(text, room) for text in texts)


def _fitting(question: str, room: Room) -> set[str]:
    """Every text that answers a question truly; none if it asks for masks."""
    texts = re.findall(_PHRASE, question)
    if question.startswith(("Which is closer to", "Is the ", "Seen from")):
        a, b = (_meant(text, room) for text in texts)
        nearer, lefter = _distance(room, a) < _distance(room, b), _across(room, a) < _across(room, b)
        if question.startswith("Which"):
            return {texts[0] if nearer else texts[1]}
        if question.startswith("Seen"):
            return {f"{'closer' if nearer else 'farther away'} and to the {'left' if lefter else 'right'}"}
        return {"Yes" if (lefter if "to the left of" in question else nearer) else "No"}
    if found := re.fullmatch(rf"Is there an? ({_COLOR}) ({_NOUN}) in this room\?", question):
        return {"Yes" if any((o.color, o.kind) == found.groups() for o in room.objects) else "No"}
    if question.startswith("How many"):
        asked = set(re.findall(_COLOR, question))
        return {str(len([o for o in room.objects if o.color in asked]))}
    if question.startswith("What colour"):
        return {room.objects[_meant(texts[0], room)].color}
    if question == "Which of these is in this room?":
        return {f"{article} {o.color} {o.kind}" for o in room.objects for article in ("a", "an")}
    if re.fullmatch(rf"Where is {_PHRASE}\?", question):
        return {_box(room, _meant(texts[0], room))}
    return set()


def _meant(text: str, room: Room) -> int:
    """The one object that an expression means."""
    head = re.match(_PHRASE, text)
    assert head is not None
    words, tail = head[0].split()[1:], text[head.end() + 1 :]
    order = words.pop(0) if words[0] in (*_ORDINALS, "leftmost", "rightmost") else ""
    fitting = [o.index for o in room.objects if set(words) <= {o.kind, o.color, o.size, "object"}]
    across = {i: _across(room, i) for i in fitting}
    row = sorted(fitting, key=lambda i: across[i])
    if tail == "from the right" or order == "rightmost":
        row.reverse()
    if order:
        return row[_ORDINALS.get(order, 0)]
    if tail in ("closest to the camera", "farthest from the camera"):
        line = sorted(fitting, key=lambda i: _distance(room, i))
        return line[0] if tail.startswith("closest") else line[-1]
    if tail in ("on the left", "on the right"):
        fitting = [i for i in fitting if (across[i] < room.instance_HW.shape[1] / 2) == tail.endswith("left")]
    elif tail:
        relation = _one([r for r in _RELATION.split("|") if tail.startswith(r + " the")], text)
        anchor = _meant(tail.removeprefix(relation + " "), room)
        fitting = [i for i in fitting if i != anchor and _stands(room, i, relation, anchor)]
    return _one(fitting, text)


def _stands(room: Room, i: int, relation: str, anchor: int) -> bool:
    if relation == "on":
        return room.objects[i].support == anchor
    if relation.startswith("to the"):
        return (_across(room, i) < _across(room, anchor)) == (relation == "to the left of")
    return (_distance(room, i) < _distance(room, anchor)) == (relation == "in front of")


def _across(room: Room, i: int) -> float:
    return float(np.nonzero(room.instance_HW == i)[1].mean())


def _distance(room: Room, i: int) -> float:
    return float(room.depth_HW[room.instance_HW == i].mean())


def _box(room: Room, i: int) -> str:
    mask_HW = room.instance_HW == i
    (top, bottom), (left, right) = (np.flatnonzero(mask_HW.any(axis))[[0, -1]] for axis in (1, 0))
    height, width = mask_HW.shape
    return f"[[{left * 100 // width}, {top * 100 // height}, {right * 100 // width}, {bottom * 100 // height}]]"


def _one(found: list[T], text: str) -> T:
    if len(found) != 1:
        raise ValueError(f"{text!r} fits {len(found)} answers, not one: {found}")
    return found[0]
