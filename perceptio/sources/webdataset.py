"""WebDataset: tar shards whose neighbouring files of one name, up to the first dot, are one sample."""

from __future__ import annotations

import itertools
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from perceptio.sources.files import ABSENT, IMAGE_SUFFIXES, Place, place_of, walk
from perceptio.sources.record import (
    Found,
    Item,
    Record,
    Refused,
    RowError,
    SourceError,
    checked,
    clean,
    refuse_problem,
    refused,
    shown,
)
from perceptio.sources.tar import DamagedTarError, Member, members
from schemas.sources import WebDatasetSource
from schemas.tables import Reason

SUFFIX = ".tar"
PARTNERS = (".json", ".txt", ".cls")
RECORD_FIELDS = {"turns", "boxes", "masks"}
MOST_SHARDS = 1_000_000  # of a pattern
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")

log = logging.getLogger(__name__)


class WebDatasetReader:
    """One item a shard, whose number of samples is not known before it is read."""

    def __init__(self, source: WebDatasetSource) -> None:
        self.source = source
        self.field = f"sources.{source.name}.path"
        self.place = place_of(source.path, self.field)

    def items(self) -> Iterator[Item]:
        """The shards of a pattern, or those in a folder by path. Raises SourceError where there is none."""
        path = self.source.path
        if _RANGE.search(path):
            for name in _expanded(path, self.field):
                yield Item(place_of(name, self.field).uri, rows=0)
        elif path.endswith(SUFFIX):
            size = self.place.size()
            if size is None:
                raise SourceError(f"{self.field} '{path}' is no file: mend the path, or download it")
            yield Item(self.place.uri, rows=0, size=size)
        else:
            yield from self._folder()

    def _folder(self) -> Iterator[Item]:
        shards = 0
        for path, size in walk(self.place) if self.place.is_folder() else ():
            if path.endswith(SUFFIX):
                shards += 1
                yield Item(self.place.below(path).uri, rows=0, size=size)
        if not shards:
            raise SourceError(f"{self.field} '{self.source.path}' holds no {SUFFIX} file: mend the path")

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The samples of a shard. What was read of a damaged one is kept, and one refusal names the shard."""
        try:
            refuse_problem(item)
            with _opened(self.place.at(item.uri)) as stream:
                files = _named(members(stream, self.source.max_member_bytes), item.uri)
                for key, sample in itertools.groupby(files, lambda file: _key(file.name)):
                    yield self._sample(f"{item.uri}#{clean(key)}", list(sample))
        except RowError as error:
            yield refused(error, item.uri)
        except DamagedTarError as error:
            message = f"'{item.uri}' is no whole tar: {error}. The samples before that are kept"
            yield refused(RowError(Reason.DAMAGED_ARCHIVE, message), item.uri)

    def _sample(self, uri: str, files: list[Member]) -> Found | Refused:
        try:
            images = [file for file in files if _extension(file.name) in IMAGE_SUFFIXES]
            if len(images) != 1:
                reason = Reason.BAD_RECORD if images else Reason.MISSING_FILE
                names = ", ".join(posixpath.basename(file.name) for file in files[:9])
                raise RowError(reason, f"the sample has {len(images)} images, expected one, among {names}")
            partners = {_extension(file.name): file for file in files if _extension(file.name) in PARTNERS}
            for file in (*images, *partners.values()):
                if file.reason:
                    raise RowError(file.reason, f"{posixpath.basename(file.name)}: {file.problem}")
            return Found(uri, images[0].data, self._record(partners))
        except RowError as error:
            return refused(error, uri)

    def _record(self, partners: dict[str, Member]) -> Record:
        values = _json(partners[".json"].data) if ".json" in partners else {}
        turns = list(values.get("turns", ())) if isinstance(values.get("turns", ()), list | tuple) else [None]
        if ".txt" in partners:
            caption = _text(partners[".txt"].data, ".txt").strip()
            if caption:
                turns.append({"kind": "caption", "prompt": self.source.caption_prompt, "answer": caption})
        if ".cls" in partners:
            name = self._class(_text(partners[".cls"].data, ".cls").strip())
            turns.append({"kind": "class", "prompt": self.source.class_prompt, "answer": name})
        return checked({**values, "turns": turns})

    def _class(self, text: str) -> str:
        names = self.source.class_names
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if number < 0 or (names and number >= len(names)):
            expected = f"a class from 0 to {len(names) - 1}" if names else "the number of a class"
            raise RowError(Reason.BAD_RECORD, f".cls holds {shown(text)}, expected {expected}")
        return names[number] if names else str(number)


def _expanded(pattern: str, field: str) -> Iterator[str]:
    """The names that a pattern such as shard-{000000..000010}.tar stands for. Raises SourceError for a wrong range."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MOST_SHARDS:
        raise SourceError(f"{field} '{pattern}': '{found[0]}' is no range of 1 to {MOST_SHARDS} numbers: mend it")
    for number in range(first, last + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{len(found[1])}d}{pattern[found.end() :]}", field)


def _opened(place: Place) -> BinaryIO:
    try:
        return place.opened()
    except ABSENT as error:
        raise RowError(Reason.MISSING_FILE, f"'{place.uri}' cannot be opened: {error!s:.200}") from error


def _named(files: Iterator[Member], uri: str) -> Iterator[Member]:
    """The members that belong to samples; those without a key, such as hidden files, are counted in the log."""
    others = 0
    for file in files:
        if _key(file.name):
            yield file
        else:
            others += 1
    if others:
        log.info("%s: %d members are hidden or have no extension, not read", uri, others)


def _key(name: str) -> str:
    """A member's name up to the first dot of its last part; "" for a hidden file and one without a dot."""
    folder, last = posixpath.split(name)
    stem, dot, _ = last.partition(".")
    return posixpath.join(folder, stem) if stem and dot else ""


def _extension(name: str) -> str:
    return "." + posixpath.basename(name).partition(".")[2].lower()


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(Reason.BAD_RECORD, f"{what} is no UTF-8: {error}") from error


def _json(data: bytes) -> dict[str, Any]:
    """A record's fields; none where the JSON is of another kind: what a crawler noted about the image."""
    try:
        values = json.loads(_text(data, ".json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(Reason.BAD_RECORD, f".json is no JSON: {error!s:.200}") from error
    if isinstance(values, dict) and RECORD_FIELDS & values.keys():
        return values
    if isinstance(values, dict) and {"question", "answer"} <= values.keys():
        return {"turns": [{"kind": "vqa", "prompt": values["question"], "answer": values["answer"]}]}
    return {}
