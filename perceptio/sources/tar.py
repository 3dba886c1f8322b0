"""The members of a tar from anybody, read once from front to back, nothing unpacked.

Headers are parsed by `tarfile`; walking from one to the next is done here, because `tarfile` believes every size: it
reads a header of many gigabytes into memory, and follows negative ones in a circle.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from schemas.tables import Reason

BLOCK = tarfile.BLOCKSIZE
PIECE = 2**20  # bytes that are passed over at once
LONGEST_HEADER = 2**16  # bytes of an extended header: names, times, owners
PADDING = 2**20  # bytes behind the end that are looked at
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class DamagedTarError(ValueError):
    """A tar that cannot be read on."""


@dataclass(frozen=True)
class Member:
    """A regular file with its bytes, or what is not read, with the reason."""

    name: str
    data: bytes = b""
    reason: Reason | None = None
    problem: str = ""


def members(stream: BinaryIO, most: int) -> Iterator[Member]:
    """All members but folders, in order. A file of more than `most` bytes has a problem and no data.

    Raises DamagedTarError for a broken header, and where the tar ends before its end mark or goes on behind it.
    """
    longer: dict[str, str] = {}  # what extended headers say of the next member
    while True:
        header = _exactly(stream, BLOCK)
        if not any(header):
            _check_end(stream)
            return
        info = _parsed(header)
        size = _size(longer.get("size")) if "size" in longer else info.size
        if size < 0:
            raise DamagedTarError(f"member '{info.name[:100]}' has a size of {size} bytes")
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            _extended(info, _header_data(stream, info), longer)
            continue
        name, longer = longer.get("path", info.name), {}
        if info.type == tarfile.DIRTYPE:
            _pass_over(stream, size)
        elif info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            yield Member(name, reason=Reason.BAD_RECORD, problem="it is a link, which is never followed")
        elif info.type not in _PLAIN:
            raise DamagedTarError(f"member '{name[:100]}' is of type {info.type!r}, expected files and folders")
        elif size > most:
            message = f"it has {size} bytes, the limit is {most}: raise max_member_bytes"
            yield Member(name, reason=Reason.TOO_LARGE, problem=message)
            _pass_over(stream, size)
        else:
            data = _exactly(stream, size)
            _pass_over(stream, -size % BLOCK, padded=False)
            yield Member(name, data)


def _parsed(header: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTarError(f"a header cannot be read: {error}") from error


def _header_data(stream: BinaryIO, info: tarfile.TarInfo) -> bytes:
    if not 0 <= info.size <= LONGEST_HEADER:
        raise DamagedTarError(f"an extended header has a size of {info.size} bytes, expected up to {LONGEST_HEADER}")
    data = _exactly(stream, info.size)
    _pass_over(stream, -info.size % BLOCK, padded=False)
    return data


def _extended(info: tarfile.TarInfo, data: bytes, longer: dict[str, str]) -> None:
    """Lays the name and size that a header gives to the next member into `longer`."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        longer["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if info.type != tarfile.XHDTYPE:
        return
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 8].partition(b" ")
        length = _size(digits.decode("latin-1"))
        record = data[at : at + length]
        if not space or len(record) < length or length < len(digits) + 3 or record[-1:] != b"\n":
            raise DamagedTarError(f"an extended header holds {record[:40]!r}, expected 'length key=value'")
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or key.startswith(b"GNU.sparse"):
            raise DamagedTarError(f"an extended header holds {record[:40]!r}, expected the header of a plain file")
        if key in (b"path", b"size"):
            longer[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += length


def _size(digits: str | None) -> int:
    if not digits or len(digits) > 19 or not (digits.isascii() and digits.isdigit()):
        raise DamagedTarError(f"an extended header holds the size {digits!r}, expected a whole number")
    return int(digits)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    pieces = []
    while size:
        piece = stream.read(min(size, PIECE))
        if not piece:
            raise DamagedTarError("it ends before its end mark: it was cut off")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _pass_over(stream: BinaryIO, size: int, *, padded: bool = True) -> None:
    left = size + (-size % BLOCK if padded else 0)
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise DamagedTarError("it ends before its end mark: it was cut off")
        left -= len(piece)


def _check_end(stream: BinaryIO) -> None:
    """Only zeros may follow the first block of zeros: else members would be lost without a word."""
    if any(stream.read(PADDING)):
        raise DamagedTarError("members follow behind its end mark: it was put together from several")
