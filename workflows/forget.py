"""Takes images out of every table, for deletion requests, and marks what was made from them.

    perceptio forget --recipe RECIPE ID [ID ...]

Reads   every table of every source, the manifests of codebook and model
Writes  new revisions of the shards that held an id, without it; ROOT/forgotten/; FORGOTTEN.json beside what saw them;
        deletes all reports, for they show pictures, and what a `plan` works on, its sample of images
Needs   memory for one shard

Of a forgotten image only its id stays, a hash of its bytes, so that `ingest` refuses it when it comes again. The
replaced files are deleted at once. What an image taught cannot be taken out of a codebook or a model: they are marked,
and to be made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.manifest import Manifest, ShardCommit
from schemas.recipe import Recipe
from schemas.tables import ID_DIGITS, LISTING, REJECTS, Reason
from workflows.commits import Table
from workflows.drop import without
from workflows.folders import FORGOTTEN_NAME
from workflows.forgotten import FOLDER, Request
from workflows.runtime import attempt_id
from workflows.shards import rejects_table
from workflows.store import DamagedTableError, Root, StageError, open_root

CHAIN = ("images", "depth", "masks", "codes", "samples")  # each is made from those before it
MESSAGE = "taken out by `forget`"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forgotten:
    """What a request did: rows taken out by table, and what had been made from them."""

    rows: Mapping[str, int]
    marked: tuple[str, ...]


def run(recipe: Recipe, ids: Collection[str]) -> Forgotten:
    """What was taken out. Raises StageError for a wrong id, and where no table under the root has any of them."""
    wanted = {key.strip().lower() for key in ids}
    wrong = [key for key in sorted(wanted) if len(key) != ID_DIGITS or set(key) - set("0123456789abcdef")]
    if wrong or not wanted:
        seen = wrong[0] if wrong else "none"
        raise StageError(f"forget: id '{seen}', expected {ID_DIGITS} hex digits: see the column `id` of a table")
    root = open_root(recipe.root)
    names = [source.name for source in recipe.sources]
    marked = tuple(_seen_by(root, names, wanted))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    request = Request(ids=tuple(sorted(wanted)), at=now, made_from_them=marked)
    # first of all, so that an `ingest` that starts now cannot bring them back
    root.create(request.model_dump_json(indent=1).encode(), FOLDER, f"{attempt_id()}.json")
    for folder in marked:  # before any id goes: a run that is killed and started again would not know them
        root.write(request.model_dump_json(indent=1).encode(), folder, FORGOTTEN_NAME)
    rows: dict[str, int] = {}
    for name in names:
        changed = {"listing": _blanked(Table(root, "listing", name), _uris(Table(root, "images", name), wanted))}
        for kind in CHAIN:
            table = Table(root, kind, name)
            taken, changed[kind] = _taken_out(table, wanted, changed)
            if taken:
                rows[str(table)] = taken
    root.delete_many(["report.html", *(f"reports/{stage}/report.html" for stage in root.folders("reports"))])
    root.delete_many(path for name in root.folders("plan") for path in root.files_below("plan", name))
    if not rows:
        raise StageError(
            f"forget: no table under '{recipe.root}' has any of the {len(wanted)} ids; they stay barred from now on"
        )
    return Forgotten(rows, marked)


def _taken_out(table: Table, wanted: set[str], changed: Mapping[str, set[int]]) -> tuple[int, set[int]]:
    """Rows taken out of a table, and the shards that changed.

    A shard also gets a new revision where only what it is made from changed, so that no stage makes it anew.
    """
    attempt, drops = attempt_id(), dict.fromkeys(wanted, (Reason.FORGOTTEN, MESSAGE))

    def make(commit: ShardCommit) -> _Made | None:
        inputs = {
            kind: _content(Table(table.root, kind, table.source), commit.shard, content)
            if commit.shard in changed.get(kind, ())
            else content
            for kind, content in commit.inputs.items()
        }
        here = wanted & {*table.ids_of(commit), *table.rejects_of(commit)["id"].to_pylist()}
        if not here and inputs == commit.inputs:
            return None
        made = without(table, commit, drops)
        return _Made(made.table, rejects_table(table, commit.shard, made.rejects), made.read, inputs)

    return _revised(table, attempt, make)


def _blanked(listing: Table, uris: set[str]) -> set[int]:
    """The listing shards in which files of these addresses were made unreadable."""

    def make(commit: ShardCommit) -> _Made | None:
        rows = listing.rows_of(commit).to_pylist()
        if uris.isdisjoint(row["uri"] for row in rows):
            return None
        blank = {"uri": "", "record": "", "reason": Reason.FORGOTTEN.value, "message": MESSAGE}
        made = pa.Table.from_pylist([row | blank if row["uri"] in uris else row for row in rows], schema=LISTING)
        return _Made(made, REJECTS.empty_table(), commit.read, {})

    return _revised(listing, attempt_id(), make)[1] if uris else set()


@dataclass(frozen=True)
class _Made:
    """What a shard's next revision holds."""

    rows: pa.Table
    rejects: pa.Table
    read: int
    inputs: Mapping[str, str]


def _revised(table: Table, attempt: str, make: Callable[[ShardCommit], _Made | None]) -> tuple[int, set[int]]:
    """Rows that went, and the shards of which `make` made a new revision; None leaves one as it is."""
    manifest = table.manifest()
    gone, shards = 0, set()
    for shard, commit in sorted(table.committed().items()):
        before, after = _revision(table, commit, attempt, make)
        if after is not before:
            gone += before.kept - after.kept
            shards.add(shard)
    if shards:
        _close(table, manifest, attempt)
    return gone, shards


def _revision(
    table: Table, commit: ShardCommit, attempt: str, make: Callable[[ShardCommit], _Made | None]
) -> tuple[ShardCommit, ShardCommit]:
    """A shard's marker before and after, made again from a newer one where another command revised it first."""
    while True:
        try:
            made = make(commit)
            if made is None:
                return commit, commit
            table.reopen()
            group, revision = table.row_group_rows(commit), commit.revision + 1
            done = table.commit(
                commit.shard, attempt, made.rows, made.rejects, made.read, group, inputs=made.inputs, revision=revision
            )
        except DamagedTableError:  # the other command has taken the older revision's files away
            newer = table.find(commit.shard)
            if newer is None or newer == commit:
                raise
            commit = newer
            continue
        if done.attempt == attempt:
            return commit, done
        commit = done


def _content(table: Table, shard: int, else_content: str) -> str:
    commit = table.find(shard)
    return else_content if commit is None else commit.content


def _close(table: Table, manifest: Manifest | None, attempt: str) -> None:
    """Ends the changes to a table: the old files go at once, and a table that was finished is so again."""
    commits = table.committed()
    if manifest is None:
        table.clean(commits)
        return
    kept = manifest.model_dump(include={"recipe", "code", "inputs", "licences", "seconds", "extra"})
    table.finish(commits, attempt=attempt, **kept)


def _uris(images: Table, wanted: set[str]) -> set[str]:
    """Where images of these ids came from, kept or refused."""
    found: set[str] = set()
    for commit in images.committed().values():
        if not wanted.isdisjoint(images.ids_of(commit)):
            rows = images.rows_of(commit, ["id", "uri"]).to_pylist()
            found |= {row["uri"] for row in rows if row["id"] in wanted}
        found |= {row["uri"] for row in images.rejects_of(commit).to_pylist() if row["id"] in wanted}
    return found - {""}


def _seen_by(root: Root, sources: Collection[str], wanted: set[str]) -> Iterator[str]:
    """The folders of what was made from images of these ids."""
    codebook = root.manifest("codebook")
    if codebook is not None and any(_sampled(root, part, wanted) for part in codebook.extra.get("sample", ())):
        yield "codebook"
    samples = [Table(root, "samples", name) for name in sources]
    if any(not wanted.isdisjoint(table.ids_of(commit)) for table in samples for commit in table.committed().values()):
        yield from ("/".join(path) for path in (("model",), ("eval",)) if root.manifest(*path) is not None)
        yield from (f"runs/{name}" for name in root.folders("runs"))


def _sampled(root: Root, part: Mapping[str, Any], wanted: set[str]) -> bool:
    """Whether a part of a codebook's sample held one of these ids; all of a shard counts that was changed since."""
    table = Table(root, "depth", part["source"])
    commit = table.find(part["shard"])
    if commit is None:
        return False
    ids = table.ids_of(commit)
    return not wanted.isdisjoint(ids[: part["rows"]] if commit.content == part["content"] else ids)
