"""A plain folder of images, with an optional `records.jsonl` beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

from perceptio.sources.files import IMAGE_SUFFIXES, Place, folder_at, found, is_text, place_of, relative, walk
from perceptio.sources.record import Found, Item, Refused, RowError, SourceError, problem, shown
from schemas.sources import FolderSource
from schemas.tables import Reason

RECORDS = "records.jsonl"

log = logging.getLogger(__name__)


class FolderReader:
    """Items by path; then what of `records.jsonl` has no file, by line. The lines are held in memory, no image is."""

    def __init__(self, source: FolderSource) -> None:
        self.source = source
        self.place = place_of(source.path, f"sources.{source.name}.path")

    def items(self) -> Iterator[Item]:
        """One item a file with an image's suffix. Raises SourceError for no folder, or one without an image."""
        folder = folder_at(self.source.path, f"sources.{self.source.name}.path")
        records, strays = _records(folder.below(RECORDS))
        images = others = 0
        for path, size in walk(folder):
            if path.lower().endswith(IMAGE_SUFFIXES):
                images += 1
                _, record = records.pop(path, (0, ""))
                uri = folder.below(path).uri
                if is_text(path):
                    yield Item(uri, size=size, record=record)
                else:
                    yield problem(Reason.BAD_RECORD, f"the file's name {path!r} is no UTF-8: rename it", uri)
            else:
                others += path != RECORDS
        if not images:
            where = f"sources.{self.source.name}.path '{self.source.path}'"
            raise SourceError(f"{where} holds no image ({', '.join(IMAGE_SUFFIXES)}): mend the path")
        if others:
            log.info("%s: %d files are no images by their suffix, not read", self.source.name, others)
        missing = [
            (number, problem(Reason.MISSING_FILE, _at(number, f"image '{path}' is not there"), folder.below(path).uri))
            for path, (number, _) in records.items()
        ]
        for _, stray in sorted(strays + missing, key=lambda numbered: numbered[0]):
            yield stray

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The file with its record."""
        yield found(self.place, item)


def _records(place: Place) -> tuple[dict[str, tuple[int, str]], list[tuple[int, Item]]]:
    """For each image the number of its line and its record as JSON; and numbered lines that cannot be used."""
    records: dict[str, tuple[int, str]] = {}
    strays: list[tuple[int, Item]] = []
    if place.size() is None:
        return records, strays
    with place.opened() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                path, record = line_record(line)
                path = relative(path, "image")
                if path in records:
                    message = f"image '{path}' has a line before, {records[path][0]}: put all its turns into one"
                    raise RowError(Reason.DUPLICATE_ID, message)
                records[path] = (number, record)
            except RowError as error:
                strays.append((number, problem(error.reason, _at(number, str(error)), place.uri)))
    return records, strays


def _at(number: int, message: str) -> str:
    return f"{RECORDS}, line {number}: {message}"


def line_record(line: bytes) -> tuple[object, str]:
    """The `image` of a line of JSON, and its other fields as JSON. Raises RowError for anything else."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
        image = values.pop("image") if isinstance(values, dict) and "image" in values else None
        record = json.dumps(values) if values else ""
    except (ValueError, RecursionError) as error:
        raise RowError(Reason.BAD_RECORD, f"{shown(line)} is no JSON in UTF-8: {error!s:.200}") from error
    if not isinstance(values, dict) or image is None:
        raise RowError(Reason.BAD_RECORD, f"{shown(line)} is no JSON object with an 'image'")
    return image, record
