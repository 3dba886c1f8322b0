"""Images that stand more than once: within a source, in a held-out source too, or in two training sources."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from schemas.manifest import ShardCommit
from schemas.tables import Reason
from workflows.commits import Table
from workflows.drop import payload

DOUBLES_AT_ONCE = 100_000_000  # ids compared at a time; more images are compared in as many passes as needed
READERS = 16  # threads: id columns are small, waiting for the store is all the work

Commits = Mapping[int, ShardCommit]


@dataclass
class Doubles:
    """What must go, by source and shard as a DropWorker is told it; how many images two sources share."""

    drops: dict[str, dict[int, str]] = field(default_factory=dict)
    shared: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Place:
    source: str
    shard: int
    held_out: bool


def doubles(tables: Mapping[Table, Commits], held_out: set[str], reject_contamination: bool) -> Doubles:
    """The doubles of all sources: the first stays, held-out sources before others, then sources and shards in order.

    Within a source the others go; of a training source those go that a held-out source has, if `reject_contamination`.
    """
    ordered = sorted(tables, key=lambda table: table.source not in held_out)
    shards = [(table, tables[table][shard]) for table in ordered for shard in sorted(tables[table])]
    places = [_Place(table.source, commit.shard, table.source in held_out) for table, commit in shards]
    found = Doubles()
    drops: dict[tuple[str, int], dict[str, tuple[Reason, str]]] = defaultdict(dict)
    gone = _taken_out_before(shards)
    passes = 1 + sum(commit.kept for _, commit in shards) // DOUBLES_AT_ONCE
    for turn in range(passes):
        for key, members in _groups(shards, gone, turn, passes):
            _judge(f"{key:016x}", [places[i] for i in members], reject_contamination, drops, found.shared)
    for (source, shard), drop in drops.items():
        if new := {key: why for key, why in drop.items() if key not in gone.get((source, shard), ())}:
            found.drops.setdefault(source, {})[shard] = payload(new)
    return found


def _taken_out_before(shards: list[tuple[Table, ShardCommit]]) -> dict[tuple[str, int], set[str]]:
    """The ids that an earlier pass took out of each shard as contamination: sources share them all the same."""
    found = {}
    for table, commit in shards:
        if commit.reasons.get(Reason.IN_EVALUATION_SPLIT):
            rows = table.rejects_of(commit).to_pylist()
            found[table.source, commit.shard] = {
                row["id"] for row in rows if row["reason"] == Reason.IN_EVALUATION_SPLIT
            }
    return found


def _groups(
    shards: list[tuple[Table, ShardCommit]], gone: Mapping[tuple[str, int], set[str]], turn: int, passes: int
) -> list[tuple[int, list[int]]]:
    """Each id that stands, or stood, more than once, with the numbers of the shards where it does, in order."""

    def ids(shard: tuple[Table, ShardCommit]) -> npt.NDArray[np.uint64]:
        table, commit = shard
        standing = [*table.ids_of(commit), *gone.get((table.source, commit.shard), ())]
        keys = np.array([int(key, 16) for key in standing], np.uint64)
        mine: npt.NDArray[np.uint64] = keys[keys % np.uint64(passes) == turn]
        return mine

    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(ids, shards))
    keys = np.concatenate([*parts, np.empty(0, np.uint64)])
    numbers = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(keys)])
    many = sizes > 1
    return [(int(keys[a]), numbers[a : a + n].tolist()) for a, n in zip(starts[many], sizes[many], strict=True)]


def _judge(
    key: str,
    members: list[_Place],
    reject_contamination: bool,
    drops: dict[tuple[str, int], dict[str, tuple[Reason, str]]],
    shared: Counter[tuple[str, str]],
) -> None:
    """Writes down which copies of one image go, and which sources share it."""
    first: dict[str, _Place] = {}
    leader = members[0]
    for place in members:
        again = place.source in first
        first.setdefault(place.source, place)
        if leader.source != place.source and not again:
            shared[leader.source, place.source] += 1
        # asked before doubles, so that the reasons do not depend on which copies an interrupted run took out already
        if reject_contamination and leader.held_out and not place.held_out:
            message = f"the image also stands in {leader.source}, which is held out for evaluation"
            drops[place.source, place.shard][key] = (Reason.IN_EVALUATION_SPLIT, message)
        elif again:
            message = f"the same image as in shard {first[place.source].shard} of {place.source}: keep one of them"
            drops[place.source, place.shard][key] = (Reason.DUPLICATE_ID, message)
