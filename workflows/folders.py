"""Folders that are not tables (codebook, model): published whole, manifest last; read only when verified."""

from __future__ import annotations

import hashlib
import posixpath
import tempfile
from pathlib import Path
from typing import Any

from schemas.manifest import MANIFEST_NAME, FileEntry, Manifest
from workflows.store import DamagedTableError, Root, StageError, write_manifest


def publish(root: Root, local: Path, *folder: str, **fields: Any) -> Manifest:
    """The manifest of `local`'s files after they were copied to ROOT/folder; the manifest is the last file written.

    `fields` are those of Manifest but files and digest.
    """
    entries = []
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        data, name = path.read_bytes(), path.relative_to(local).as_posix()
        root.fs.makedirs(root.at(*folder, posixpath.dirname(name)), exist_ok=True)
        root.write(data, *folder, name)
        entries.append(FileEntry(path=name, rows=0, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    listing = "".join(f"{entry.path} {entry.sha256}\n" for entry in entries)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    manifest = Manifest(files=tuple(entries), digest=digest, **fields)
    write_manifest(root, manifest, *folder)
    return manifest


def require(root: Root, *folder: str, stage: str) -> Manifest:
    """The manifest of a published folder; raises StageError where it is not finished."""
    manifest = root.manifest(*folder)
    if manifest is None:
        raise StageError(f"{root.uri}: {posixpath.join(*folder)} has no {MANIFEST_NAME}: run `{stage}` first")
    return manifest


def local_copy(root: Root, *folder: str, stage: str) -> Path:
    """A local folder with the verified files of a published one: itself on a local root, else a copy.

    Raises StageError where it is not finished, DamagedTableError where a file is not what the manifest says.
    """
    manifest = require(root, *folder, stage=stage)
    name = posixpath.join(*folder)
    here = "file" in root.fs.protocol
    target = Path(root.at(*folder)) if here else Path(tempfile.mkdtemp(prefix="perceptio-"))
    for entry in manifest.files:
        data = root.read(*folder, entry.path)
        seen = None if data is None else hashlib.sha256(data).hexdigest()
        if data is None or seen != entry.sha256:
            what = "is missing" if seen is None else f"has sha256 {seen[:16]}, the manifest says {entry.sha256[:16]}"
            raise DamagedTableError(f"{name}: file {entry.path} {what}: restore it, or delete {name} and run `{stage}`")
        if not here:
            path = target / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return target
