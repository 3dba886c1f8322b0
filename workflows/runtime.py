"""The one adapter between the data stages and Ray: start-up, shards through an actor pool, progress, manifests.

A stage gives `run_shards` a worker class and, for each source, the table to fill. Each actor of one Ray Data pool works
through whole shards and commits them itself; only the small commit records travel back. What is committed is never
done again, so a stage that was interrupted is finished by starting it again.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import secrets
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import pyarrow as pa
import ray
import ray.data
from pydantic import BaseModel
from ray.exceptions import RayError, RayTaskError

from schemas.manifest import Licence, Manifest, ShardCommit
from schemas.recipe import PoolRecipe, Recipe, section_digest
from schemas.tables import REJECTS, Reason
from workflows.commits import Table, require_same
from workflows.progress import ShardProgress
from workflows.store import StageError, open_root

CHECKOUT = Path(__file__).resolve().parent.parent

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Made = TypeVar("Made")


class TooManyRejectsError(StageError):
    """More rows were refused than the recipe allows; the message is the table of reasons."""


class NotEnoughError(StageError):
    """The machine or cluster is too small for the recipe."""


@dataclass(frozen=True)
class Reject:
    """A row that was refused, with enough to fetch it again."""

    reason: Reason
    message: str
    id: str = ""
    uri: str = ""


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of one shard: read = kept rows + rejects."""

    table: pa.Table
    read: int
    rejects: Sequence[Reject] = field(default=())


class ShardWorker(Protocol):
    """A stage's work on one shard; built once an actor, from plain keyword arguments."""

    def process(self, source: str, shard: int, payload: str) -> ShardResult:
        """The shard's rows, in fixed batches. `payload` is what the stage's `run` gave for this shard."""
        ...


@dataclass(frozen=True)
class Job:
    """One table to fill: a payload per shard, in the order of shard numbers, and what the rows depend on."""

    table: Table
    payloads: Sequence[str]
    inputs: Mapping[str, str]  # name -> digest of each input table, weights, settings
    licences: Sequence[Licence] = ()


def start(recipe: Recipe) -> None:
    """Starts a local Ray, or joins the cluster that RAY_ADDRESS names.

    Raises NotEnoughError on too small a machine, StageError where no cluster answers.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHECKOUT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, paths)])
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address="auto", **quiet)
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise StageError(
                f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({error}): start one, or unset"
                " RAY_ADDRESS to work on this machine alone"
            ) from error
        return
    _check_machine(recipe)
    ray.init(
        num_cpus=recipe.cluster.logical_cpus,
        object_store_memory=recipe.cluster.object_store_mb * 2**20,
        include_dashboard=False,
        **quiet,
    )


def enter(folder: str) -> None:
    """Makes `folder`, the driver's, the working folder, so that a recipe's relative paths mean the same in a worker.

    Ray Train gives its workers another one. On another machine the folder may not exist: there, paths are absolute.
    """
    if Path(folder).is_dir():
        os.chdir(folder)


def attempt_id() -> str:
    """A name for one attempt at a stage: the time, and four random bytes."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + secrets.token_hex(4)


def settings_digest(section: BaseModel, pool: PoolRecipe) -> str:
    """Digest of a recipe section with its pool's threads, but not its size, which changes no result."""
    return f"{section_digest(section, exclude={'pool'})}-{pool.threads}"


def shipped(part: str) -> Path:
    """The folder of a small pretrained part that comes with the package: teacher, segmenter or base."""
    folder = CHECKOUT / "perceptio" / "rooms" / "zoo" / part
    if not folder.is_dir():
        raise StageError(f"the shipped part '{part}' is not at {folder}: reinstall the package, or name a folder")
    return folder


def weights(name: str, part: str) -> str:
    """What a recipe's weights field means: "rooms" is the shipped part, all else a folder or hub id as it stands."""
    return str(shipped(part)) if name == "rooms" else name


def device() -> str:
    """Where an actor's model runs: the accelerator that Ray gave it, else the CPU."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def code_version() -> str:
    """The package's version, and the commit where the code is a git checkout."""
    try:
        version = importlib.metadata.version("perceptio")
    except importlib.metadata.PackageNotFoundError:
        version = "unpackaged"
    if not (CHECKOUT / ".git").exists():
        return version
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version}+{commit}" if commit else version


def ahead(make: Callable[[Item], Made], items: Iterable[Item], *, threads: int = 1, depth: int = 2) -> Iterator[Made]:
    """make(item) for each item in order, up to `depth` of them worked on before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def run_shards(
    recipe: Recipe,
    jobs: Sequence[Job],
    worker: type[ShardWorker],
    arguments: Mapping[str, Any],
    *,
    pool: PoolRecipe,
    row_group_rows: int = 10_000,
) -> list[Manifest]:
    """Each job's manifest, after every shard was committed once; tables that are complete are left as they are.

    worker is built in each actor with `arguments`. Raises OtherInputsError where a table stands with other inputs,
    TooManyRejectsError above the recipe's max_reject_share, StageError where a worker fails.
    """
    for job in jobs:
        manifest = job.table.manifest()
        if manifest is not None:
            require_same(str(job.table), manifest.inputs, job.inputs)
            log.info("%s: complete, %d rows", job.table, manifest.kept)
    runs = [_Run(job) for job in jobs if job.table.manifest() is None]
    attempt = attempt_id()
    pending = [row for run in runs for row in run.pending()]
    if pending:
        start(recipe)
        by_source = {run.job.table.source: run for run in runs}
        total, done = sum(len(run.job.payloads) for run in runs), sum(len(run.commits) for run in runs)
        with ShardProgress(jobs[0].table.stage, total, done) as progress:
            for source, commit, seconds in _work(
                pending, jobs[0].table, worker, arguments, pool, attempt, row_group_rows
            ):
                by_source[source].add(commit, seconds, attempt)
                progress.add(commit)
    for run in runs:
        run.finish(recipe, attempt)
    return [job.table.require() for job in jobs]


class _Run:
    """A job under way: what is committed of it, by whom, in how many seconds of actors' time."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.lost = job, 0.0, 0
        job.table.plan(job.inputs)
        self.commits = job.table.committed()
        if self.commits:
            log.info("%s: %d of %d shards stand already", job.table, len(self.commits), len(job.payloads))

    def pending(self) -> list[dict[str, Any]]:
        """The rows of the Ray Data job: one per shard that is not committed."""
        source = self.job.table.source
        rows = [{"source": source, "shard": i, "payload": text} for i, text in enumerate(self.job.payloads)]
        return [row for row in rows if row["shard"] not in self.commits]

    def add(self, commit: ShardCommit, seconds: float, attempt: str) -> None:
        self.commits[commit.shard] = commit
        self.seconds += seconds
        self.lost += not commit.attempt.startswith(attempt)

    def finish(self, recipe: Recipe, attempt: str) -> None:
        table = self.job.table
        if self.lost:
            log.warning(
                "%s: another attempt committed %d of these shards first: its rows stand, none of ours", table, self.lost
            )
        require_few_rejects(table, self.commits, recipe.max_reject_share)
        table.finish(
            self.commits,
            attempt=attempt,
            recipe=recipe.digest,
            code=code_version(),
            inputs=dict(self.job.inputs),
            licences=tuple(self.job.licences),
            seconds=round(self.seconds, 3),
        )


def require_few_rejects(table: Table, commits: Mapping[int, ShardCommit], limit: float) -> None:
    """Raises TooManyRejectsError with the counts by reason where this stage itself refused more than its share."""
    reasons: Counter[str] = Counter()
    for commit in commits.values():
        reasons.update(commit.reasons)
    read = sum(commit.read for commit in commits.values())
    own = reasons.total() - reasons[Reason.UPSTREAM_REJECT]
    if own > limit * read:
        lines = "\n".join(f"  {reason:24} {count}" for reason, count in reasons.most_common())
        raise TooManyRejectsError(
            f"{table}: {own} of {read} rows were refused, more than max_reject_share = {limit:g} allows:\n{lines}\n"
            f"Look at {table.root.at('rejects', table.stage, table.source)}, mend the inputs, or raise max_reject_share"
        )


def _check_machine(recipe: Recipe) -> None:
    pools = {name: getattr(recipe, name).pool for name in ("ingest", "depth", "masks", "tokenize", "assemble")}
    needs = {name: pool.min_actors * pool.cpus for name, pool in pools.items()}
    needs["codebook"] = recipe.codebook.workers + 1.0
    needs["train"] = recipe.train.workers * recipe.train.cpus_per_worker + 1.0
    part, need = max(needs.items(), key=lambda item: item[1])
    if need > recipe.cluster.logical_cpus:
        raise NotEnoughError(
            f"cluster.logical_cpus is {recipe.cluster.logical_cpus}, but `{part}` needs {need:g}:"
            f" set it to at least that, or give `{part}` fewer actors or workers"
        )
    memory = _memory_limit() / 2**30
    if memory < recipe.cluster.min_memory_gb:
        raise NotEnoughError(
            f"this machine has {memory:.1f} GB of memory, the recipe's cluster.min_memory_gb is"
            f" {recipe.cluster.min_memory_gb:g}: use a larger machine or a smaller recipe"
        )


def _memory_limit() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = float(psutil.virtual_memory().total)
    return total if text == "max" else min(total, float(text))


def _work(
    pending: list[dict[str, Any]],
    table: Table,
    worker: type[ShardWorker],
    arguments: Mapping[str, Any],
    pool: PoolRecipe,
    attempt: str,
    row_group_rows: int,
) -> Iterator[tuple[str, ShardCommit, float]]:
    """Source, commit record and seconds of each pending shard, as the shards get done."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows, not blocks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    actor: Any = _ShardActor
    records = ray.data.from_items(pending, override_num_blocks=len(pending)).map(
        actor,
        fn_constructor_kwargs={
            "worker": worker,
            "arguments": dict(arguments),
            "place": (table.root.uri, table.name),
            "attempt": attempt,
            "row_group_rows": row_group_rows,
        },
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=max(pool.min_actors, min(pool.max_actors, len(pending))),
            max_tasks_in_flight_per_actor=2,  # one would keep the pool from ever growing, more would queue up shards
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    try:
        for record in records.iter_rows():
            yield record["source"], ShardCommit.model_validate_json(record["commit"]), record["seconds"]
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise StageError(f"{table.stage}: a worker failed: {type(cause).__name__}: {cause}") from error
    except RayError as error:
        raise StageError(f"{table.stage}: {error}. What is committed stays: run it again to finish") from error


class _ShardActor:
    """The callable of the actor pool: one shard in, its commit record out."""

    def __init__(
        self,
        worker: type[ShardWorker],
        arguments: dict[str, Any],
        place: tuple[str, str],
        attempt: str,
        row_group_rows: int,
    ) -> None:
        self.root, self.name = open_root(place[0]), place[1]
        self.worker = worker(**arguments)
        self.attempt, self.row_group_rows = attempt, row_group_rows

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        table = Table(self.root, self.name, row["source"])
        shard = int(row["shard"])
        # Ray repeats a task whose process died: it may have committed before that
        commit = table.find(shard) or self._commit(table, shard, row["payload"])
        seconds = time.monotonic() - began
        return {"source": table.source, "commit": commit.model_dump_json(), "seconds": seconds}

    def _commit(self, table: Table, shard: int, payload: str) -> ShardCommit:
        result = self.worker.process(table.source, shard, payload)
        # a repeated task must not write over the files of its first try, so each try has a name of its own
        attempt = f"{self.attempt}-{secrets.token_hex(2)}"
        rejects = _rejects_table(table, shard, result.rejects)
        return table.commit(shard, attempt, result.table, rejects, result.read, self.row_group_rows)


def _rejects_table(table: Table, shard: int, rejects: Sequence[Reject]) -> pa.Table:
    where = {"stage": table.stage, "source": table.source, "shard": shard}
    rows = [
        {**where, "id": r.id, "uri": r.uri, "reason": Reason(r.reason).value, "message": r.message} for r in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)
