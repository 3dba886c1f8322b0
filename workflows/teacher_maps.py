"""Maps of a shard's images, from a teacher or as the data set recorded them: what `depth` and `tokenize` share.

The same images in the same order always make the same batches, and so the same maps to the last bit: other batch sizes
and other numbers of threads round differently.

Shape legend: H, W image height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from perceptio.data.images import ImageLimits, decode, decode_depth16
from perceptio.depth.teacher import (
    DepthError,
    DepthTeacher,
    Prepared,
    TeacherCard,
    TeacherMap,
    inv_depth_from_metric,
    scaled_map,
)
from schemas.manifest import Licence
from schemas.recipe import Recipe, section_digest
from schemas.tables import Reason
from workflows.runtime import ahead, device, weights
from workflows.shards import Reject
from workflows.store import OtherInputsError

CONVENTION = "inv_depth in [0, 1], larger = closer, min-max scaled per image"
RECORDED = "recorded"
STORED = ImageLimits(min_side=1, max_pixels=2**31)  # what lies in the images table was checked by `ingest`
WAITING = 8  # batches' worth of rows that an image waits for others of its shape
DECODERS = 2  # threads of one actor beside the model

Row = dict[str, Any]
Made = TypeVar("Made")
Lazy = Callable[[], TeacherMap]  # raises DepthError where the image has no map
Numbered = list[tuple[int, Lazy]]  # with the row's number


class Maps(Protocol):
    """Where maps come from."""

    column: str  # of the images table, that they are made from

    def __call__(self, column: pa.ChunkedArray) -> Iterator[Numbered]:
        """Every row's map once, in an order that depends on the rows alone."""
        ...


@dataclass(frozen=True)
class MapSource:
    """All that maps depend on but the images, as an actor is given it."""

    teacher: str  # a folder, a hub id or "recorded"
    digest: str
    dtype: str
    batch_size: int
    threads: int

    def open(self) -> Maps:
        """The maps' source, its model loaded. Raises OtherInputsError where the teacher is not the one named."""
        if self.teacher == RECORDED:
            return RecordedMaps()
        teacher = DepthTeacher.from_pretrained(self.teacher, device=device(), dtype=getattr(torch, self.dtype))
        if teacher.digest != self.digest:
            raise OtherInputsError(
                f"teacher {self.teacher} is {teacher.digest[:16]} here, the driver has {self.digest[:16]}: give every"
                " machine the same files"
            )
        return TeacherMaps(teacher, self.batch_size, self.threads)


@dataclass(frozen=True)
class Teaching:
    """What a table made from maps says of them."""

    source: MapSource
    inputs: dict[str, str]
    licences: tuple[Licence, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Teaching:
        """The recipe's. `depth.maps` is no part of it: it says which maps are kept, not what they are."""
        section = recipe.depth.model_copy(update={"dtype": recipe.depth.precision})
        settings = f"{section_digest(section, exclude={'pool', 'maps'})}-{section.pool.threads}"
        inputs = {"settings": settings, "convention": CONVENTION, "teacher": RECORDED}
        options = (section.dtype, section.batch_size, section.pool.threads)
        if section.teacher == RECORDED:
            return cls(MapSource(RECORDED, RECORDED, *options), inputs, ())
        place = weights(section.teacher, "teacher")
        card = TeacherCard.read(place)
        closed = "-nc" in card.licence.lower()
        name = section.teacher
        licence = Licence(part="teacher", source=name, licence=card.licence, digest=card.digest, non_commercial=closed)
        return cls(MapSource(place, card.digest, *options), inputs | {"teacher": card.digest}, (licence,))


class TeacherMaps:
    """Runs the teacher over images in full batches of one shape, while threads decode the next ones."""

    column = "image"

    def __init__(self, teacher: DepthTeacher, batch_size: int, threads: int) -> None:
        self.teacher, self.batch_size, self.threads = teacher, batch_size, threads

    def __call__(self, column: pa.ChunkedArray) -> Iterator[Numbered]:
        """Batch by batch, each with the rows without a map that were found meanwhile."""
        refused: Numbered = []
        parts = [range(i, min(i + self.batch_size, len(column))) for i in range(0, len(column), self.batch_size)]
        prepared = ahead(lambda part: [(row, self._prepare(column[row])) for row in part], parts, threads=DECODERS)

        def good() -> Iterator[tuple[int, Prepared]]:
            for row, found in itertools.chain.from_iterable(prepared):
                if isinstance(found, DepthError):
                    refused.append((row, partial(_refuse, found)))
                else:
                    yield row, found

        for batch in batches(good(), lambda found: found.shape, self.batch_size, WAITING * self.batch_size):
            torch.set_num_threads(self.threads)  # whatever runs between two batches may use another number
            raw = self.teacher.predict([found for _, found in batch])
            made: Numbered = [(row, partial(scaled_map, raw_HW)) for (row, _), raw_HW in zip(batch, raw, strict=True)]
            yield [*refused, *made]
            refused.clear()
        yield refused

    def _prepare(self, image: pa.BinaryScalar) -> Prepared | DepthError:
        try:
            return self.teacher.prepare(decode(image.as_py(), STORED))
        except DepthError as error:
            return error


class RecordedMaps:
    """The data set's own metric depth; unknown pixels count as beyond range."""

    column = "recorded_depth"
    batch = 16  # rows handed over at once

    def __call__(self, column: pa.ChunkedArray) -> Iterator[Numbered]:
        """Rows in order."""
        for first in range(0, len(column), self.batch):
            rows = range(first, min(len(column), first + self.batch))
            yield [(row, partial(_recorded, column[row].as_py())) for row in rows]


def batches(
    items: Iterable[tuple[int, Made]], key: Callable[[Made], Hashable], size: int, waiting: int
) -> Iterator[list[tuple[int, Made]]]:
    """Numbered items in lists of `size` of one key; shorter ones where an item would wait for `waiting` numbers.

    So at most `waiting` items wait, and what comes out is at most that far out of order. What is left at the end comes
    by the number of its first item.
    """
    open_lists: dict[Hashable, list[tuple[int, Made]]] = {}  # by the number of their first item
    for number, item in items:
        kind = key(item)
        open_lists.setdefault(kind, []).append((number, item))
        if len(open_lists[kind]) == size:
            yield open_lists.pop(kind)
        while open_lists and number - next(iter(open_lists.values()))[0][0] >= waiting:
            yield open_lists.pop(next(iter(open_lists)))
    yield from open_lists.values()


def mapped(maps: Maps, table: pa.Table, make: Callable[[TeacherMap], Made]) -> Iterator[Made | Reject]:
    """make(map) of every row of a table with id, uri and the maps' column, in its order; a reject where there is none.

    Maps are scaled and made something of in a thread, while the model runs.
    """
    keys = table.select(["id", "uri"]).to_pylist()

    def made(batch: Numbered) -> list[tuple[int, Made | Reject]]:
        return [(row, _made(make, keys[row], lazy)) for row, lazy in batch]

    return _in_order(found for batch in ahead(made, maps(table[maps.column])) for found in batch)


def _made(make: Callable[[TeacherMap], Made], row: Row, lazy: Lazy) -> Made | Reject:
    try:
        return make(lazy())
    except DepthError as error:
        return Reject(error.reason, str(error), row["id"], row["uri"])


def _in_order(numbered: Iterable[tuple[int, Made]]) -> Iterator[Made]:
    """The items by their numbers 0, 1, 2, ..., each as soon as those before it have come."""
    waiting: dict[int, Made] = {}
    following = 0
    for number, item in numbered:
        waiting[number] = item
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _recorded(png: bytes | None) -> TeacherMap:
    if png is None:
        message = "the record has no depth of its own: name a teacher in depth.teacher"
        raise DepthError(Reason.NO_RECORDED_DEPTH, message)
    millimetres_HW: npt.NDArray[np.float64] = decode_depth16(png).astype(np.float64)
    return inv_depth_from_metric(millimetres_HW / 1000)


def _refuse(error: DepthError) -> TeacherMap:
    raise error
