"""Proves what stands under a root from its files alone: counts, ids, checksums, digests down the chain.

    perceptio verify --recipe rooms

Reads   every table of every source, whole, every file of codebook and model, and what `forget` was told
Writes  nothing
Needs   CPUs, the pool of `ingest`; an actor holds one shard, the driver 8 bytes a row of every table
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.exceptions import RayError

from schemas.manifest import MANIFEST_NAME, Manifest, ShardCommit
from schemas.recipe import Recipe
from schemas.tables import TABLES
from workflows import actors
from workflows.commits import STAGE_OF, Table, content_digest, table_digest
from workflows.folders import checked
from workflows.forgotten import Request, requests
from workflows.store import DamagedTableError, Root, StageError, open_root

MADE_OF = {"depth": ("images",), "masks": ("images",), "codes": ("depth", "images"), "samples": ("images",)}
PUBLISHED = {"codebook": "codebook", "model": "train"}  # folder -> stage
NO_IDS: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
SHOWN = 100  # problems in the message; all are logged

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Raises DamagedTableError with every problem found; logs the number of tables and rows where there is none."""
    root = open_root(recipe.root)
    tables = [Table(root, name, source.name) for source in recipe.sources for name in TABLES]
    standing = [
        table
        for table in tables
        if table.manifest() is not None or table.root.files(table.name, table.source, "_commits")
    ]
    if not standing:
        raise StageError(f"no table stands under '{recipe.root}': give the --root of a run")
    checks = [(table, *_open(table)) for table in standing]
    found = _check_all(recipe, [(table, commit) for table, commits, _ in checks for commit in commits.values()])
    problems = []
    for table, commits, own in checks:
        shards = {shard: found[table.name, table.source, shard] for shard in commits}
        problems += [f"{table}: {text}" for text in [*own, *_of_table(table, commits, shards)]]
    problems += _published_problems(root)
    forgotten = requests(root)
    problems += _forgotten_problems(checks, found, forgotten)
    for request in forgotten:
        for folder in request.made_from_them:
            log.warning("%s was made from images that were forgotten on %s: make it anew", folder, request.at)
    for problem in problems:
        log.error("%s", problem)
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        raise DamagedTableError(f"{len(problems)} problems under '{recipe.root}':\n  {shown}")
    rows = sum(commit.read for _, commits, _ in checks for commit in commits.values())
    log.info("%d tables under %s are complete and as they were committed, %d rows", len(checks), recipe.root, rows)


def problems_of(table: Table) -> list[str]:
    """What is wrong with one table, a line each; [] where it is complete and every file is as it was committed."""
    commits, own = _open(table)
    return [*own, *_of_table(table, commits, {shard: check(table, commit) for shard, commit in commits.items()})]


def _open(table: Table) -> tuple[dict[int, ShardCommit], list[str]]:
    """The table's markers, and what is wrong with them or with the manifest."""
    commits: dict[int, ShardCommit] = {}
    try:
        commits, manifest, planned = table.committed(), table.manifest(), table.planned()
    except DamagedTableError as error:
        return commits, [str(error).removeprefix(f"{table}: ")]
    if manifest is None:
        return commits, [f"no manifest, {len(commits)} shards committed: run `{table.stage}` to finish it"]
    found = [*_against_markers(table, manifest, commits), *_chain_problems(table, manifest)]
    if planned is not None and planned != manifest.inputs:
        found.append(
            f"the manifest says made from {manifest.inputs}, _commits/plan.json {planned}: restore one of them"
        )
    return commits, found


def _against_markers(table: Table, manifest: Manifest, commits: Mapping[int, ShardCommit]) -> Iterator[str]:
    listed = {commit.shard: commit for commit in manifest.shards}
    for shard in sorted({*listed, *commits}):
        one, other = listed.get(shard), commits.get(shard)
        if one is None or other is None:
            sides = ["nothing" if side is None else side.attempt for side in (one, other)]
            yield f"shard {shard}: the manifest lists {sides[0]}, its marker says {sides[1]}: {table.remedy(shard)}"
        elif one != other:
            fields = {name: (getattr(one, name), getattr(other, name)) for name in type(one).model_fields}
            differ = "; ".join(f"{name} {a}, its marker {b}" for name, (a, b) in fields.items() if a != b)
            yield f"shard {shard}: the manifest says {differ}: {table.remedy(shard)}"
    remedy = f"restore it, or delete {table}/{MANIFEST_NAME} and run `{table.stage}` again"
    if (manifest.stage, manifest.source) != (table.stage, table.source):
        yield f"the manifest is that of stage {manifest.stage}, source {manifest.source}: {remedy}"
    sums = [sum(getattr(commit, name) for commit in listed.values()) for name in ("read", "kept", "rejected")]
    if sums != [manifest.read, manifest.kept, manifest.rejected]:
        said = manifest.read, manifest.kept, manifest.rejected
        yield f"the manifest says {said} rows, its shards sum to {sums}: {remedy}"
    if table_digest(manifest.shards) != manifest.digest:
        yield f"the manifest's digest {manifest.digest[:16]} is not that of its shards: {remedy}"


def _chain_problems(table: Table, manifest: Manifest) -> Iterator[str]:
    """Inputs that are no longer what this table was made from."""
    for kind in sorted({kind for commit in manifest.shards for kind in commit.inputs}):
        try:
            standing = table.root.manifest(kind, table.source)
        except DamagedTableError:
            continue  # the input's own check names it
        if standing is None:
            yield f"its input {posixpath.join(kind, table.source)} has no manifest: run `{STAGE_OF[kind]}`"
            continue
        contents = {commit.shard: commit.content for commit in standing.shards}
        stale = [c.shard for c in manifest.shards if c.inputs.get(kind, "") != contents.get(c.shard)]
        if stale:
            yield (
                f"{len(stale)} shards, first {stale[0]}, were made from another {posixpath.join(kind, table.source)}"
                f" than stands now: run `{table.stage}` again"
            )
        missing = sorted(set(contents) - {commit.shard for commit in manifest.shards})
        if missing and manifest.extra.get("maps") != "sample":  # such a depth table holds a part on purpose
            yield f"{len(missing)} shards, first {missing[0]}, of its input {kind} are not in it: run `{table.stage}`"
    yield from _codebook_problems(table.root, manifest)


def _published_problems(root: Root) -> Iterator[str]:
    """Files of codebook and model that are not what their manifests say."""
    for folder, stage in PUBLISHED.items():
        try:
            manifest = root.manifest(folder)
            for entry in manifest.files if manifest is not None else ():
                checked(root, entry, folder, stage=stage)
        except DamagedTableError as error:
            yield str(error)


def _forgotten_problems(
    checks: Collection[tuple[Table, Mapping[int, ShardCommit], Collection[str]]],
    found: Mapping[tuple[str, str, int], Checked],
    forgotten: Collection[Request],
) -> Iterator[str]:
    """Rows of images that were to be forgotten; a table of listed files has other ids."""
    barred = np.array(sorted({int(key, 16) for request in forgotten for key in request.ids}), np.uint64)
    for table, commits, _ in checks:
        for shard in commits if len(barred) and table.name != "listing" else ():
            for key in np.intersect1d(found[table.name, table.source, shard].ids, barred):
                yield f"{table}: shard {shard}: image {key:016x} stands, which `forget` was told: run `forget` again"


def _codebook_problems(root: Root, manifest: Manifest) -> Iterator[str]:
    if "codebook" not in manifest.inputs:
        return
    try:
        standing = root.manifest("codebook")
    except DamagedTableError as error:
        yield f"{error}: restore it, or run `codebook` again"
        return
    if standing is None:
        yield "its input codebook has no manifest: run `codebook`"
    elif standing.digest != manifest.inputs["codebook"]:
        yield (
            f"made with codebook {manifest.inputs['codebook'][:16]}, which is now {standing.digest[:16]}: delete this"
            f" table and run `{manifest.stage}` again"
        )


def _check_all(recipe: Recipe, shards: Collection[tuple[Table, ShardCommit]]) -> dict[tuple[str, str, int], Checked]:
    """What was found of every shard by table, source and number, from an actor pool."""
    if not shards:
        return {}
    rows = [
        {"name": table.name, "source": table.source, "commit": commit.model_dump_json()} for table, commit in shards
    ]
    pool = recipe.ingest.pool
    blocks = min(len(rows), 8 * pool.max_actors)
    checked = actors.on_actors(recipe, rows, _Checker, {"uri": recipe.root}, pool=pool, blocks=blocks)
    try:
        return {
            (row["name"], row["source"], row["shard"]): Checked(
                json.loads(row["problems"]), np.frombuffer(row["ids"], np.uint64)
            )
            for row in checked
        }
    except RayError as error:
        raise StageError(f"verify: {error}") from error


class _Checker:
    """The callable of the pool: one marker in, its problems and ids out."""

    def __init__(self, uri: str) -> None:
        self.root = open_root(uri)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        commit = ShardCommit.model_validate_json(row["commit"])
        found = check(Table(self.root, row["name"], row["source"]), commit)
        where = {"name": row["name"], "source": row["source"], "shard": commit.shard}
        return {**where, "problems": json.dumps(found.problems), "ids": found.ids.tobytes()}


@dataclass(frozen=True)
class Checked:
    """What was found out about one shard."""

    problems: list[str]
    ids: npt.NDArray[np.uint64]  # which may stand in no other shard


def check(table: Table, commit: ShardCommit) -> Checked:
    """The problems of one shard's files."""
    try:
        rows, rejects = table.rows_of(commit), table.rejects_of(commit)
    except (DamagedTableError, pa.ArrowException) as error:
        return Checked([str(error).removeprefix(f"{table}: ")], NO_IDS)
    wrong = [*_count_problems(commit, rows, rejects), *_content_problems(table, commit, rows)]
    ids: list[str] = rows["id"].to_pylist()
    wrong += [*_id_problems(table, commit, ids, rejects), *_listing_problems(table, commit)]
    problems = [f"{text}: {table.remedy(commit.shard)}" for text in wrong]
    if table.name == "listing":  # the same file may be listed twice: `ingest` keeps one
        return Checked(problems, NO_IDS)
    return Checked(problems, np.array([int(key, 16) for key in ids], np.uint64))


def _count_problems(commit: ShardCommit, rows: pa.Table, rejects: pa.Table) -> Iterator[str]:
    for entry, found, counted in ((commit.data, rows, commit.kept), (commit.rejects, rejects, commit.rejected)):
        named = 0 if entry is None else entry.rows
        if not found.num_rows == named == counted:
            path = f"shard {commit.shard}" if entry is None else entry.path
            yield f"{path}: {found.num_rows} rows, its entry says {named}, the marker {counted}"
    reasons = dict(sorted(Counter(rejects["reason"].to_pylist()).items()))
    if reasons != commit.reasons:
        yield f"shard {commit.shard}: its rejects say {reasons}, its marker {commit.reasons}"
    numbers = rejects["row"].to_pylist()
    if len(set(numbers)) != len(numbers) or any(not 0 <= number < commit.read for number in numbers):
        yield f"shard {commit.shard}: rejects name rows {sorted(numbers)[:5]}, expected each once, below {commit.read}"


def _content_problems(table: Table, commit: ShardCommit, rows: pa.Table) -> Iterator[str]:
    path = f"shard {commit.shard}" if commit.data is None else commit.data.path
    if not rows.schema.equals(table.schema):
        yield f"{path}: columns are {rows.schema.names}, expected {table.schema.names}"
    elif content_digest(rows) != commit.content:
        yield f"{path}: the rows' digest is not the marker's {commit.content[:16]}"
    elif table.name == "images":
        pairs = zip(rows["id"].to_pylist(), rows["image"], strict=True)
        wrong = [key for key, image in pairs if hashlib.sha256(image.as_buffer()).hexdigest()[: len(key)] != key]
        if wrong:
            yield f"{path}: {len(wrong)} ids are not the hash of their image, e.g. {wrong[0]}"


def _id_problems(table: Table, commit: ShardCommit, ids: list[str], rejects: pa.Table) -> Iterator[str]:
    """Ids that stand twice in a shard, that its input does not have, or that the input has and were lost."""
    doubled = [key for key, n in Counter(ids).items() if n > 1]
    if doubled:
        yield f"shard {commit.shard}: {len(doubled)} ids stand twice, e.g. {doubled[0]}"
    over = next((kind for kind in MADE_OF.get(table.name, ()) if kind in commit.inputs), None)
    source = None if over is None else Table(table.root, over, table.source)
    found = None if source is None else _column(source, commit, "id")
    if found is None:
        return
    known = set(found)
    here = {*ids, *rejects["id"].to_pylist()}
    if lost := sorted(known - here):
        yield f"shard {commit.shard}: {len(lost)} ids of {source} are neither kept nor refused, e.g. {lost[0]}"
    if strange := sorted(here - known):
        yield f"shard {commit.shard}: {len(strange)} ids are not in {source}, e.g. {strange[0]}"


def _listing_problems(table: Table, commit: ShardCommit) -> Iterator[str]:
    """Rows that were listed and not read, where the listing says how many an item has."""
    if table.name != "images" or "listing" not in commit.inputs:
        return
    rows = _column(Table(table.root, "listing", table.source), commit, "rows")
    if rows is not None and all(rows) and sum(rows) != commit.read:
        yield f"shard {commit.shard}: {commit.read} rows were read, {sum(rows)} are listed"


def _column(source: Table, commit: ShardCommit, name: str) -> list[Any] | None:
    """A column of the shard that a shard was made from; None where that is damaged or changed, which is named there."""
    try:
        made_from = source.find(commit.shard)
        if made_from is None or made_from.content != commit.inputs[source.name]:
            return None
        if made_from.data is None:
            return []
        column = source.root.columns([name], source.name, source.source, made_from.data.path)
    except DamagedTableError:
        return None
    return list(column[name].to_pylist())


def _of_table(table: Table, commits: Mapping[int, ShardCommit], shards: Mapping[int, Checked]) -> Iterator[str]:
    """The problems of all shards, ids that stand in two of them, and files that no marker names."""
    for shard in sorted(shards):
        yield from shards[shard].problems
    keys = np.concatenate([NO_IDS, *(shards[shard].ids for shard in sorted(shards))])
    numbers = np.repeat(sorted(shards), [len(shards[shard].ids) for shard in sorted(shards)])
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    for i in np.flatnonzero(keys[1:] == keys[:-1]):
        if numbers[i] != numbers[i + 1]:
            where = f"shards {numbers[i]} and {numbers[i + 1]}"
            yield f"id {int(keys[i]):016x} stands in {where}: of the second {table.remedy(int(numbers[i + 1]))}"
    for path in table.unnamed(commits):
        yield (
            f"{path}: no marker names this file: a copy, or left by a killed attempt: delete it; `perceptio clean`"
            " shows what lost attempts left"
        )
