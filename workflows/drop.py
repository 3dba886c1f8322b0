"""Takes rows out of committed shards: doubles after `ingest`, and what `forget` is told. They become rejects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from schemas.manifest import ShardCommit
from schemas.tables import Reason
from workflows.commits import Table
from workflows.shards import Reject, ShardResult, Work, stored_reject

Drops = Mapping[str, tuple[Reason, str]]  # id -> why it goes


class DropWorker:
    """Revises shards without the rows of their payload."""

    def process(self, work: Work) -> ShardResult:
        """The rows of the revision before, less those of the payload."""
        assert work.previous is not None  # only committed shards are revised
        drops = {key: (Reason(reason), message) for key, (reason, message) in json.loads(work.payload).items()}
        return without(work.table, work.previous, drops)


def payload(drops: Drops) -> str:
    """What a DropWorker is told of one shard."""
    return json.dumps({key: [reason.value, message] for key, (reason, message) in drops.items()})


def without(table: Table, commit: ShardCommit, drops: Drops) -> ShardResult:
    """The rows that a marker stands for, those of `drops` as rejects.

    A row that is to be forgotten leaves nothing but its id, also where it had been refused before; in tables that are
    made from others it leaves nothing at all.
    """
    rows, refused = table.rows_of(commit), [stored_reject(row) for row in table.rejects_of(commit).to_pylist()]
    numbers = np.setdiff1d(np.arange(commit.read), [reject.row for reject in refused])
    ids = rows["id"].to_pylist()
    uris = rows["uri"].to_pylist() if "uri" in rows.column_names else [""] * len(ids)
    if table.name != "images":
        return _absent(commit, rows, refused, drops)
    rejects = [_blank(reject, drops) for reject in refused]
    for number, key, uri in zip(numbers.tolist(), ids, uris, strict=True):
        if key in drops:
            reason, message = drops[key]
            rejects.append(_blank(Reject(reason, message, key, uri, number), drops))
    kept = rows.filter(pa.array([key not in drops for key in ids], pa.bool_()))
    return ShardResult(kept, commit.read, sorted(rejects, key=lambda reject: reject.row))


def _absent(commit: ShardCommit, rows: pa.Table, refused: list[Reject], drops: Drops) -> ShardResult:
    """The rows as if their input had never had those of `drops`: it refuses them now, so there is nothing to refuse."""
    numbers = np.setdiff1d(np.arange(commit.read), [reject.row for reject in refused])
    ids = [*rows["id"].to_pylist(), *(reject.id for reject in refused)]
    places = [*numbers.tolist(), *(reject.row for reject in refused)]
    staying = sorted(place for place, key in zip(places, ids, strict=True) if key not in drops)
    place = {old: new for new, old in enumerate(staying)}
    rejects = [replace(reject, row=place[reject.row]) for reject in refused if reject.id not in drops]
    kept = rows.filter(pa.array([key not in drops for key in rows["id"].to_pylist()], pa.bool_()))
    return ShardResult(kept, len(staying), rejects)


def _blank(reject: Reject, drops: Drops) -> Reject:
    if drops.get(reject.id, (None,))[0] is not Reason.FORGOTTEN:
        return reject
    return Reject(Reason.FORGOTTEN, drops[reject.id][1], reject.id, row=reject.row)
