"""The sample of a plan: some rows of every source through the real stages, under a root of their own.

Sources are listed whole, which says how much there is, and the sample is drawn from everywhere in the listing. Actors
are as many as the recipe's pools have and the machine holds, so that what they take from each other is measured too.
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from perceptio.sources.record import Item, SourceError
from schemas.manifest import Manifest
from schemas.recipe import PoolRecipe, Recipe, Source
from workflows import assemble, codebook, depth, ingest, masks, tokenize_depth
from workflows.codebook_sample import HELD_OUT_EVERY
from workflows.commits import Table
from workflows.listing import cut, put, reader
from workflows.runtime import start
from workflows.store import Root, StageError, open_root

POOLS = {"ingest": "images", "depth": "depth", "masks": "masks", "tokenize": "codes", "assemble": "samples"}  # fills
SHARDS = 4  # of each source, at least: the first of each actor is slow and not counted
SIZES = (1, 2)  # shards of both sizes in turn, so that what a shard costs shows beside what a row costs
CODEBOOK_STEPS = 40
ALL_ROWS = 10**9  # the codebook's sample is the plan's, so that `depth` works on every shard of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Census:
    """What a source holds, and the items drawn from it."""

    source: Source
    items: int
    rows: int  # of items that say how many they have
    unknown: int  # items that do not
    weight: int  # what shards are cut by
    shards: int
    remote: int  # items on an S3 store
    seconds: float
    sample: Sequence[Item]


@dataclass(frozen=True)
class Sampled:
    """One stage of the sample: its tables' manifests, and the seconds that all of it took."""

    stage: str
    manifests: Mapping[str, Manifest]  # by source; the codebook's by ""
    wall: float
    actors: int

    @property
    def job_wall(self) -> float:
        """Seconds from the first look at the tables to the last manifest."""
        return max(float(manifest.extra["wall_seconds"]) for manifest in self.manifests.values())


def census(source: Source, rows_per_shard: int, sample_rows: int, seed: int) -> Census:
    """The source's numbers and a sample of at least sample_rows rows, or all of them. Raises StageError.

    In memory: the sample and one shard's items.
    """
    began, draw = time.monotonic(), random.Random(f"{seed} {source.name}")
    drawn: list[tuple[float, int, Item]] = []  # those with the largest numbers, smallest first
    items = rows = unknown = weight = shards = remote = 0
    guess = 1 if source.format == "rooms" else rows_per_shard
    try:
        for shard in cut(source, reader(source).items(), rows_per_shard):
            shards += 1
            for item in shard:
                ticket = (draw.random(), items, item)
                (heapq.heappush if len(drawn) < sample_rows else heapq.heappushpop)(drawn, ticket)
                items, rows, unknown = items + 1, rows + item.rows, unknown + (item.rows == 0)
                weight += item.rows or guess
                remote += item.uri.startswith(("s3://", "s3a://"))
    except SourceError as error:
        raise StageError(f"source '{source.name}': {error}") from error
    if not drawn:
        raise StageError(f"source '{source.name}': it holds nothing that its format '{source.format}' reads")
    chosen: list[tuple[int, Item]] = []
    taken = 0
    for _, place, item in sorted(drawn, reverse=True):
        if taken < sample_rows:
            chosen.append((place, item))
            taken += item.rows or 1
    sample = [item for _, item in sorted(chosen, key=lambda pair: pair[0])]
    return Census(source, items, rows, unknown, weight, shards, remote, time.monotonic() - began, sample)


def pieces(items: Sequence[Item], count: int) -> Iterator[list[Item]]:
    """The items in at most `count` shards of SIZES in turn."""
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    ends = [round(len(items) * sum(sizes[: i + 1]) / sum(sizes)) for i in range(count)]
    for first, end in zip([0, *ends], ends, strict=False):
        if end > first:
            yield list(items[first:end])


def run_sample(recipe: Recipe, uri: str, counted: Sequence[Census]) -> tuple[float, list[Sampled]]:
    """Seconds to list the sample, and each stage in order, after all of them ran under the root `uri`.

    Raises StageError where a stage cannot run here.
    """
    start(recipe)
    small = _small(recipe, uri, counted)
    root = open_root(uri)
    most = max(getattr(small, stage).pool.max_actors for stage in POOLS)
    count = max(SHARDS, -(-3 * most // len(counted)))
    began = time.monotonic()
    for one in counted:
        put(small, root, one.source, pieces(one.sample, count))
    listing = time.monotonic() - began
    run_stage: dict[str, Callable[[Recipe], object]] = {
        "ingest": ingest.run,
        "depth": depth.run,
        "masks": masks.run,
        "codebook": codebook.run,
        "tokenize": tokenize_depth.run,
        "assemble": assemble.run,
    }
    done = []
    for stage, run in run_stage.items():
        log.info("plan: %s on a sample", stage)
        began = time.monotonic()
        run(_enough_maps(small, root) if stage == "codebook" else small)
        done.append(_sampled(small, root, stage, time.monotonic() - began))
    return listing, done


def _sampled(small: Recipe, root: Root, stage: str, wall: float) -> Sampled:
    if stage == "codebook":
        manifest = root.manifest("codebook")
        assert manifest is not None  # its stage has just returned
        return Sampled(stage, {"": manifest}, wall, int(manifest.extra["workers"]))
    manifests = {source.name: Table(root, POOLS[stage], source.name).require() for source in small.sources}
    return Sampled(stage, manifests, wall, getattr(small, stage).pool.max_actors)


def _small(recipe: Recipe, uri: str, counted: Sequence[Census]) -> Recipe:
    """The recipe for the sample: another root, whole pools from the start, a short training of the codebook."""
    held = ray.cluster_resources()  # type: ignore[no-untyped-call]
    changes: dict[str, Any] = {"root": uri, "max_reject_share": 1.0}
    for stage in POOLS:
        section = getattr(recipe, stage)
        actors = _that_fit(stage, section.pool, held)
        pool = section.pool.model_copy(update={"min_actors": actors, "max_actors": actors})
        changes[stage] = section.model_copy(update={"pool": pool})
    steps = min(recipe.codebook.steps, CODEBOOK_STEPS)
    workers = _divisor(recipe.codebook.global_batch, min(recipe.codebook.workers, int(held.get("CPU", 1)) - 1))
    changes["codebook"] = recipe.codebook.model_copy(
        update={"steps": steps, "workers": workers, "checkpoint_every": steps, "sample_rows": ALL_ROWS}
    )
    return recipe.model_copy(update=changes)


def _enough_maps(small: Recipe, root: Root) -> Recipe:
    """The recipe with no more workers of the codebook than the sample has maps for."""
    names = [source.name for source in small.sources if not source.held_out]
    maps = sum(Table(root, "depth", name).require().kept for name in names)
    if maps < HELD_OUT_EVERY:
        raise StageError(
            f"plan: the sample has {maps} depth maps, the codebook needs {HELD_OUT_EVERY}: raise plan.sample_rows"
        )
    workers = _divisor(small.codebook.global_batch, min(small.codebook.workers, maps // HELD_OUT_EVERY))
    return small.model_copy(update={"codebook": small.codebook.model_copy(update={"workers": workers})})


def _that_fit(stage: str, pool: PoolRecipe, held: Mapping[str, float]) -> int:
    """The pool's actors, or as many as Ray has room for. Raises StageError where it has none."""
    room = held.get("CPU", 0.0) / pool.cpus
    if pool.gpus:
        room = min(room, held.get("GPU", 0.0) / pool.gpus)
    if room < 1:
        raise StageError(
            f"{stage}.pool asks for cpus {pool.cpus:g} and gpus {pool.gpus:g} an actor, Ray has CPU"
            f" {held.get('CPU', 0):g} and GPU {held.get('GPU', 0):g}: plan on a machine of the kind that will work, or"
            f" set {stage}.pool lower"
        )
    return min(pool.max_actors, int(room))


def _divisor(batch: int, most: int) -> int:
    """The largest number of workers up to `most` that the batch divides by."""
    return next(count for count in range(max(1, most), 0, -1) if batch % count == 0)
