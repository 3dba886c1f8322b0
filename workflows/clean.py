"""Removes what no table needs: files of lost attempts and older revisions, half-written drafts, finished scratch.

    perceptio clean --recipe RECIPE          shows them
    perceptio clean --recipe RECIPE --yes    deletes them

Reads   the markers of every table, the folders plan/ and runs/
Writes  nothing; deletes
Needs   nothing

A part file that no marker names may be about to be committed, or was since the markers were read: it counts as lost
after a day. So does what a killed `plan` left under plan/, and what a codebook's training saved under runs/ once the
codebook stands.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator
from dataclasses import dataclass

from schemas.recipe import Recipe
from schemas.tables import TABLES
from workflows.commits import PART, Table
from workflows.store import Root, open_root

LOST_AFTER_S = 24 * 3600.0


@dataclass(frozen=True)
class Stray:
    """A file that may go."""

    path: str  # below the root
    size: int  # bytes
    why: str


def run(recipe: Recipe, *, yes: bool = False, now: float | None = None) -> list[Stray]:
    """The files that may go; with `yes`, after they were deleted."""
    root, now = open_root(recipe.root), time.time() if now is None else now
    tables = [Table(root, name, source.name) for source in recipe.sources for name in TABLES]
    found = [stray for table in tables for stray in _strays(table, now)]
    found += _drafts(root, [folder for table in tables for folder in _folders(table)], now)
    found += _scratch(root, now)
    for stray in found if yes else ():
        root.delete(stray.path)
    return found


def _strays(table: Table, now: float) -> Iterator[Stray]:
    commits = table.committed()
    lost = set(table.lost(commits))
    for name in table.unnamed(commits):
        if PART.fullmatch(posixpath.basename(name)) is None:
            continue  # not ours to judge, or a draft: see _drafts
        path = posixpath.normpath(posixpath.join(table.name, table.source, name))
        size, age = table.root.size_and_age(path, now)
        if name in lost:
            yield Stray(path, size, "an older revision, or an attempt that lost")
        elif age > LOST_AFTER_S:
            yield Stray(path, size, "an attempt that never committed")


def _scratch(root: Root, now: float) -> Iterator[Stray]:
    """Files of folders in which nothing was written for a day, and that nobody goes on with."""
    folders = [posixpath.join("plan", name) for name in root.folders("plan")]
    if root.manifest("codebook") is not None:
        folders += [posixpath.join("runs", name) for name in root.folders("runs") if name.startswith("codebook-")]
    for folder in folders:
        files = {path: root.size_and_age(path, now) for path in root.files_below(folder)}
        if files and min(age for _, age in files.values()) > LOST_AFTER_S:
            yield from (Stray(path, size, "scratch of a run that ended") for path, (size, _) in files.items())


def _folders(table: Table) -> Iterator[str]:
    yield posixpath.join(table.name, table.source)
    yield posixpath.join(table.name, table.source, "_commits")
    yield posixpath.join("rejects", "listing" if table.name == "listing" else table.stage, table.source)


def _drafts(root: Root, folders: list[str], now: float) -> Iterator[Stray]:
    """Half-written files that a killed process left; a day old, since a live one renames its own within seconds."""
    for folder in dict.fromkeys(folders):
        for name in root.files(folder):
            if "~" in name or name.startswith("_exclusive-"):
                path = posixpath.join(folder, name)
                size, age = root.size_and_age(path, now)
                if age > LOST_AFTER_S:
                    yield Stray(path, size, "a draft of a killed process")
