"""Pieces of a store's files on a local disk, within a limit, for all processes of a machine.

    FOLDER/9f86d081...   an entry: the SHA-256 of what follows, then the bytes; its name is the SHA-256 of its key

An entry is written beside its place and moved there, and is checked each time that it is read: what a killed process or
a failing disk left is at worst read from the store again. What was read longest ago goes first. fsspec's own caches
know no limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

LOCK_NAME = ".lock"
DIGEST_BYTES = 32

log = logging.getLogger(__name__)


class DiskCache:
    """At most `limit` bytes in the files of `folder`, which is made where it does not exist. Safe to use from anywhere.

    A key must name its bytes for ever: whatever a file's content depends on belongs into it. Raises ValueError for a
    limit below 1, and what the disk raises where the folder cannot be made.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit of the cache {folder}: got {limit} bytes, expected at least 1")
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it is trusted, so others may not write
        self._lock = FileLock(self.folder / LOCK_NAME)
        self._said = False

    def get(self, key: str) -> bytes | None:
        """The bytes of a key, None where they are not there or not whole; a spoilt entry is deleted.

        A disk that is full or fails is said once, here and by `put`, and costs nothing but the store's time.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
            _touch(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(path, error)
            return None
        data = content[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != content[:DIGEST_BYTES]:
            log.warning("cache: %s is damaged, %d bytes: it is deleted and read from the store again", path, len(data))
            with self._lock:
                path.unlink(missing_ok=True)
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps the bytes of a key, after room was made for them. More than the limit is not kept."""
        size = DIGEST_BYTES + len(data)
        if size > self.limit:
            return
        path = self._path(key)
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            with self._lock:  # else two that make room at once would fill it twice
                self._make_room(size)
                draft.write_bytes(hashlib.sha256(data).digest() + data)
                _touch(draft)
                draft.replace(path)
        except OSError as error:
            self._say(path, error)
            with suppress(OSError):  # it goes with time as all else does
                draft.unlink()

    def _say(self, path: Path, error: OSError) -> None:
        if not self._said:
            self._said = True
            log.warning("cache: %s cannot be used (%s): the store is read instead", path, error)

    def _make_room(self, size: int) -> None:
        """Deletes what was used longest ago, drafts of killed processes too, until `size` more bytes fit."""
        with os.scandir(self.folder) as entries:
            found = [(entry.stat(), entry.path) for entry in entries if entry.name != LOCK_NAME]
        held = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if held + size <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            held -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()


def _touch(path: Path) -> None:
    """Marks a file as used last; the system's own time stamps are milliseconds apart."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
