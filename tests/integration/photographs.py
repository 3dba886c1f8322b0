"""Folders of small pictures as a source, and what stands of them in the tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from schemas.manifest import ShardCommit
from schemas.recipe import Recipe
from schemas.tables import TABLES
from workflows.commits import Table
from workflows.store import open_root

Commits = dict[int, ShardCommit]


def png(seed: int) -> bytes:
    """A smooth picture of its own for every seed."""
    y, x = np.mgrid[0:1:32j, 0:1:40j]
    waves = [np.sin(2 * np.pi * ((seed % 7 + 1) * x + (seed % 5) * y) + seed + channel) for channel in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1))).save(stream, "PNG")
    return stream.getvalue()


def folder_of(place: Path, pictures: dict[str, bytes]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (place / name).write_bytes(data)
    return place


def source(folder: Path, name: str = "photos", **more: Any) -> dict[str, Any]:
    return {"name": name, "format": "folder", "path": str(folder)} | more


def table(recipe: Recipe, name: str, of: str = "photos") -> Table:
    return Table(open_root(recipe.root), name, of)


def ids_by_name(recipe: Recipe, of: str = "photos") -> dict[str, str]:
    images = table(recipe, "images", of)
    rows = [row for shard in images.committed() for row in images.read_shard(shard, ["id", "uri"]).to_pylist()]
    return {Path(row["uri"]).name: row["id"] for row in rows}


def refused(recipe: Recipe, name: str, of: str = "photos") -> dict[str, str]:
    """Reason by the name of the file."""
    found = table(recipe, name, of)
    rows = [row for commit in found.committed().values() for row in found.rejects_of(commit).to_pylist()]
    return {Path(row["uri"]).name or row["id"]: row["reason"] for row in rows}


def all_commits(recipe: Recipe, of: str = "photos") -> dict[str, Commits]:
    return {name: table(recipe, name, of).committed() for name in TABLES if name != "masks"}


def digests(recipe: Recipe) -> dict[str, list[str]]:
    return {name: [c.content for c in commits.values()] for name, commits in all_commits(recipe).items()}
