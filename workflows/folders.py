"""Folders that are not tables (codebook, model): published whole, manifest last; read only when verified."""

from __future__ import annotations

import hashlib
import logging
import posixpath
import tempfile
import time
from pathlib import Path
from typing import Any

from pyarrow.fs import FSSpecHandler, PyFileSystem

from schemas.manifest import MANIFEST_NAME, FileEntry, Manifest
from workflows.store import DamagedTableError, Root, StageError, write_manifest

CLAIM_NAME = "claim.txt"
FORGOTTEN_NAME = "FORGOTTEN.json"  # `forget` puts it beside what had seen a forgotten image

log = logging.getLogger(__name__)


def publish(root: Root, local: Path, *folder: str, **fields: Any) -> Manifest:
    """The manifest of `local`'s files after they were copied to ROOT/folder; the manifest is the last file written.

    `fields` are those of Manifest but files and digest.
    """
    entries, listing = _entries(local)
    manifest = Manifest(files=entries, digest=listing, **fields)
    _copy(root, local, entries, folder)
    write_manifest(root, manifest, *folder)
    return manifest


def publish_first(root: Root, local: Path, *folder: str, digest: str, wait_s: float = 60.0, **fields: Any) -> Manifest:
    """The manifest that stands after `local` was published, by this attempt or by another one that was first.

    Where two attempts overlap, a claim on these very bytes comes before the first file, by exclusive create: files
    of two attempts never mix. `digest` names the content; files that only tell of it (reports, pictures) need not
    be in it. Raises StageError where another attempt claimed it for other bytes and does not finish within `wait_s`.
    """
    entries, listing = _entries(local)
    manifest = Manifest(files=entries, digest=digest, **fields)
    standing = root.manifest(*folder)
    if standing is not None:
        return standing
    if root.create(f"{listing}\n".encode(), *folder, CLAIM_NAME):
        _copy(root, local, entries, folder)
        root.create(manifest.model_dump_json(indent=1).encode(), *folder, MANIFEST_NAME)
    end = time.monotonic() + wait_s
    while (standing := root.manifest(*folder)) is None:
        if time.monotonic() > end:
            raise StageError(
                f"{posixpath.join(*folder)}: another attempt claimed it for other files and did not finish in"
                f" {wait_s:g} s: if it died, delete {root.at(*folder)} and run again"
            )
        time.sleep(0.5)
    return standing


def _entries(local: Path) -> tuple[tuple[FileEntry, ...], str]:
    """Every file of a local folder, and a digest of them all."""
    entries = []
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        data, name = path.read_bytes(), path.relative_to(local).as_posix()
        entries.append(FileEntry(path=name, rows=0, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    listing = "".join(f"{entry.path} {entry.sha256}\n" for entry in entries)
    return tuple(entries), hashlib.sha256(listing.encode()).hexdigest()


def _copy(root: Root, local: Path, entries: tuple[FileEntry, ...], folder: tuple[str, ...]) -> None:
    for entry in entries:
        root.write((local / entry.path).read_bytes(), *folder, entry.path)


def run_storage(root: Root) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray Train's RunConfig, for runs that lie under ROOT/runs.

    A remote store is reached through the root's own filesystem: Ray's would know nothing of its endpoint and options.
    """
    if "file" in root.fs.protocol:
        return {"storage_path": root.at("runs")}
    return {"storage_path": root.at("runs"), "storage_filesystem": PyFileSystem(FSSpecHandler(root.fs))}


def require(root: Root, *folder: str, stage: str) -> Manifest:
    """The manifest of a published folder; raises StageError where it is not finished."""
    manifest = root.manifest(*folder)
    if manifest is None:
        raise StageError(f"{root.uri}: {posixpath.join(*folder)} has no {MANIFEST_NAME}: run `{stage}` first")
    if root.exists(*folder, FORGOTTEN_NAME):
        name = posixpath.join(*folder)
        log.warning("%s was made from images that were forgotten since: delete it and run `%s` again", name, stage)
    return manifest


def checked(root: Root, entry: FileEntry, *folder: str, stage: str) -> bytes:
    """A published file's bytes. Raises DamagedTableError where it is missing or not what the manifest says."""
    data, name = root.read(*folder, entry.path), posixpath.join(*folder)
    seen = None if data is None else hashlib.sha256(data).hexdigest()
    if data is None or seen != entry.sha256:
        what = "is missing" if seen is None else f"has sha256 {seen[:16]}, the manifest says {entry.sha256[:16]}"
        raise DamagedTableError(f"{name}: file {entry.path} {what}: restore it, or delete {name} and run `{stage}`")
    return data


def local_copy(root: Root, *folder: str, stage: str) -> Path:
    """A local folder with the verified files of a published one: itself on a local root, else a copy.

    Raises StageError where it is not finished, DamagedTableError where a file is not what the manifest says.
    """
    manifest = require(root, *folder, stage=stage)
    here = "file" in root.fs.protocol
    target = Path(root.at(*folder)) if here else Path(tempfile.mkdtemp(prefix="perceptio-"))
    for entry in manifest.files:
        data = checked(root, entry, *folder, stage=stage)
        if not here:
            path = target / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return target
