"""The whole of a plan from its census and its sample: each stage's rows, hours, bytes, requests and money."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from schemas.manifest import Manifest
from schemas.plan import Plan, StagePlan, TablePlan
from schemas.recipe import PoolRecipe, Recipe
from schemas.tables import BY_RULE
from workflows.codebook_sample import HELD_OUT_EVERY
from workflows.estimate import (
    Fleet,
    Line,
    Requests,
    Rows,
    fitted,
    fleet,
    money,
    shard_requests,
    shard_rows,
    span,
    stage_requests,
    starts,
    stretch,
)
from workflows.plan_sample import POOLS, Census, Sampled
from workflows.runtime import code_version
from workflows.store import StageError

FED_BY = {"depth": "ingest", "masks": "ingest", "tokenize": "depth", "assemble": "ingest"}  # whose rows come in
INPUTS = {"ingest": 1, "depth": 1, "masks": 1, "tokenize": 1, "assemble": 3}  # tables that a shard is made from
MEASURES = 6  # times that the codebook's training looks at all held-out maps, forward only: a third of a step's work
BUSY = 0.5  # load for each core from which a plan says that it was disturbed


def reckon(
    recipe: Recipe,
    counted: Sequence[Census],
    listing_seconds: float,
    sampled: Sequence[Sampled],
    listings: Mapping[str, Manifest],
    load: float,
) -> Plan:
    """The plan for the whole data from a census and a sample of every stage.

    load: threads of other work that wanted a core when the sample began.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    by_stage = {one.stage: one for one in sampled}
    flow = _flow(recipe, counted, by_stage)
    tables = [_table("listing", _items(one, recipe), listings[one.source.name]) for one in counted]
    stages = []
    for stage, one in by_stage.items():
        if stage == "codebook":
            stages.append(_codebook(recipe, one, flow["depth"]))
            continue
        made = [_table(POOLS[stage], rows, one.manifests[rows.source]) for rows in flow[stage]]
        tables += made
        listed = _listing_hours(counted, listing_seconds, listings) if stage == "ingest" else 0.0
        stages.append(_stage(recipe, one, flow[stage], made, cores, listed, counted))
    size = sum(table.bytes for table in tables)
    prices = recipe.plan.prices
    puts, gets = sum(stage.puts for stage in stages), sum(stage.gets for stage in stages)
    by_puts = money(puts, prices, "put_usd_per_1000", 1000)
    by_gets = money(gets, prices, "get_usd_per_1000", 1000)
    usd = [stage.usd for stage in stages if stage.usd is not None]
    return Plan(
        recipe=recipe.digest,
        name=recipe.name,
        made=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        code=code_version(),
        cores=cores,
        sample_rows=sum(manifest.read for manifest in by_stage["ingest"].manifests.values()),
        stages=tuple(stages),
        tables=tuple(tables),
        bottleneck=max(stages, key=lambda stage: stage.suggested_hours).stage,
        hours=sum(stage.hours for stage in stages),
        suggested_hours=sum(stage.suggested_hours for stage in stages),
        bytes=size,
        puts=puts,
        gets=gets,
        machines_usd=sum(usd) if len(usd) == len(stages) else None,
        requests_usd=None if by_puts is None or by_gets is None else by_puts + by_gets,
        storage_usd_per_month=money(size, prices, "storage_usd_per_gb_month", 10**9),
        notes=tuple(_notes(recipe, by_stage, load, cores)),
    )


def _items(one: Census, recipe: Recipe) -> Rows:
    """The rows of a source's listing."""
    return Rows(one.source.name, shard_rows(one.items, one.weight, one.shards, recipe.ingest.rows_per_shard))


def _flow(recipe: Recipe, counted: Sequence[Census], sampled: Mapping[str, Sampled]) -> dict[str, list[Rows]]:
    """The rows that come into each stage, by source: those of its source, less what the sample's stages refused."""
    flow: dict[str, list[Rows]] = {"ingest": []}
    for one in counted:
        manifest = sampled["ingest"].manifests[one.source.name]
        known = sum(item.rows for item in one.sample)
        unknown = sum(item.rows == 0 for item in one.sample)
        each = max(0, manifest.read - known) / unknown if unknown else 1.0  # rows of an item that did not say
        rows = one.rows + one.unknown * each
        shards = shard_rows(rows, one.weight, one.shards, recipe.ingest.rows_per_shard)
        flow["ingest"].append(Rows(one.source.name, shards))
    for stage, before in FED_BY.items():
        manifests = sampled[before].manifests
        flow[stage] = [rows.times(_kept(manifests[rows.source])) for rows in flow[before]]
    if recipe.depth.maps == "sample":
        _without_maps(recipe, flow)
    return flow


def _without_maps(recipe: Recipe, flow: dict[str, list[Rows]]) -> None:
    """Leaves to `depth` the shards that the codebook's sample needs, and gives `tokenize` the images of the others."""
    training = {source.name for source in recipe.sources if not source.held_out}
    images = {rows.source: rows for rows in flow["masks"] if rows.source in training}  # all that were kept
    wanted = recipe.codebook.sample_rows / max(1e-9, 1 - recipe.max_reject_share)
    share = min(1.0, wanted / max(1.0, sum(rows.total for rows in images.values())))
    flow["depth"] = [
        Rows(rows.source, rows.shards[: math.ceil(share * len(rows.shards))]) if rows.source in training else rows
        for rows in flow["depth"]
    ]
    flow["tokenize"] = [images.get(rows.source, rows) for rows in flow["tokenize"]]


def _kept(manifest: Manifest) -> float:
    return manifest.kept / manifest.read if manifest.read else 1.0


def _table(name: str, rows: Rows, manifest: Manifest) -> TablePlan:
    """One table in full size: files by a line through the sample's, rejects by their share."""
    points = [("", c.kept, c.data.size) for c in manifest.shards if c.data is not None]
    line = fitted(points) if points else Line(0.0, {"": 0.0})
    kept = rows.times(_kept(manifest))
    refused = sum(c.rejects.size for c in manifest.shards if c.rejects is not None)
    size = sum(line.at("", count) for count in kept.shards) + refused / max(1, manifest.read) * rows.total
    return TablePlan(table=name, source=rows.source, read=round(rows.total), kept=round(kept.total), bytes=round(size))


@dataclass(frozen=True)
class _Measured:
    """What the sample says of a stage's actors."""

    line: Line  # seconds of a shard, by source
    once: float  # seconds of the sample that its shards do not explain
    late: float  # seconds from the start of the pool to an actor's first shard
    busy: float  # cores
    memory_gb: float


def _measured(one: Sampled) -> _Measured:
    paces = [(name, pace) for name, manifest in one.manifests.items() for pace in manifest.extra["paces"]]
    first: dict[str, float] = {}
    for _, pace in paces:
        first[pace["actor"]] = min(first.get(pace["actor"], pace["waited"]), pace["waited"])
    warm = [(name, pace) for name, pace in paces if pace["waited"] > first[pace["actor"]]]
    lacking = one.manifests.keys() - {name for name, _ in warm}  # all shards of these were some actor's first
    used = warm + [(name, pace) for name, pace in paces if name in lacking]
    line = fitted([(name, pace["rows"], pace["seconds"]) for name, pace in used])
    steady = span([line.at(name, pace["rows"]) for name, pace in paces], [0.0] * one.actors)
    return _Measured(
        line,
        once=max(0.0, one.job_wall - steady),
        late=min(first.values()),
        busy=max(0.01, sum(p["cpu_seconds"] for _, p in used) / max(1e-9, sum(p["seconds"] for _, p in used))),
        memory_gb=max(pace["memory_mb"] for _, pace in paces) / 1024,
    )


def _stage(
    recipe: Recipe,
    one: Sampled,
    flow: Sequence[Rows],
    made: Sequence[TablePlan],
    cores: int,
    listing: float,
    counted: Sequence[Census],
) -> StagePlan:
    """One pool of actors on all sources. listing: hours before it that are not the pool's."""
    pool: PoolRecipe = getattr(recipe, one.stage).pool
    measured = _measured(one)
    shards = [(rows.source, count) for rows in flow for count in rows.shards]
    seconds = [measured.line.at(source, count) for source, count in shards]
    machines = recipe.plan.machines
    actors = min(pool.max_actors if machines else one.actors, len(shards))
    best = _best(recipe, pool, measured, len(shards), cores)
    room = machines[best.kind].cpus * machines[best.kind].count if best.kind else cores
    preparing = (one.wall - one.job_wall) / 3600 + listing

    def hours(count: int, ready: PoolRecipe) -> float:
        slower = stretch(count, measured.busy, room) if machines or count > one.actors else 1.0  # as the sample was
        needs = [value * slower for value in seconds]
        return preparing + (measured.once + span(needs, starts(ready, count, measured.late))) / 3600

    suggested = pool.model_copy(update={"min_actors": best.actors, "max_actors": best.actors})
    then = hours(best.actors, suggested)
    asked = _requests(one, flow, made)
    if one.stage == "ingest":
        asked += Requests(gets=sum(census.remote for census in counted))
    price = machines[best.kind].usd_per_hour if best.kind else None
    rows = sum(rows.total for rows in flow)
    return StagePlan(
        stage=one.stage,
        rows=round(rows),
        shards=len(shards),
        rows_per_s_actor=rows / sum(seconds) if sum(seconds) else 0.0,
        cores_per_actor=measured.busy,
        memory_gb=measured.memory_gb,
        actors=actors,
        hours=hours(actors, pool),
        preparing_hours=preparing,
        suggested_actors=best.actors,
        suggested_hours=then,
        machine=best.kind,
        machines=best.machines,
        puts=round(asked.puts),
        gets=round(asked.gets),
        usd=None if price is None else then * best.machines * price,
    )


def _best(recipe: Recipe, pool: PoolRecipe, measured: _Measured, shards: int, cores: int) -> Fleet:
    """The most actors that do good: on the recipe's machines, or here, where more than the cores hold add nothing."""
    if not recipe.plan.machines:
        memory_gb = psutil.virtual_memory().total / 2**30
        held = min(cores / measured.busy, memory_gb / measured.memory_gb, recipe.cluster.logical_cpus / pool.cpus)
        return Fleet("", max(1, min(shards, int(held))), 0)
    try:
        return fleet(pool, recipe.plan.machines, measured.busy, measured.memory_gb, shards)
    except ValueError as error:
        raise StageError(str(error)) from error


def _requests(one: Sampled, flow: Sequence[Rows], made: Sequence[TablePlan]) -> Requests:
    total = Requests()
    for rows, table in zip(flow, made, strict=True):
        commits = one.manifests[rows.source].shards
        refusing = sum(commit.rejects is not None for commit in commits) / len(commits)
        count = len(rows.shards)
        shard = shard_requests(INPUTS[one.stage], table.bytes / count, refusing)
        total += Requests(shard.puts * count, shard.gets * count) + stage_requests(count, INPUTS[one.stage])
    return total


def _listing_hours(counted: Sequence[Census], seconds: float, listings: Mapping[str, Manifest]) -> float:
    """Hours to list all sources and to commit the listing's shards."""
    written = sum(len(manifest.shards) for manifest in listings.values())
    each = seconds / max(1, written)
    return sum(one.seconds + each * one.shards for one in counted) / 3600


def _codebook(recipe: Recipe, one: Sampled, maps: Sequence[Rows]) -> StagePlan:
    """The codebook's training: its start, the load of its sample, its steps; workers share the work evenly."""
    section, manifest = recipe.codebook, one.manifests[""]
    pace, workers = manifest.extra["pace"], one.actors
    training = {source.name for source in recipe.sources if not source.held_out}
    there = sum(rows.total for rows in maps if rows.source in training)
    rows = min(section.sample_rows, there)

    def steps(done: int, of_rows: float) -> float:
        return done + MEASURES * of_rows / HELD_OUT_EVERY / section.global_batch / 3

    share = workers / section.workers
    step = pace["learn_seconds"] / steps(pace["steps"], manifest.read)
    load = pace["load_seconds"] / max(1, manifest.read)
    once = max(0.0, one.wall - pace["learn_seconds"] - pace["load_seconds"])
    hours = (once + (steps(section.steps, rows) * step + load * rows) * share) / 3600
    machines = recipe.plan.machines
    pool = PoolRecipe(min_actors=section.workers, max_actors=section.workers)
    found = fleet(pool, machines, 1.0, 0.0, section.workers) if machines else Fleet("", section.workers, 0)
    price = machines[found.kind].usd_per_hour if found.kind else None
    parts = sum(len(rows.shards) for rows in maps if rows.source in training) * rows / max(1.0, there)
    return StagePlan(
        stage="codebook",
        rows=section.steps * section.global_batch,
        shards=0,
        rows_per_s_actor=section.global_batch / step / workers,
        cores_per_actor=1.0,
        memory_gb=0.0,
        actors=section.workers,
        hours=hours,
        preparing_hours=0.0,
        suggested_actors=section.workers,
        suggested_hours=hours,
        machine=found.kind,
        machines=found.machines,
        puts=round(10 + 3 * section.steps / section.checkpoint_every),
        gets=round(10 + 3 * parts * section.workers),
        usd=None if price is None else hours * found.machines * price,
    )


def _notes(recipe: Recipe, sampled: Mapping[str, Sampled], load: float, cores: int) -> list[str]:
    """What is to be known before the run is started."""
    notes = []
    if load > BUSY * cores:
        notes.append(
            f"other work kept this machine busy when the sample began (load {load:.1f} on {cores} cores): the rates are"
            " too low and the suggested pools too large for a quiet one; plan again when it is quiet"
        )
    for stage, one in sampled.items():
        for name, manifest in one.manifests.items() if stage != "codebook" else ():
            reasons = {reason: n for commit in manifest.shards for reason, n in commit.reasons.items()}
            own = sum(
                n
                for c in manifest.shards
                for reason, n in c.reasons.items()
                if reason not in {r.value for r in BY_RULE}
            )
            if own > recipe.max_reject_share * manifest.read:
                notes.append(
                    f"{stage} refused {own} of {manifest.read} rows of {name} in the sample ({', '.join(reasons)}):"
                    f" more than max_reject_share {recipe.max_reject_share:g} allows, the run would fail"
                )
    if recipe.plan.machines and any(machine.usd_per_hour is None for machine in recipe.plan.machines.values()):
        notes.append("a machine has no usd_per_hour: no money is stated for machines")
    return notes
