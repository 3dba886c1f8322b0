"""A samples table as rows that can be read in any order: whole row groups are read, kept for a while, and counted.

Row groups are numbered through the table, in the order of its committed shards. Only footers are read when a table is
opened; a row group is read once for all who ask for it at the same time.
"""

from __future__ import annotations

import io
import posixpath
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from perceptio.data.disk_cache import DiskCache
from perceptio.data.store import FIRST_WAIT, StoreError, filesystem, read_bytes, retried
from schemas.manifest import MANIFEST_NAME, FileEntry, Manifest
from schemas.tables import SAMPLES

FOOTER_THREADS = 16  # footers are many and small: waiting for the store is all the work
DAMAGE_TRIES = 3  # to read a row group whose bytes are spoilt


class ShardError(ValueError):
    """A table that is not what its manifest says; the message names the file, what was seen and what was expected."""


@dataclass(frozen=True)
class RowGroup:
    """Where a row group lies."""

    file: str  # full path in the file system
    index: int  # within the file
    rows: int

    def __str__(self) -> str:
        return f"{self.file}: row group {self.index} of {self.rows} rows"


class UnreadableError(ShardError):
    """A row group whose bytes are not those that were written, or are gone, however often they are read."""

    def __init__(self, group: RowGroup, why: str) -> None:
        super().__init__(
            f"{group} cannot be read ({why}): the file was changed or cut off; `perceptio verify` names all such"
            " files, `train.unreadable: skip` trains without their rows"
        )
        self.group, self.why = group, why

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[RowGroup, str]]:
        return UnreadableError, (self.group, self.why)  # it goes from a worker to the driver


class SampleTable:
    """The rows of ROOT/samples/SOURCE, `source` being the manifest's. Safe to use from several threads.

    `cached` is the number of row groups kept in memory, the least recently used go first: it must hold those that are
    read from at a time and those that are read ahead (`Mixture.row_groups_in_use`). Raises ShardError where a file is
    missing, or its footer differs from the manifest or from the schema of samples. Row groups of a store that is no
    local disk are kept in `cache`, if there is one. With `columns` only those are read, and never kept there.
    """

    def __init__(
        self,
        root: str,
        manifest: Manifest,
        *,
        cached: int = 8,
        threads: int = 2,
        cache: DiskCache | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        if cached < 1:
            raise ValueError(f"cached: got {cached} row groups, expected at least 1")
        self._fs, path = filesystem(root)
        self._folder = posixpath.join(path, "samples", manifest.source)
        self.manifest, self.cached, self._columns = manifest, cached, None if columns is None else list(columns)
        self._cache = None if isinstance(self._fs, LocalFileSystem) else cache
        self.bytes_read = 0  # from the store: footers and row groups
        self._lock = Lock()
        self._groups: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._digests: dict[str, str] = {}  # of files, by their manifest
        entries = [shard.data for shard in manifest.shards if shard.data is not None]
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            self.row_groups = [group for groups in pool.map(self._row_groups_of, entries) for group in groups]
        if len(self) != manifest.kept:
            raise ShardError(
                f"{self._folder}: files hold {len(self)} rows, the manifest says {manifest.kept} were kept"
            )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"samples-{manifest.source}")

    @classmethod
    def open(
        cls,
        root: str,
        source: str,
        *,
        cached: int = 8,
        threads: int = 2,
        cache: DiskCache | None = None,
        columns: Sequence[str] | None = None,
    ) -> SampleTable:
        """The finished table of a source; raises ShardError where it has no manifest yet, or none of this release."""
        fs, path = filesystem(root)
        file = posixpath.join(path, "samples", source, MANIFEST_NAME)
        try:
            text = read_bytes(fs, file)
        except FileNotFoundError:
            raise ShardError(f"{file} does not exist, so the table is not finished: run `assemble` first") from None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise ShardError(f"{file} cannot be used: {error}; restore it, or assemble the source again") from error
        return cls(root, manifest, cached=cached, threads=threads, cache=cache, columns=columns)

    def __len__(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def rows_per_group(self) -> list[int]:
        """Rows of each row group, in order: what a mixture needs to know of the table."""
        return [group.rows for group in self.row_groups]

    def row(self, row_group: int, row: int) -> dict[str, Any]:
        """One sample, by the columns of `schemas.tables.SAMPLES`; waits until its row group is read.

        Raises IndexError outside the table, UnreadableError for a file that changed, and what the store raises.
        """
        if not (0 <= row_group < len(self.row_groups) and 0 <= row < self.row_groups[row_group].rows):
            raise IndexError(f"{self._folder}: no row {row} in row group {row_group} of {len(self.row_groups)}")
        table = self._request(row_group).result()
        found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
        return found

    def prefetch(self, row_groups: Iterable[int]) -> None:
        """Starts to read row groups that will soon be needed; at most `cached` of them stay."""
        for row_group in row_groups:
            self._request(row_group)

    def close(self) -> None:
        """Stops reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> SampleTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _request(self, row_group: int) -> Future[pa.Table]:
        """The row group, read or being read; one that failed is read again."""
        with self._lock:
            future = self._groups.get(row_group)
            if future is None or (future.done() and future.exception() is not None):
                future = self._pool.submit(self._read, self.row_groups[row_group])
                self._groups[row_group] = future
            self._groups.move_to_end(row_group)
            while len(self._groups) > self.cached:
                self._groups.popitem(last=False)  # whoever waits for it still gets it
            return future

    def _read(self, group: RowGroup) -> pa.Table:
        """Raises UnreadableError for a damaged one, PermissionError, or StoreError where the store fails for long."""
        again = Retrying(
            retry=retry_if_exception_type(UnreadableError),  # bytes may be spoilt on their way
            stop=stop_after_attempt(DAMAGE_TRIES),
            wait=wait_fixed(FIRST_WAIT),
            reraise=True,
        )
        found: pa.Table = again(self._read_once, group)
        return found

    def _read_once(self, group: RowGroup) -> pa.Table:
        footer = self._footers[group.file]
        if self._columns is not None:
            return self._read_columns(group, footer, self._columns)
        start, end = _range_of(footer.row_group(group.index))
        key = f"{self._digests[group.file]} {start} {end}"  # a file that is written anew has another digest
        kept = None if self._cache is None else self._cache.get(key)
        try:
            data = self._fetched(group.file, start, end) if kept is None else kept
            piece = pq.ParquetFile(_Piece(data, start), metadata=footer, page_checksum_verification=True)
            table = piece.read_row_group(group.index)
        except (StoreError, PermissionError):
            raise  # says nothing of this file
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(group, str(error)) from error
        if self._cache is not None and kept is None:
            self._cache.put(key, data)
        return table

    def _read_columns(self, group: RowGroup, footer: pq.FileMetaData, columns: list[str]) -> pa.Table:
        def read() -> pa.Table:
            with _Counted(self._fs.open(group.file, "rb", cache_type="none")) as stream:
                table = pq.ParquetFile(stream, metadata=footer, pre_buffer=True).read_row_group(group.index, columns)
            with self._lock:
                self.bytes_read += stream.bytes_read
            return table

        try:
            return retried(read, f"reading {group.file}")
        except (StoreError, PermissionError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(group, str(error)) from error

    def _fetched(self, file: str, start: int, end: int) -> bytes:
        """Bytes of a file in the store, by one request: all columns of a row group stand together."""
        data: bytes = retried(lambda: self._fs.cat_file(file, start=start, end=end), f"reading {file}")
        with self._lock:
            self.bytes_read += len(data)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes from {start}, expected {end - start}")
        return data

    def _row_groups_of(self, entry: FileEntry) -> list[RowGroup]:
        file = posixpath.join(self._folder, entry.path)

        def read() -> pq.FileMetaData:
            with _Counted(self._fs.open(file, "rb", cache_type="none")) as stream:
                footer = pq.read_metadata(stream)
            with self._lock:
                self.bytes_read += stream.bytes_read
            return footer

        try:
            footer = retried(read, f"reading {file}")
        except FileNotFoundError:
            raise ShardError(f"{file} is missing, the manifest names it with {entry.rows} rows: restore it") from None
        except pa.ArrowException as error:
            raise ShardError(f"{file} is no Parquet file ({error}), expected {entry.rows} rows: restore it") from error
        if footer.num_rows != entry.rows:
            raise ShardError(f"{file} has {footer.num_rows} rows, the manifest says {entry.rows}: restore it")
        _check_schema(file, footer.schema.to_arrow_schema())
        self._footers[file], self._digests[file] = footer, entry.sha256
        return [RowGroup(file, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]


class _Counted:
    """A file that counts the bytes read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.bytes_read = stream, 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.bytes_read += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


class _Piece(io.RawIOBase):
    """A file of which only the bytes from `start` on are there."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._at = memoryview(data), start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._start + len(self._data))[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        first = self._at - self._start
        if first < 0:
            raise OSError(f"byte {self._at} is asked for, expected those from {self._start} on")
        piece = self._data[first : first + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _range_of(group: Any) -> tuple[int, int]:
    """First byte and end of a row group's columns in its file."""
    columns = [group.column(number) for number in range(group.num_columns)]
    firsts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
    return min(firsts), max(first + c.total_compressed_size for first, c in zip(firsts, columns, strict=True))


def _check_schema(file: str, schema: pa.Schema) -> None:
    for field in SAMPLES:
        seen = schema.field(field.name).type if field.name in schema.names else "missing"
        if seen != field.type:
            raise ShardError(
                f"{file}: column '{field.name}' is {seen}, expected {field.type}: assemble the source again"
            )
