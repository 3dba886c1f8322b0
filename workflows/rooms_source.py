"""Rooms as a source like any other: each item is a room's number, rendered where it is read.

Shape legend: O objects, H, W image height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceptio.data.images import encode_depth16, encode_png
from perceptio.data.masks import masks_to_rle
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Question, Room
from perceptio.sources.record import Found, Item, Point, Record, Refused, Turn
from schemas.recipe import RoomsSource
from schemas.tables import Reason


@dataclass(frozen=True)
class RoomsReader:
    """Rooms with the questions that the source wants, and one more picture for each question with points drawn in."""

    source: RoomsSource

    def items(self) -> Iterator[Item]:
        """One item a room; how many pictures it gives is known when its questions are asked."""
        for index in range(self.source.count):
            yield Item(uri=f"rooms://seed/{self.source.seed}?size={self.source.size}", first=index, rows=0)

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The room with its wanted questions, unless it has none of them, and a picture per points question."""
        uri = f"rooms://seed/{self.source.seed}/index/{item.first}?size={self.source.size}"
        try:
            room = render_room(self.source.seed, item.first, self.source.size)
        except RuntimeError as error:
            yield Refused(Reason.BAD_RECORD, str(error), uri)
            return
        wanted = [question for question in ask(room) if question.kind in self.source.questions]
        plain = [question for question in wanted if question.image_HW3 is None]
        if plain or not self.source.questions:
            yield self._found(room, uri, room.rgb_HW3, plain)
        for question in wanted:
            if question.image_HW3 is not None:
                yield self._found(room, f"{uri}&form={question.form}", question.image_HW3, [question])

    def _found(self, room: Room, uri: str, rgb_HW3: Any, questions: Sequence[Question]) -> Found:
        masks_OHW = room.instance_HW[None] == np.arange(len(room.objects))[:, None, None]
        millimetres_HW = np.rint(np.clip(room.depth_HW * 1000, 1, 65535)).astype(np.uint16)
        record = Record(
            turns=tuple(_turn(question) for question in questions),
            boxes=tuple(_box_around(mask_HW) for mask_HW in masks_OHW),
            masks=tuple(masks_to_rle(masks_OHW)) if self.source.exact_masks else (),
        )
        return Found(uri, encode_png(rgb_HW3), record, encode_depth16(millimetres_HW))


def _turn(question: Question) -> Turn:
    return Turn(
        kind=question.kind,
        form=question.form,
        prompt=question.prompt,
        answer=question.answer,
        expression=question.expression,
        objects=question.objects,
        choices=question.choices,
        points=tuple(Point(x=x, y=y) for x, y in question.points_xy),
    )


def _box_around(mask_HW: Any) -> tuple[float, float, float, float]:
    y, x = np.nonzero(mask_HW)
    return (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
