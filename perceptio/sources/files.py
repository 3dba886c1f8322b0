"""Files of a source: where they lie, in what order they are listed, and their bytes."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from perceptio.data.store import filesystem, read_bytes, retried
from perceptio.sources.record import (
    Found,
    Item,
    Refused,
    RowError,
    SourceError,
    record_of,
    refuse_problem,
    refused,
    shown,
)
from schemas.tables import Reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
STORES = ("file", "local", "s3", "s3a")
PIECE = 2**23  # bytes that are asked for at once
LONGEST_NAME = 1024  # bytes of a key on S3
READS = 2  # of a file that came shorter than it was listed
ABSENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # no disk has a file of such a name


@dataclass(frozen=True)
class Place:
    """A file or folder in a store."""

    fs: Any
    path: str  # as the store spells it

    @property
    def local(self) -> bool:
        return "file" in self.fs.protocol

    def below(self, name: str) -> Place:
        """A file or folder inside this one."""
        return Place(self.fs, posixpath.join(self.path, name) if name else self.path)

    @property
    def uri(self) -> str:
        """Its address: an absolute path, or s3://..."""
        return self.path if self.local else f"s3://{self.path}"

    def at(self, uri: str) -> Place:
        """The file of an address in the same store."""
        return Place(self.fs, uri if self.local else uri.partition("://")[2])

    def size(self) -> int | None:
        """Bytes of a file; None where there is no file. Raises OSError where the store fails."""
        try:
            info = retried(lambda: self.fs.info(self.path), f"looking at {self.uri}")
        except OSError as error:
            if not isinstance(error, ABSENT) and error.errno not in NO_NAME:
                raise
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def opened(self) -> io.BufferedReader:
        """The file as a stream, read from front to back. Raises OSError, also where it is missing."""
        return io.BufferedReader(self.opened_at_random("readahead"), PIECE)

    def opened_at_random(self, cache: str = "none") -> StoredStream:
        """The file as a stream that reads no more than it is asked for."""
        options = {} if self.local else {"block_size": PIECE, "cache_type": cache}
        opening = partial(self.fs.open, self.path, "rb", **options)
        return StoredStream(retried(opening, f"opening {self.uri}"), self.uri)

    def is_folder(self) -> bool:
        return bool(retried(lambda: self.fs.isdir(self.path), f"looking at {self.uri}"))


class StoredStream(io.RawIOBase):
    """A file in a store, whose reads are tried again. What the store raises in the end is an OSError."""

    def __init__(self, stream: Any, uri: str) -> None:
        self.stream, self.uri = stream, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def readinto(self, buffer: Any) -> int:
        start = self.stream.tell()

        def read() -> bytes:
            self.stream.seek(start)
            data: bytes = self.stream.read(len(buffer))
            return data

        data = retried(read, f"reading {self.uri}")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def place_of(path: str, field: str) -> Place:
    """Where a recipe's path lies. Raises SourceError, with the field's name, for a store that is not read from."""
    protocol = fsspec.core.split_protocol(path)[0] or "file"
    if protocol not in STORES or "::" in path:
        raise SourceError(f"{field} '{path}' is on '{protocol}', expected a local path or an s3:// address")
    fs, inner = filesystem(path)
    return Place(fs, inner)


def folder_at(path: str, field: str) -> Place:
    """The folder of a recipe's field. Raises SourceError where it is none."""
    place = place_of(path, field)
    if not place.is_folder():
        raise SourceError(f"{field} '{path}' is no folder: mend it in the recipe")
    return place


def walk(place: Place) -> Iterator[tuple[str, int]]:
    """Relative path and bytes of every file below a folder, sorted by path, while they are listed.

    A file whose size cannot be told (a link to nothing) has -1. Raises SourceError for a link that leads in a circle.
    """
    return _walk_local(place.path, "", ()) if place.local else _walk_s3(place)


def _walk_local(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    real = str(Path(folder).resolve())
    if real in above:
        raise SourceError(f"'{folder}' is a link to a folder that it lies in: take the link out")
    try:
        with os.scandir(folder) as entries:  # a slash behind folders sorts them as S3 sorts keys
            names = sorted(entry.name + "/" * Path(entry.path).is_dir() for entry in entries)
    except PermissionError as error:
        raise SourceError(f"'{folder}' may not be listed: give read permission") from error
    for name in names:
        path = posixpath.join(folder, name)
        if name.endswith("/"):
            yield from _walk_local(path[:-1], prefix + name, (*above, real))
        else:
            yield prefix + name, Path(path).stat().st_size if Path(path).exists() else -1


def _walk_s3(place: Place) -> Iterator[tuple[str, int]]:
    """Page by page: the store's own `find` would hold all names at once."""
    bucket, key, _ = place.fs.split_path(place.path)
    prefix = f"{key.rstrip('/')}/" if key else ""
    more: dict[str, str] = {}
    listing = f"listing {place.uri}"
    while True:
        page = retried(partial(place.fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **more), listing)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):
                yield entry["Key"].removeprefix(prefix), int(entry["Size"])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def relative(name: object, field: str) -> str:
    """A path inside a folder, as data name it, made plain. Raises RowError for any other value."""
    if not isinstance(name, str) or not name:
        raise RowError(Reason.BAD_RECORD, f"{field} is {shown(name)}, expected the path of a file")
    if not is_text(name):
        raise RowError(Reason.BAD_RECORD, f"{field} {name[:60]!r} is no valid text: rename the file")
    plain = posixpath.normpath(name)
    if plain.startswith(("../", "/")) or plain in ("..", "."):
        message = f"{field} '{name[:200]}' is outside the folder: paths are relative and stay inside"
        raise RowError(Reason.BAD_RECORD, message)
    if len(plain.encode()) > LONGEST_NAME:
        raise RowError(Reason.BAD_RECORD, f"{field} '{plain[:60]}...' is longer than {LONGEST_NAME} bytes")
    return plain


def is_text(text: str) -> bool:
    """True for valid Unicode without NUL: what a path, a table and JSON can hold."""
    return "\x00" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_file(place: Place, size: int = -1) -> bytes:
    """The bytes of a file. Raises RowError where there is none or it is shorter than `size`, OSError as the store."""
    for _ in range(READS):
        data = _bytes(place)
        if len(data) >= size:
            return data
    message = f"{len(data)} bytes came, {size} were listed: the file was cut off, or changed since"
    raise RowError(Reason.TRUNCATED_IMAGE, message)


def _bytes(place: Place) -> bytes:
    try:
        if place.local and not stat.S_ISREG(Path(place.path).stat().st_mode):
            raise RowError(Reason.MISSING_FILE, f"'{place.uri}' is no regular file")
        data = read_bytes(place.fs, place.path)
    except PermissionError as error:
        raise RowError(Reason.MISSING_FILE, f"'{place.uri}' may not be read: give read permission") from error
    except ABSENT as error:
        raise RowError(Reason.MISSING_FILE, f"'{place.uri}' is not there: it was moved, or never copied") from error
    except OSError as error:
        if error.errno not in NO_NAME:
            raise
        raise RowError(Reason.MISSING_FILE, f"'{place.uri}' cannot be a file: {error.strerror}") from error
    return data


def found(place: Place, item: Item) -> Found | Refused:
    """The image of an item that is one file, with the record that the item carries."""
    try:
        refuse_problem(item)
        return Found(item.uri, read_file(place.at(item.uri), item.size), record_of(item.record))
    except RowError as error:
        return refused(error, item.uri)


def read_whole(place: Place, field: str, most: int) -> bytes:
    """The bytes of a source's own file, of `most` bytes at most. Raises SourceError where that cannot be had."""
    size = place.size()
    if size is None:
        raise SourceError(f"{field}: '{place.uri}' is no file: mend the path, or download it")
    if size > most:
        raise SourceError(f"{field}: '{place.uri}' has {size} bytes, the limit is {most}: raise max_file_bytes")
    try:
        return read_file(place, size)
    except RowError as error:
        raise SourceError(f"{field}: {error}") from error
