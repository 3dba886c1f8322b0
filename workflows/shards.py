"""What a data stage is made of: a job a table, work a shard, the result with its rejects. `workflows.pool` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from schemas.manifest import Licence, Manifest, ShardCommit
from schemas.tables import REJECTS, Reason
from workflows.commits import Table

NOTHING: frozenset[Reason] = frozenset()


@dataclass(frozen=True)
class Reject:
    """A row that was refused, with enough to fetch it again; `row` is its number among the rows that were read."""

    reason: Reason
    message: str
    id: str = ""
    uri: str = ""
    row: int = 0


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of one shard: read = kept rows + rejects."""

    table: pa.Table
    read: int
    rejects: Sequence[Reject] = field(default=())


@dataclass(frozen=True)
class Work:
    """One shard to do."""

    table: Table  # to be filled
    over: Table  # whose shard of the same number is read
    shard: int
    inputs: Mapping[str, str]  # table -> content digest of that table's shard
    payload: str = ""
    previous: ShardCommit | None = None  # the revision that this one follows
    retry: frozenset[Reason] = NOTHING  # refused rows of these reasons are to be tried again

    @property
    def source(self) -> str:
        """The source's name."""
        return self.table.source

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """The input's rows, in order. Raises DamagedTableError where they are not those that were planned with."""
        return self.over.read_shard(self.shard, columns, content=self.inputs.get(self.over.name))


class ShardWorker(Protocol):
    """A stage's work on one shard; built once an actor, from plain keyword arguments."""

    def process(self, work: Work) -> ShardResult:
        """The shard's rows, in fixed batches."""
        ...


@dataclass(frozen=True)
class Job:
    """One table to fill from another, shard by shard of the same number, and what all of its rows depend on."""

    table: Table
    over: Table
    shards: Mapping[int, Mapping[str, str]]  # shard -> table -> content digest of the shard that it is made from
    inputs: Mapping[str, str]  # name -> digest of settings, weights, codebook
    licences: Sequence[Licence] = ()
    payloads: Mapping[int, str] = field(default_factory=dict)
    expected: int = 0  # rows to be read in all, 0 where that is not known before


def shards_of(**manifests: Manifest) -> dict[int, dict[str, str]]:
    """The shards of the first table, each with the content digests of all the given tables' shards of that number."""
    contents = {name: {c.shard: c.content for c in manifest.shards} for name, manifest in manifests.items()}
    first = next(iter(contents.values()))
    return {shard: {name: found[shard] for name, found in contents.items() if shard in found} for shard in first}


def by_id(work: Work, columns: Sequence[str], make: Callable[[pa.Table], ShardResult]) -> ShardResult:
    """The shard's result, in the order of the input's ids, where `make` is only given the rows that are not known yet.

    Known is what the revision before kept or refused; it is taken over for the ids that the input still has. Rows that
    were refused for a reason of `work.retry`, or because a stage before had refused them, are made again.
    """
    rows = work.rows(columns)
    previous = work.previous
    if previous is None or previous.inputs.keys() != work.inputs.keys():
        return _numbered(rows, make(rows))
    kept, refused = work.table.rows_of(previous), work.table.rejects_of(previous).to_pylist()
    again = {Reason.UPSTREAM_REJECT, *work.retry}
    known = {row["id"]: stored_reject(row) for row in refused if row["reason"] not in again}
    standing = set(kept["id"].to_pylist())
    todo = [i for i, key in enumerate(rows["id"].to_pylist()) if key not in known and key not in standing]
    made = make(rows.take(pa.array(todo, pa.int64())))
    wanted = set(rows["id"].to_pylist())
    rejects = [*(known[key] for key in known if key in wanted), *made.rejects]
    return _numbered(rows, ShardResult(pa.concat_tables([kept, made.table]), rows.num_rows, rejects))


def _numbered(rows: pa.Table, result: ShardResult) -> ShardResult:
    """The same rows and rejects in the order of the input, rejects with the number of their row."""
    place = {key: i for i, key in enumerate(rows["id"].to_pylist())}
    found = {key: i for i, key in enumerate(result.table["id"].to_pylist())}
    order = [found[key] for key in place if key in found]
    table = result.table if order == list(range(len(order))) else result.table.take(pa.array(order, pa.int64()))
    rejects = sorted(
        (Reject(r.reason, r.message, r.id, r.uri, place[r.id]) for r in result.rejects), key=lambda r: r.row
    )
    return ShardResult(table, rows.num_rows, rejects)


def stored_reject(row: Mapping[str, Any]) -> Reject:
    """A row of a rejects table."""
    return Reject(Reason(row["reason"]), row["message"], row["id"], row["uri"], row["row"])


def rejects_table(table: Table, shard: int, rejects: Sequence[Reject]) -> pa.Table:
    """The rejects of one shard as they are stored."""
    where = {"stage": table.stage, "source": table.source, "shard": shard}
    rows = [
        {**where, "row": r.row, "id": r.id, "uri": r.uri, "reason": Reason(r.reason).value, "message": r.message}
        for r in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)
