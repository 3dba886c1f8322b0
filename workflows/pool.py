"""A pool of actors that commits shards, each once: what every data stage runs on.

A stage gives `run_shards` a worker class and, for each source, the table to fill and the table that it is made from
(`workflows.shards.Job`). Each actor of one pool works through whole shards and commits them itself; only the small
commit records travel back. What is committed from the same inputs is never done again, so a stage that was interrupted,
or whose inputs grew, is finished by starting it again.
"""

from __future__ import annotations

import json
import logging
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.util.metrics import Counter as Metric

from schemas.manifest import Manifest, ShardCommit
from schemas.recipe import PoolRecipe, Recipe
from schemas.tables import BY_RULE, Reason
from workflows import actors
from workflows.commits import ROW_GROUP_ROWS, Table, require_same
from workflows.planned import planned_and_actual, read_plan
from workflows.progress import ShardProgress, summarise
from workflows.runtime import attempt_id, code_version
from workflows.shards import Job, ShardWorker, Work, rejects_table
from workflows.store import DamagedTableError, StageError, open_root, write_manifest

log = logging.getLogger(__name__)
PACES_KEPT = 256  # of a table, in its manifest; a plan's sample has fewer shards


class TooManyRejectsError(StageError):
    """More rows were refused than the recipe allows; the message is the table of reasons."""


@dataclass(frozen=True)
class Pace:
    """How long one actor had to do with one shard."""

    rows: int
    seconds: float
    cpu_seconds: float
    actor: str
    memory_mb: int  # peak so far of the actor's process
    waited: float  # seconds from the start of the pool to the start of this shard


def run_shards(
    recipe: Recipe,
    jobs: Sequence[Job],
    worker: type[ShardWorker],
    arguments: Mapping[str, Any],
    *,
    pool: PoolRecipe,
    row_group_rows: int = ROW_GROUP_ROWS,
    retry: Collection[Reason] = (),
) -> list[Manifest]:
    """Each job's manifest, after every shard was committed; tables that are complete are left as they are.

    worker is built in each actor with `arguments`. Raises OtherInputsError where a table stands with other settings,
    TooManyRejectsError above the recipe's max_reject_share, StageError where a worker fails.
    """
    runs = begin(recipe, jobs, retry)
    work(recipe, runs, worker, arguments, pool=pool, row_group_rows=row_group_rows)
    return finish(recipe, runs)


class Run:
    """A job under way: what is committed of it, what is not, by whom, in how many seconds of actors' time."""

    def __init__(self, recipe: Recipe, job: Job, retry: frozenset[Reason]) -> None:
        self.job, self.retry, self.limit = job, retry, recipe.max_reject_share
        self.payloads: Mapping[int, str] = job.payloads
        self.seconds, self.done, self.lost, self.began = 0.0, 0, 0, time.monotonic()
        self.paces: list[Pace] = []
        self.manifest = job.table.manifest()
        if self.manifest is None:
            job.table.plan(job.inputs)
            self.commits = job.table.committed()
        else:
            require_same(str(job.table), self.manifest.inputs, job.inputs)
            self.commits = {commit.shard: commit for commit in self.manifest.shards}
        self.refused = sum(map(_own_rejects, self.commits.values()))
        self.inputs = dict(job.shards)
        self.pending = {shard: self._next(shard) for shard in job.shards if self._is_pending(shard)}
        if self.manifest is not None and not self.pending:
            log.info("%s: complete, %d rows", job.table, self.manifest.kept)
        elif self.commits:
            stand = len(job.shards) - len(self.pending)
            log.info("%s: %d of %d shards stand already", job.table, stand, len(job.shards))

    def revise(self, payloads: Mapping[int, str]) -> None:
        """Makes the shards of these payloads pending once more, from the same inputs."""
        self.payloads, self.inputs = payloads, {shard: self.commits[shard].inputs for shard in payloads}
        self.pending = {shard: self._next(shard) for shard in payloads}

    def refresh(self) -> bool:
        """True if another attempt revised shards meanwhile: its markers are taken over."""
        standing = self.job.table.committed()
        newer = {i: standing[i] for i in self.commits if i in standing and standing[i] != self.commits[i]}
        self.commits |= newer
        self.refused = sum(map(_own_rejects, self.commits.values()))
        self.lost += len(newer)
        return bool(newer)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the Ray Data job, one per pending shard; the manifest goes, for the table is about to change."""
        if self.pending and self.manifest is not None:
            self.job.table.reopen()
            self.manifest = None
        return [
            {
                "source": self.job.table.source,
                "over": self.job.over.name,
                "shard": shard,
                "revision": revision,
                "inputs": json.dumps(self.inputs[shard]),
                "payload": self.payloads.get(shard, ""),
                "retry": ",".join(sorted(self.retry)),
            }
            for shard, revision in self.pending.items()
        ]

    def add(self, commit: ShardCommit, pace: Pace, attempt: str) -> None:
        """Takes a commit in. Raises TooManyRejectsError as soon as no rest of the table could bring the share down."""
        self.refused += _own_rejects(commit)
        if commit.shard in self.commits:
            self.refused -= _own_rejects(self.commits[commit.shard])
        self.commits[commit.shard] = commit
        self.pending.pop(commit.shard, None)
        self.seconds += pace.seconds
        self.done += commit.read
        if commit.revision == 0 and len(self.paces) < PACES_KEPT:
            self.paces.append(pace)
        self.lost += not commit.attempt.startswith(attempt)
        if self.job.expected and self.refused > self.limit * self.job.expected:
            require_few_rejects(self.job.table, self.commits, self.limit, self.job.expected)

    def finish(self, recipe: Recipe, attempt: str, extra: Mapping[str, Any]) -> Manifest:
        """The table's manifest: the one that stands where nothing changed, else a new one."""
        table, job = self.job.table, self.job
        if self.manifest is not None:
            return self._with_extra(self.manifest, extra)
        if self.lost:
            log.warning(
                "%s: another attempt committed %d of these shards first: its rows stand, none of ours", table, self.lost
            )
        newer = [shard for shard, last in table.revisions().items() if self._next(shard) <= last]
        if newer:
            raise StageError(
                f"{table}: shard {newer[0]} was revised by another command while this one ran: run `{table.stage}`"
                " again when that one is done"
            )
        other = [shard for shard, inputs in job.shards.items() if self.commits[shard].inputs != inputs]
        if other:
            raise StageError(
                f"{table}: shard {other[0]} was made from {self.commits[other[0]].inputs} by another attempt, expected"
                f" {dict(job.shards[other[0]])}: what it is made from changed meanwhile; run `{table.stage}` again"
            )
        require_few_rejects(table, self.commits, self.limit)
        return table.finish(
            self.commits,
            attempt=attempt,
            recipe=recipe.digest,
            code=code_version(),
            inputs=dict(job.inputs),
            licences=tuple(job.licences),
            seconds=round(self.seconds, 3),
            extra={**self._figures(recipe), **extra},
        )

    def _figures(self, recipe: Recipe) -> dict[str, Any]:
        """What was done in how long, and what `plan` had said of it where it was asked before."""
        table, wall = self.job.table, time.monotonic() - self.began
        figures = {
            "rows_done": self.done,
            "wall_seconds": round(wall, 3),
            "paces": [asdict(pace) for pace in self.paces],
        }
        plan = read_plan(table.root, recipe)
        size = sum(entry.size for c in self.commits.values() for entry in (c.data, c.rejects) if entry is not None)
        return figures | planned_and_actual(plan, table, rows=self.done, seconds=self.seconds, wall=wall, size=size)

    def _with_extra(self, manifest: Manifest, extra: Mapping[str, Any]) -> Manifest:
        """The manifest that stands; written again only where `extra` says something new."""
        merged = {**manifest.extra, **extra}
        if merged != manifest.extra:
            manifest = manifest.model_copy(update={"extra": merged})
            write_manifest(self.job.table.root, manifest, self.job.table.name, self.job.table.source)
        return manifest

    def _is_pending(self, shard: int) -> bool:
        commit = self.commits.get(shard)
        if commit is None or commit.inputs != self.job.shards[shard]:
            return True
        return bool(self.retry & {Reason(name) for name in commit.reasons})

    def _next(self, shard: int) -> int:
        return self.commits[shard].revision + 1 if shard in self.commits else 0


def begin(recipe: Recipe, jobs: Sequence[Job], retry: Collection[Reason] = ()) -> list[Run]:
    """The jobs, with what is committed of them. Raises OtherInputsError where one stands with other settings."""
    return [Run(recipe, job, frozenset(retry)) for job in jobs]


def work(
    recipe: Recipe,
    runs: Sequence[Run],
    worker: type[ShardWorker],
    arguments: Mapping[str, Any],
    *,
    pool: PoolRecipe,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> None:
    """Commits every pending shard of the runs, through one actor pool."""
    rows = [row for run in runs for row in run.rows()]
    if not rows:
        return
    attempt, table = attempt_id(), runs[0].job.table
    by_source = {run.job.table.source: run for run in runs}
    total = sum(len(run.inputs) for run in runs)
    built = {"worker": worker, "arguments": dict(arguments), "uri": table.root.uri, "name": table.name}
    built |= {"attempt": attempt, "row_group_rows": row_group_rows}
    records = actors.on_actors(recipe, rows, _ShardActor, built, pool=pool, blocks=len(rows))
    # counted here and not by the actors: a shard that is done twice counts once
    counted = Metric("perceptio_rows", "Rows that data stages kept or rejected", ("stage", "source", "outcome"))
    with ShardProgress(table.stage, total, total - len(rows)) as progress:
        for source, commit, pace in _commits(records, table.stage):
            for outcome, count in (("kept", commit.kept), ("rejected", commit.rejected)):
                if count:
                    counted.inc(count, {"stage": table.stage, "source": source, "outcome": outcome})
            by_source[source].add(commit, pace, attempt)
            progress.add(commit)


def finish(recipe: Recipe, runs: Sequence[Run], extra: Mapping[str, Any] | None = None) -> list[Manifest]:
    """Every run's manifest, written anew where its table changed or where its `extra` differs."""
    attempt = attempt_id()
    changed = any(run.manifest is None for run in runs)
    manifests = [run.finish(recipe, attempt, extra or {}) for run in runs]
    if changed:
        summarise(manifests)
    return manifests


def require_few_rejects(table: Table, commits: Mapping[int, ShardCommit], limit: float, expected: int = 0) -> None:
    """Raises TooManyRejectsError with the counts by reason where this stage itself refused more than its share.

    The share is of the rows read, or of `expected` rows where more are to come. Rows refused by rule (a stage before
    refused them, they stand in an evaluation split, they are forgotten) do not count.
    """
    reasons: Counter[str] = Counter()
    for commit in commits.values():
        reasons.update(commit.reasons)
    read = max(expected, sum(commit.read for commit in commits.values()))
    own = sum(map(_own_rejects, commits.values()))
    if own > limit * read:
        lines = "\n".join(f"  {reason:24} {count}" for reason, count in reasons.most_common())
        raise TooManyRejectsError(
            f"{table}: {own} of {read} rows were refused, more than max_reject_share = {limit:g} allows:\n{lines}\n"
            f"Look at {table.root.at('rejects', table.stage, table.source)}, mend the inputs and run"
            " `requeue --reason REASON`, or raise max_reject_share"
        )


def _own_rejects(commit: ShardCommit) -> int:
    """Rows that this stage itself refused, none by rule."""
    return commit.rejected - sum(commit.reasons.get(reason, 0) for reason in BY_RULE)


def _commits(records: Iterable[Mapping[str, Any]], stage: str) -> Iterator[tuple[str, ShardCommit, Pace]]:
    """Source, commit record and pace of each pending shard, as the shards get done."""
    asked = time.time()
    try:
        for record in records:
            pace = Pace(**json.loads(record["pace"]))
            pace = replace(pace, waited=round(max(0.0, pace.waited - asked), 3))
            yield record["source"], ShardCommit.model_validate_json(record["commit"]), pace
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise StageError(f"{stage}: a worker failed: {type(cause).__name__}: {cause}") from error
    except RayError as error:
        raise StageError(f"{stage}: {error}. What is committed stays: run it again to finish") from error


class _ShardActor:
    """The callable of the actor pool: one shard in, its commit record out."""

    def __init__(
        self,
        worker: type[ShardWorker],
        arguments: dict[str, Any],
        uri: str,
        name: str,
        attempt: str,
        row_group_rows: int,
    ) -> None:
        self.root, self.name = open_root(uri), name
        self.worker = worker(**arguments)
        self.attempt, self.row_group_rows, self.actor = attempt, row_group_rows, secrets.token_hex(3)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        asked, began, busy = time.time(), time.monotonic(), time.process_time()
        table = Table(self.root, self.name, row["source"])
        standing = table.find(int(row["shard"]))
        # Ray repeats a task whose process died: it may have committed before that
        if standing is None or standing.revision < row["revision"]:
            try:
                standing = self._commit(table, row, standing)
            except DamagedTableError:
                # another attempt that has this revision ends the table, and takes the revision before away
                standing = table.find(int(row["shard"]))
                if standing is None or standing.revision < row["revision"]:
                    raise
        pace = Pace(
            rows=standing.read,
            seconds=round(time.monotonic() - began, 4),
            cpu_seconds=round(time.process_time() - busy, 4),
            actor=self.actor,
            memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            // (2**20 if sys.platform == "darwin" else 2**10),
            waited=asked,
        )
        return {"source": table.source, "commit": standing.model_dump_json(), "pace": json.dumps(asdict(pace))}

    def _commit(self, table: Table, row: Mapping[str, Any], previous: ShardCommit | None) -> ShardCommit:
        shard, revision = int(row["shard"]), int(row["revision"])
        over, inputs = Table(self.root, row["over"], row["source"]), json.loads(row["inputs"])
        retry = frozenset(Reason(name) for name in row["retry"].split(",") if name)
        result = self.worker.process(Work(table, over, shard, inputs, row["payload"], previous, retry))
        # a repeated task must not write over the files of its first try, so each try has a name of its own
        attempt = f"{self.attempt}-{secrets.token_hex(2)}"
        return table.commit(
            shard,
            attempt,
            result.table,
            rejects_table(table, shard, result.rejects),
            result.read,
            self.row_group_rows,
            inputs=inputs,
            revision=revision,
        )
