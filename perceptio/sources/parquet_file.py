"""Parquet files from anybody: their footers, and rows of one row group, with the store's errors kept apart.

pyarrow says OSError for a broken file, and so does a store that fails. A broken file is refused for good, a store is
asked again: so what the store raises passes through pyarrow as another error.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perceptio.sources.files import ABSENT, Place
from perceptio.sources.record import RowError
from schemas.tables import Reason

Values = dict[str, Any]
BUFFER = 2**22  # bytes of a column chunk that are read at once
BATCH = 64  # rows that are decoded at once
BROKEN = (pa.ArrowException, OSError, ValueError, MemoryError)  # what pyarrow raises for a broken file


class _StoreError(Exception):
    """Carries an OSError of the store past pyarrow."""

    def __init__(self, failure: OSError) -> None:
        super().__init__(str(failure))
        self.failure = failure


class _Stream(io.RawIOBase):
    """A stored file as pyarrow reads it."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def read(self, size: int = -1) -> bytes:
        try:
            return self.stream.read(size) or b""
        except OSError as error:
            raise _StoreError(error) from error


@dataclass(frozen=True)
class Footer:
    """What a file says of itself at its end."""

    place: Place
    schema: pa.Schema
    groups: tuple[int, ...]  # rows of each row group


def read_footer(place: Place) -> Footer:
    """The file's columns and row groups. Raises RowError for a missing or broken file, OSError as the store."""
    with _opened(place) as file:
        groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        bytes_ = place.size() or 0
        if any(rows < 0 for rows in groups) or sum(groups) > bytes_:
            message = f"'{place.uri}' claims {sum(groups)} rows in {bytes_} bytes: its footer is broken"
            raise RowError(Reason.BAD_RECORD, message)
        return Footer(place, file.schema_arrow, groups)


def read_rows(place: Place, first: int, count: int, columns: Sequence[str]) -> Iterator[Values | RowError]:
    """`count` rows from the file's row `first` on, which lie in one row group; only these columns are read.

    A text that is no UTF-8 makes its row an error. Raises RowError where the file is missing or breaks, OSError as the
    store.
    """
    with _opened(place) as file:
        missing = [name for name in columns if file.schema_arrow.get_field_index(name) < 0]
        if missing:
            raise RowError(Reason.BAD_RECORD, f"'{place.uri}' has no column {missing[0]!r} any more: it was changed")
        group, skip = _group_at(file, first)
        batches = file.iter_batches(BATCH, row_groups=group, columns=list(columns), use_threads=False)
        for batch in batches if group else ():
            wanted = batch.slice(skip, count)
            skip = max(0, skip - batch.num_rows)
            count -= wanted.num_rows
            for index in range(wanted.num_rows):
                yield _row(wanted, index, columns)
            if not count:
                return


def _group_at(file: pq.ParquetFile, first: int) -> tuple[list[int], int]:
    """The row group that holds a row, and how many of its rows come before it; no group behind the file's end."""
    start = 0
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if start <= first < start + length:
            return [group], first - start
        start += length
    return [], 0


def _row(batch: pa.RecordBatch, index: int, columns: Sequence[str]) -> Values | RowError:
    try:
        return {name: batch.column(name)[index].as_py() for name in columns}
    except UnicodeDecodeError as error:
        return RowError(Reason.BAD_RECORD, f"a text is no UTF-8: {error}")


@contextmanager
def _opened(place: Place) -> Iterator[pq.ParquetFile]:
    """The file, its footer read; what breaks inside the block is told apart too."""
    try:
        stream = place.opened_at_random()
    except ABSENT as error:
        raise RowError(Reason.MISSING_FILE, f"'{place.uri}' cannot be opened: {error!s:.200}") from error
    with stream:
        try:
            yield pq.ParquetFile(_Stream(stream), buffer_size=BUFFER, pre_buffer=False)
        except RowError:
            raise
        except _StoreError as error:
            raise error.failure from error
        except BROKEN as error:
            message = f"'{place.uri}' is no whole Parquet file: {error!s:.300}"
            raise RowError(Reason.BAD_RECORD, message) from error
