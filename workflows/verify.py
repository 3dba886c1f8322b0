"""Proves what stands under a root from its files alone: counts, ids, checksums, digests down the chain.

    perceptio verify --recipe rooms

Reads   every table of every source, and the codebook's manifest
Writes  nothing
Needs   CPUs; memory for one shard, and for the ids of one table
"""

from __future__ import annotations

import io
import logging
import posixpath
from collections.abc import Iterator

import pyarrow.parquet as pq

from schemas.manifest import FileEntry, Manifest, ShardCommit
from schemas.recipe import Recipe
from schemas.tables import REJECTS, TABLES
from workflows.commits import Table, content_digest, table_digest
from workflows.store import DamagedTableError, Root, StageError, open_root

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Raises DamagedTableError with every problem found; logs the number of tables where there is none."""
    root = open_root(recipe.root)
    tables = [Table(root, name, source.name) for source in recipe.sources for name in TABLES]
    standing = [table for table in tables if table.committed() or table.manifest() is not None]
    if not standing:
        raise StageError(f"no table stands under '{recipe.root}': give the --root of a run")
    problems = [f"{table}: {problem}" for table in standing for problem in problems_of(table)]
    if problems:
        raise DamagedTableError(f"{len(problems)} problems under '{recipe.root}':\n  " + "\n  ".join(problems))
    log.info("%d tables under %s are complete and as they were committed", len(standing), recipe.root)


def problems_of(table: Table) -> list[str]:
    """What is wrong with a table, a line each; [] where it is complete and every file is as it was committed."""
    try:
        commits = table.committed()
        manifest = table.manifest()
    except DamagedTableError as error:
        return [str(error)]
    if manifest is None:
        return [f"no manifest, {len(commits)} shards committed: run `{table.stage}` to finish it"]
    problems = list(_against_manifest(manifest, commits))
    seen: dict[str, int] = {}
    for shard in sorted(commits):
        problems += _shard_problems(table, commits[shard], seen)
    problems += [f"{path}: no marker names this file: a copy, or left by a killed attempt" for path in table.unnamed()]
    return problems + list(_chain_problems(table.root, manifest))


def _against_manifest(manifest: Manifest, commits: dict[int, ShardCommit]) -> Iterator[str]:
    listed = {commit.shard: commit for commit in manifest.shards}
    for shard in sorted({*listed, *commits}):
        if listed.get(shard) != commits.get(shard):
            sides = ["nothing" if side is None else side.attempt for side in (listed.get(shard), commits.get(shard))]
            yield f"shard {shard}: the manifest lists {sides[0]}, its marker says {sides[1]}"
    sums = [sum(getattr(commit, name) for commit in listed.values()) for name in ("read", "kept", "rejected")]
    if sums != [manifest.read, manifest.kept, manifest.rejected]:
        yield f"the manifest says {manifest.read, manifest.kept, manifest.rejected} rows, its shards sum to {sums}"
    if table_digest(manifest.shards) != manifest.digest:
        yield f"the manifest's digest {manifest.digest[:16]} is not that of its shards"


def _shard_problems(table: Table, commit: ShardCommit, seen: dict[str, int]) -> Iterator[str]:
    """Problems of one shard's files; adds its ids to `seen` (id -> shard)."""
    try:
        if commit.data is not None:
            rows = table.read_shard(commit.shard)
            yield from _row_problems(commit, commit.data, rows.num_rows)
            if not rows.schema.equals(table.schema):
                yield f"{commit.data.path}: columns are {rows.schema.names}, expected {table.schema.names}"
            elif content_digest(rows) != commit.content:
                yield f"{commit.data.path}: the rows' digest is not the marker's {commit.content[:16]}"
            for key in rows["id"].to_pylist():
                if key in seen:
                    yield f"id {key} stands in shards {seen[key]} and {commit.shard}"
                seen[key] = commit.shard
        elif commit.kept:
            yield f"shard {commit.shard}: {commit.kept} rows kept, but no file named"
        if commit.rejects is not None:
            rejects = pq.read_table(io.BytesIO(table.checked(commit.rejects)), schema=REJECTS)
            yield from _row_problems(commit, commit.rejects, rejects.num_rows)
    except DamagedTableError as error:
        yield str(error).removeprefix(f"{table}: ")


def _row_problems(commit: ShardCommit, entry: FileEntry, found: int) -> Iterator[str]:
    counted = commit.kept if entry is commit.data else commit.rejected
    if not found == entry.rows == counted:
        yield f"{entry.path}: {found} rows, its entry says {entry.rows}, the marker {counted}"


def _chain_problems(root: Root, manifest: Manifest) -> Iterator[str]:
    """Inputs that are no longer what this table was made from."""
    for name, digest in manifest.inputs.items():
        folder = (name, manifest.source) if name in TABLES else (name,)
        if name not in TABLES and name != "codebook":
            continue
        standing = root.manifest(*folder)
        if standing is None:
            yield f"its input {posixpath.join(*folder)} has no manifest"
        elif standing.digest != digest:
            yield (
                f"made from {posixpath.join(*folder)} {digest[:16]}, which is now {standing.digest[:16]}:"
                f" delete {manifest.stage}'s table and run it again"
            )
