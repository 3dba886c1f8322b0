"""Where a run lies: a local folder or an s3:// address, and the exclusive create that commits need of it."""

from __future__ import annotations

import os
import posixpath
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from pydantic import ValidationError

from schemas.manifest import MANIFEST_NAME, Manifest

READERS = 16  # threads for many small files: waiting for the store is all the work
STORES = ("file", "local", "s3", "s3a")  # whose exclusive create is known to be atomic


class StageError(Exception):
    """A stage that cannot go on; the message names the field or file, what was seen, what to do."""


class OtherInputsError(StageError):
    """What stands on disk was made from other inputs or settings."""


class DamagedTableError(StageError):
    """A file is missing or is not what its marker says."""


@dataclass(frozen=True)
class Root:
    """A store and the folder in it under which a run's tables lie."""

    fs: Any
    path: str
    uri: str

    def at(self, *parts: str) -> str:
        return posixpath.normpath(posixpath.join(self.path, *parts))

    def read(self, *parts: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        try:
            data: bytes = self.fs.cat_file(self.at(*parts))
        except FileNotFoundError:
            return None
        return data

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes | None]:
        """The bytes of many small files under the root, by path; None where there is no such file."""
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(paths, pool.map(self.read, paths), strict=True))

    def require_exclusive_create(self, *folder: str) -> None:
        """Raises StageError where the store lets an exclusive create replace a file: two attempts could both win."""
        name = f"probe-{secrets.token_hex(8)}"
        try:
            first, second = self.create(b"first", *folder, name), self.create(b"second", *folder, name)
        finally:
            self.delete(*folder, name)
        if not first or second:
            raise StageError(
                f"root '{self.uri}': an exclusive create replaced a file that stood; the store must honour"
                " If-None-Match (local disks and S3 do)"
            )

    def write(self, data: bytes, *parts: str) -> None:
        """Writes or replaces a file: readers see all of it or nothing."""
        path = self.at(*parts)
        if self._local:
            os.replace(_draft(path, data), path)  # noqa: PTH105
        else:
            self.fs.pipe_file(path, data)

    def create(self, data: bytes, *parts: str) -> bool:
        """True if the file was created now, whole and by nobody else; False if it stood already."""
        path = self.at(*parts)
        try:
            if self._local:
                draft = _draft(path, data)
                try:
                    os.link(draft, path)  # as exclusive as O_EXCL, and never half written
                finally:
                    draft.unlink()
            else:
                self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return self.read(*parts) == data  # a store's own retry can meet what its first try wrote
        return True

    def files(self, *parts: str) -> list[str]:
        """Names of the files in a folder, sorted."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.at(*parts), detail=True)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry["name"]) for entry in found if entry["type"] == "file")

    def delete(self, *parts: str) -> None:
        """Deletes a file; one that is gone already is no error."""
        try:
            self.fs.rm_file(self.at(*parts))
        except FileNotFoundError:
            return

    def manifest(self, *folder: str) -> Manifest | None:
        """The manifest of a finished folder, None where it is not finished."""
        data = self.read(*folder, MANIFEST_NAME)
        try:
            return None if data is None else Manifest.model_validate_json(data)
        except ValidationError as error:
            raise DamagedTableError(f"{self.at(*folder, MANIFEST_NAME)} cannot be read: {error}") from error

    @property
    def _local(self) -> bool:
        return "file" in self.fs.protocol


def open_root(uri: str) -> Root:
    """The root at a local path or s3:// address. Raises StageError for a store without exclusive create."""
    fs, path = fsspec.core.url_to_fs(uri)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    if not set(protocols) & set(STORES):
        raise StageError(f"root '{uri}' is on '{protocols[0]}', expected one of {STORES}: others may double rows")
    return Root(fs, path, uri)


def write_manifest(root: Root, manifest: Manifest, *folder: str) -> None:
    """Writes a folder's manifest: the last file of a table, codebook, checkpoint or evaluation."""
    root.write(manifest.model_dump_json(indent=1).encode(), *folder, MANIFEST_NAME)


def _draft(path: str, data: bytes) -> Path:
    """A file beside `path` with these bytes, on the disk and not only in its cache."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}~{secrets.token_hex(4)}")
    with draft.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return draft
