"""A list of addresses of images, one a line: local, s3://, http:// or https://."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from perceptio.data.store import filesystem
from perceptio.sources.files import LONGEST_NAME, Place, is_text, place_of, read_file
from perceptio.sources.folder import line_record
from perceptio.sources.record import (
    Found,
    Item,
    Refused,
    RowError,
    SourceError,
    problem,
    record_of,
    refuse_problem,
    refused,
    shown,
)
from perceptio.sources.web import Web
from schemas.sources import ListSource
from schemas.tables import Reason

LONGEST_ADDRESS = 8192  # characters
_ON_S3 = re.compile(r"[a-zA-Z0-9._-]{3,255}/[^/].*", re.DOTALL)  # bucket and key


class ListReader:
    """One item a line. An address that stands there twice is two items of one id."""

    def __init__(self, source: ListSource) -> None:
        self.source = source
        self.field = f"sources.{source.name}.path"
        self.place = place_of(source.path, self.field)

    @cached_property
    def web(self) -> Web:
        """What fetches web addresses; listing needs none of it."""
        return Web(self.source)

    @cached_property
    def _on_s3(self) -> Any:
        return filesystem("s3://bucket")[0]

    @cached_property
    def _on_disk(self) -> Any:
        return filesystem("/")[0]

    def items(self) -> Iterator[Item]:
        """The addresses in the list's order. Raises SourceError for no list, or one without a line."""
        if self.place.size() is None:
            raise SourceError(f"{self.field} '{self.source.path}' is no file: mend the path")
        lines = 0
        with self.place.opened() as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    lines += 1
                    yield self._item(line, number)
        if not lines:
            raise SourceError(f"{self.field} '{self.source.path}' is empty: write one address a line")

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The image at the address, with its record."""
        try:
            refuse_problem(item)
            record = record_of(item.record)
            data = self.web.fetch(item.uri) if item.uri.startswith(("http://", "https://")) else self._stored(item.uri)
            yield Found(item.uri, data, record)
        except RowError as error:
            yield refused(error, item.uri)

    def _item(self, line: bytes, number: int) -> Item:
        try:
            if self.place.path.endswith(".jsonl"):
                address, record = line_record(line)
            else:
                address, record = _line(line), ""
            return Item(self._address(address), record=record)
        except RowError as error:
            return problem(error.reason, f"line {number}: {error}", f"{self.place.uri}#{number}")

    def _address(self, address: object) -> str:
        if not isinstance(address, str) or not address or len(address) > LONGEST_ADDRESS or not is_text(address):
            message = f"the address is {shown(address)}, expected a text of up to {LONGEST_ADDRESS} characters"
            raise RowError(Reason.BAD_RECORD, message)
        scheme, separator, rest = address.partition("://")
        if not separator:
            return self._relative(address)
        if scheme.lower() in ("http", "https"):
            return f"{scheme.lower()}://{rest}"
        if scheme.lower() not in ("s3", "s3a"):
            raise RowError(Reason.BAD_RECORD, f"the address is on '{scheme[:20]}', expected s3, http, https or a path")
        if not _ON_S3.fullmatch(rest) or len(rest.partition("/")[2].encode()) > LONGEST_NAME:
            raise RowError(Reason.BAD_RECORD, f"'{address[:100]}' is no s3://bucket/key with a key of up to 1024 bytes")
        return f"s3://{rest}"

    def _relative(self, path: str) -> str:
        """A path beside the list. A list on S3 names no file of a worker's disk, nor anything outside its folder."""
        plain = posixpath.normpath(path)
        if not self.place.local and plain.startswith(("/", "../")):
            message = f"'{path[:200]}' is outside the folder of the list on S3: write s3://bucket/key"
            raise RowError(Reason.BAD_RECORD, message)
        beside = Place(self.place.fs, posixpath.normpath(posixpath.join(posixpath.dirname(self.place.path), plain)))
        return beside.uri

    def _stored(self, uri: str) -> bytes:
        store = self._on_s3 if uri.startswith("s3://") else self._on_disk
        place = Place(store, uri.removeprefix("s3://"))
        size = place.size()
        if size is None:
            raise RowError(Reason.MISSING_FILE, f"'{uri}' is no file: it was moved, or never copied")
        if size > self.source.max_bytes:
            message = f"'{uri}' has {size} bytes, the limit is {self.source.max_bytes}: raise max_bytes"
            raise RowError(Reason.TOO_LARGE, message)
        return read_file(place, size)


def _line(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RowError(Reason.BAD_RECORD, f"{shown(line)} is no UTF-8: {error}") from error
