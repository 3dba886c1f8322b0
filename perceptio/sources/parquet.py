"""Parquet files of images as Hugging Face's hub has them, with a map that says which column is what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from perceptio.sources.files import Place, folder_at, place_of, read_file, relative, walk
from perceptio.sources.parquet_file import Footer, Values, read_footer, read_rows
from perceptio.sources.parquet_record import record_values
from perceptio.sources.record import (
    Found,
    Item,
    Refused,
    RowError,
    SourceError,
    checked,
    problem,
    refuse_problem,
    refused,
    shown,
)
from schemas.sources import ParquetSource
from schemas.tables import Reason

SUFFIX = ".parquet"
THREADS = 16  # that read footers: most of the time they wait for the store


class ParquetReader:
    """Items are ranges of rows within one row group. For them only the files' footers are read."""

    def __init__(self, source: ParquetSource) -> None:
        self.source = source
        self.field = f"sources.{source.name}"
        self.place = place_of(source.path, f"{self.field}.path")
        self.images = None if source.images is None else place_of(source.images, f"{self.field}.images")
        columns = source.columns
        named = (columns.image, columns.question, columns.answer, columns.expression, columns.mask, columns.box)
        self.columns = list(dict.fromkeys(name for name in named if name is not None))

    def items(self) -> Iterator[Item]:
        """Ranges of rows by file, in order; a broken file is one refusal.

        Raises SourceError where there is no file, or a file lacks a column or has it in a type that cannot be read.
        """
        files = 0
        with ThreadPoolExecutor(THREADS) as pool:
            places = self._files()
            while some := list(itertools.islice(places, 4 * THREADS)):
                for footer in pool.map(_footer, some):
                    files += 1
                    yield from self._ranges(footer) if isinstance(footer, Footer) else [footer]
        if not files:
            raise SourceError(f"{self.field}.path '{self.source.path}' holds no {SUFFIX} file: mend the path")

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The images of the range; where a file breaks off, a refusal for each row that is left."""
        done = 0
        try:
            refuse_problem(item)
            for row in read_rows(self.place.at(item.uri), item.first, item.rows, self.columns):
                yield self._found(row, f"{item.uri}#{item.first + done}")
                done += 1
            error = RowError(Reason.BAD_RECORD, f"'{item.uri}' has fewer rows than its footer said when it was listed")
        except RowError as broken:
            error = broken
        for row_number in range(item.first + done, item.first + item.rows):
            yield refused(error, item.uri if item.reason else f"{item.uri}#{row_number}")

    def _files(self) -> Iterator[Place]:
        if not self.place.is_folder():
            yield self.place
            return
        folder = folder_at(self.source.path, f"{self.field}.path")
        yield from (folder.below(path) for path, _ in walk(folder) if path.endswith(SUFFIX))

    def _ranges(self, footer: Footer) -> Iterator[Item]:
        self._check(footer)
        most, start = self.source.rows_per_item, 0
        for rows in footer.groups:
            for first in range(start, start + rows, most):
                yield Item(footer.place.uri, first=first, rows=min(most, start + rows - first))
            start += rows

    def _check(self, footer: Footer) -> None:
        where = f"{self.field}.columns"
        for name in self.columns:
            if footer.schema.get_field_index(name) < 0:
                known = ", ".join(footer.schema.names[:20])
                raise SourceError(f"{where}: '{footer.place.uri}' has no column '{name}', or two; it has {known}")
        kind = footer.schema.field(self.source.columns.image).type
        if _is_path(kind) and self.images is None:
            raise SourceError(f"{where}.image '{self.source.columns.image}' holds paths: set {self.field}.images")
        if not (_is_path(kind) or _is_bytes(kind) or _is_file(kind)):
            raise SourceError(
                f"{where}.image '{self.source.columns.image}' is {kind} in '{footer.place.uri}', expected "
                "struct<bytes, path>, binary or string"
            )

    def _found(self, row: Values | RowError, uri: str) -> Found | Refused:
        try:
            if isinstance(row, RowError):
                raise row
            data = self._file(row[self.source.columns.image], f"column '{self.source.columns.image}'")
            return Found(uri, data, checked(record_values(row, self.source, data, self._file)))
        except RowError as error:
            return refused(error, uri)

    def _file(self, value: Any, where: str) -> bytes:
        """The bytes of an image or mask. Raises RowError where there are none."""
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if value is None or self.images is None:
            raise RowError(
                Reason.MISSING_FILE, f"{where} holds no bytes, and {self.field}.images no folder: {shown(value)}"
            )
        return read_file(self.images.below(relative(value, where)))


def _footer(place: Place) -> Footer | Item:
    try:
        return read_footer(place)
    except RowError as error:
        return problem(error.reason, str(error), place.uri)


def _is_path(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_file(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
