"""Where a run lies: a local folder or an s3:// address, and the exclusive create that commits need of it.

Every request to a store is repeated where its failure may pass (perceptio.data.store); a StageError says where it did
not. A create can be repeated because its bytes are the attempt's own: a file that stands with just these bytes is the
one that an earlier try wrote and whose answer was lost.
"""

from __future__ import annotations

import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from perceptio.data.store import StoreError, answer_of, filesystem, retried, stood_already
from schemas.manifest import MANIFEST_NAME, Manifest

STORES = ("file", "local", "s3", "s3a")  # whose exclusive create is known to be atomic
PART_BYTES = 50 * 2**20  # an object of two parts or more is uploaded in parts, each repeated by itself
THREADS = 16  # small files are all waiting for the store

Found = TypeVar("Found")


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
        """All bytes of a file, None where there is none. Raises StageError where the store does not give them."""
        path = self.at(*parts)
        try:
            data: bytes = self._ask("reading", path, lambda: self.fs.cat_file(path))
        except FileNotFoundError:
            return None
        return data

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """The bytes of many small files by their path, None where there is none; THREADS are read at a time."""
        wanted = list(paths)
        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(wanted, pool.map(self.read, wanted), strict=True))

    def exists(self, *parts: str) -> bool:
        """True if the file or folder is there."""
        path = self.at(*parts)
        return bool(self._ask("looking for", path, lambda: self.fs.exists(path)))

    def write(self, data: bytes, *parts: str) -> None:
        """Writes or replaces a file: readers see all of it or nothing."""
        path = self.at(*parts)
        if self.is_local:
            os.replace(_draft(path, data), path)  # noqa: PTH105
        else:
            self._ask("writing", path, lambda: self.fs.pipe_file(path, data, chunksize=PART_BYTES))

    def upload(self, local: Path, *parts: str) -> None:
        """Copies a local file of any size to the store, or replaces one: readers see all of it or nothing."""
        path = self.at(*parts)
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            draft = Path(f"{path}~{secrets.token_hex(4)}")
            shutil.copyfile(local, draft)
            with draft.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(draft, path)  # noqa: PTH105
        else:
            self._ask("writing", path, lambda: self.fs.put_file(str(local), path, chunksize=PART_BYTES))

    def create(self, data: bytes, *parts: str) -> bool:
        """True if the file was created now, whole and by nobody else; False if it stood already with other bytes.

        The bytes must tell attempts apart: whoever finds just these bytes takes the file for its own.
        """
        # a repeated try can meet what the first one wrote
        return self._create(data, self.at(*parts)) or self.read(*parts) == data

    def require_exclusive_create(self, *folder: str) -> None:
        """Raises StageError where the store replaces a file that it was asked to create: markers would mean nothing.

        Two writes and a deletion of a small file, whose name is this call's own.
        """
        path = self.at(*folder, f"_exclusive-{secrets.token_hex(8)}")
        try:
            self._create(b"first", path)
            replaced = self._create(b"second", path)
        finally:
            self._delete(path)
        if replaced:
            raise StageError(
                f"{self.uri}: the store replaced a file that it was asked to create (PUT with `If-None-Match: *`), so"
                " two attempts could commit the same shard; expected the second to be refused, as local disks and S3"
                " do: choose another root, or a newer version of this store"
            )

    def files(self, *parts: str) -> list[str]:
        """Names of the files in a folder, sorted."""
        path = self.at(*parts)
        try:
            found = self._ask("listing", path, lambda: self.fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry["name"]) for entry in found if entry["type"] == "file")

    def folders(self, *parts: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        path = self.at(*parts)
        try:
            found = self._ask("listing", path, lambda: self.fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry["name"].rstrip("/")) for entry in found if entry["type"] == "directory")

    def files_below(self, *parts: str) -> list[str]:
        """Paths below the root of all files under a folder, sorted."""
        path = self.at(*parts)
        return sorted(
            posixpath.relpath(name, self.path) for name in self._ask("listing", path, lambda: self.fs.find(path))
        )

    def columns(self, names: Sequence[str], *parts: str) -> pa.Table:
        """Some columns of a Parquet file; nothing else of it is read. Raises DamagedTableError where it cannot be."""
        path = self.at(*parts)

        def read() -> pa.Table:
            with self.fs.open(path, "rb") as stream:
                try:
                    return pq.read_table(stream, columns=list(names))
                except (pa.ArrowException, OSError) as error:
                    # pyarrow says OSError for a damaged footer too, but without the system's number of an error
                    plain = type(error) is OSError and error.errno is None and answer_of(error) is None
                    if isinstance(error, OSError) and not plain:
                        raise
                    message = f"file {path} is no Parquet file ({error}): `verify` says what to do"
                    raise DamagedTableError(message) from error

        try:
            return self._ask("reading", path, read)
        except FileNotFoundError as error:
            raise DamagedTableError(f"file {path} is missing: `verify` says what to do") from error

    def size_and_age(self, path: str, now: float) -> tuple[int, float]:
        """Bytes of a file under the root, and seconds since it was written."""
        info = self._ask("looking at", self.at(path), lambda: self.fs.info(self.at(path)))
        written = info.get("mtime", info.get("LastModified"))
        return int(info["size"]), now - (written.timestamp() if hasattr(written, "timestamp") else float(written))

    def delete(self, *parts: str) -> None:
        """Deletes a file; one that is gone already is no error."""
        self._delete(self.at(*parts))

    def delete_many(self, paths: Iterable[str]) -> None:
        """Deletes files by their path, THREADS at a time; those that are gone already are no error."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.delete, paths))

    def manifest(self, *folder: str) -> Manifest | None:
        """The manifest of a finished folder, None where it is not finished."""
        data = self.read(*folder, MANIFEST_NAME)
        try:
            return None if data is None else Manifest.model_validate_json(data)
        except ValidationError as error:
            raise DamagedTableError(
                f"{self.at(*folder, MANIFEST_NAME)} cannot be read: {error}; restore it, or delete it and run its stage"
                " again"
            ) from error

    def _create(self, data: bytes, path: str) -> bool:
        """True if this very try made the file; False if it stood, be it from a try of ours whose answer was lost."""
        try:
            if self.is_local:
                draft = _draft(path, data)
                try:
                    os.link(draft, path)  # as exclusive as O_EXCL, and never half written
                finally:
                    draft.unlink()
            else:
                self._ask("creating", path, lambda: self.fs.pipe_file(path, data, mode="create"))
        except OSError as error:
            if not stood_already(error):
                raise
            return False
        return True

    def _delete(self, path: str) -> None:
        try:
            self._ask("deleting", path, lambda: self.fs.rm_file(path))
        except FileNotFoundError:
            return

    def _ask(self, doing: str, path: str, call: Callable[[], Found]) -> Found:
        """What the store answers. Raises StageError where it fails for long or refuses, OSError as local disks do."""
        if self.is_local:
            return call()
        what = f"{doing} {self.fs.unstrip_protocol(path)}"
        try:
            return retried(call, what)
        except StoreError as error:
            raise StageError(str(error)) from error
        except PermissionError as error:
            raise StageError(f"{what}: refused ({error}): give these keys the right to do so, or use others") from error

    @property
    def is_local(self) -> bool:
        return "file" in self.fs.protocol


def open_root(uri: str) -> Root:
    """The root at a local path or s3:// address. Raises StageError for a store without exclusive create."""
    fs, path = filesystem(uri)
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
