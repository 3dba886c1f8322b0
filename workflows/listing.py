"""What a source holds, fixed once: a `listing` table whose shards `ingest` works through, and that `append` lengthens.

Items are committed in shards as they are listed, so no listing is ever whole in memory. What is listed stays listed
with its shard: files that come later get shards of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from perceptio.sources.open import reader_of
from perceptio.sources.record import Item, Reader, SourceError
from schemas.manifest import Manifest, ShardCommit
from schemas.recipe import Recipe, RoomsSource, Source, section_digest
from schemas.tables import ID_DIGITS, LISTING, REJECTS
from workflows.commits import Table, content_digest, require_same
from workflows.rooms_source import RoomsReader
from workflows.runtime import attempt_id, code_version
from workflows.store import Root, StageError

log = logging.getLogger(__name__)


def reader(source: Source) -> Reader:
    """The reader of a source's format."""
    return RoomsReader(source) if isinstance(source, RoomsSource) else reader_of(source)


def listed(recipe: Recipe, root: Root, source: Source, *, more: bool = False) -> Manifest:
    """The manifest of a source's finished listing; with `more`, after what is new in the source was added to it.

    Raises OtherInputsError where the listing was made of another source or cut otherwise, StageError where the source
    cannot be listed or holds nothing.
    """
    table, rows = Table(root, "listing", source.name), recipe.ingest.rows_per_shard
    inputs = _inputs(recipe, source)
    standing = table.manifest()
    if standing is not None:
        require_same(str(table), standing.inputs, inputs)
        if not more:
            return standing
        table.reopen()
    table.plan(inputs)
    commits = table.committed()
    known = _numbers(key for shard in sorted(commits) for key in table.ids_of(commits[shard]))
    new = _unknown(reader(source).items(), known, rows)
    try:
        return _filled(recipe, table, inputs, commits, cut(source, new, rows))
    except SourceError as error:
        raise StageError(f"source '{source.name}': {error}") from error


def put(recipe: Recipe, root: Root, source: Source, shards: Iterable[list[Item]]) -> Manifest:
    """The manifest of a new listing of just these shards, which the stages take for the source's own."""
    table = Table(root, "listing", source.name)
    inputs = _inputs(recipe, source)
    table.plan(inputs)
    return _filled(recipe, table, inputs, {}, shards)


def cut(source: Source, items: Iterable[Item], rows_per_shard: int) -> Iterator[list[Item]]:
    """The items in the shards that they are listed in."""
    guess = 1 if isinstance(source, RoomsSource) else rows_per_shard  # rows of an item that does not say how many
    return _shards(items, rows_per_shard, guess)


def _inputs(recipe: Recipe, source: Source) -> dict[str, str]:
    exclude = {"count"} if isinstance(source, RoomsSource) else set()
    return {"source": section_digest(source, exclude=exclude), "rows_per_shard": str(recipe.ingest.rows_per_shard)}


def _filled(
    recipe: Recipe,
    table: Table,
    inputs: dict[str, str],
    commits: dict[int, ShardCommit],
    shards: Iterable[list[Item]],
) -> Manifest:
    """The manifest of a listing after these shards were added to those of `commits`."""
    attempt = attempt_id()
    free = (number for number in itertools.count() if number not in commits)  # a damaged shard may have been deleted
    for items in shards:
        shard = next(free)
        made = pa.Table.from_pylist(list(_rows(items)), schema=LISTING)
        commits[shard] = table.commit(shard, attempt, made, REJECTS.empty_table(), made.num_rows)
        if commits[shard].content != content_digest(made):
            raise StageError(
                f"{table}: attempt {commits[shard].attempt} found other items for shard {shard} at the same time:"
                " the source is changing; wait for that attempt, then run this again"
            )
    if not commits:
        raise StageError(f"source '{table.source}': it holds nothing that its format reads")
    manifest = table.finish(commits, attempt=attempt, recipe=recipe.digest, code=code_version(), inputs=inputs)
    log.info("%s: %d items in %d shards", table, manifest.kept, len(manifest.shards))
    return manifest


def _rows(items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """The items as they are stored; one that is listed twice has another id the second time."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.id] += 1
        yield {**asdict(item), "id": item.id if seen[item.id] == 1 else _again(item.id, seen[item.id])}


def _again(key: str, count: int) -> str:
    """The id of an item that is listed for the second, third, ... time in one shard."""
    return hashlib.sha256(f"{key}#{count}".encode()).hexdigest()[:ID_DIGITS]


def _shards(items: Iterable[Item], rows_per_shard: int, guess: int) -> Iterator[list[Item]]:
    """Items of together at most rows_per_shard rows, `guess` where they are not known; one that has more is alone."""
    waiting: list[Item] = []
    rows = 0
    for item in items:
        weight = item.rows or guess
        if waiting and rows + weight > rows_per_shard:
            yield waiting
            waiting, rows = [], 0
        waiting.append(item)
        rows += weight
    if waiting:
        yield waiting


def _unknown(items: Iterable[Item], known: npt.NDArray[np.uint64], chunk: int) -> Iterator[Item]:
    """The items that are not in the sorted array `known` of ids; one that is listed n times is known n times."""
    if not len(known):
        yield from items
        return
    taken = np.zeros(len(known), bool)
    remaining = iter(items)
    while part := list(itertools.islice(remaining, chunk)):
        keys = np.array([int(item.id, 16) for item in part], np.uint64)
        firsts, ends = np.searchsorted(known, keys), np.searchsorted(known, keys, "right")
        for item, first, end in zip(part, firsts.tolist(), ends.tolist(), strict=True):
            if first == end or not _take(item.id, range(first, end), known, taken):
                yield item


def _take(key: str, at: Iterable[int], known: npt.NDArray[np.uint64], taken: npt.NDArray[np.bool_]) -> bool:
    """Marks one of the places where an id stands in `known`, or its id as a double; False where all are taken."""
    places = [*at]
    for count in itertools.count(2):
        number = np.uint64(int(_again(key, count), 16))
        place = int(np.searchsorted(known, number))
        if place == len(known) or known[place] != number:
            break
        places.append(place)
    free = [place for place in places if not taken[place]]
    if free:
        taken[free[0]] = True
    return bool(free)


def _numbers(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Ids of 16 hex digits as a sorted array of 8 bytes each."""
    return np.sort(np.fromiter((int(key, 16) for key in ids), np.uint64))
