"""What a run will take, before it is started: rates, pools, hours, storage, requests and money.

    perceptio plan --recipe rooms [--json FILE]
    perceptio plan --recipe rooms --compare     after a run: planned beside actual

Reads   the recipe's sources: their whole listing, and plan.sample_rows rows of each
Writes  ROOT/plan.json; while it works ROOT/plan/ATTEMPT, which it removes
Needs   what the stages need, for some minutes

It plans the data stages, from nothing to samples/, one after another as `perceptio run` does them. Rates are those of
the machine that it runs on: plan for a cluster on one machine of its kind. Images that stand twice far from each other
are not found in a sample: a plan counts them as kept. Of training it reckons the memory of weights, gradients and
optimizer, from the model's shape.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from schemas.manifest import Manifest
from schemas.plan import PLAN_NAME, Plan
from schemas.recipe import Recipe
from workflows.commits import Table
from workflows.plan_reckon import reckon
from workflows.plan_sample import POOLS, census, run_sample
from workflows.plan_train import plan_training
from workflows.planned import read_plan
from workflows.runtime import attempt_id
from workflows.store import Root, StageError, open_root

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """One stage of a finished run beside its plan."""

    stage: str
    planned_hours: float
    hours: float | None  # None where the stage is not finished, or was not done in one go
    planned_rows: int
    rows: int | None
    planned_bytes: int
    bytes: int | None


def run(recipe: Recipe) -> Plan:
    """The plan, which also stands in ROOT/plan.json; raises StageError where the sample cannot be run."""
    root, load = open_root(recipe.root), psutil.getloadavg()[0]
    rows = recipe.plan.sample_rows
    counted = [census(source, recipe.ingest.rows_per_shard, rows, recipe.seed) for source in recipe.sources]
    folder = posixpath.join("plan", attempt_id())
    try:
        listing, sampled = run_sample(recipe, posixpath.join(recipe.root, folder), counted)
        plan = _with_training(recipe, reckon(recipe, counted, listing, sampled, _listings(root, folder, recipe), load))
    finally:
        _remove(root, folder)
    root.write(plan.model_dump_json(indent=1).encode(), PLAN_NAME)
    return plan


def compare(recipe: Recipe) -> list[Compared]:
    """Each stage's plan beside its finished tables; hours are from the first look at the tables to the last manifest.

    Raises StageError where the root has no plan of this recipe.
    """
    root = open_root(recipe.root)
    plan = read_plan(root, recipe)
    if plan is None:
        raise StageError(f"{root.at(PLAN_NAME)}: there is no plan of this recipe: run `plan` before the run")
    return list(_compared(recipe, root, plan))


def _with_training(recipe: Recipe, plan: Plan) -> Plan:
    try:
        return plan.model_copy(update={"training": plan_training(recipe)})
    except OSError as error:
        note = f"the memory of train is not planned, a configuration could not be read: {error}"
        return plan.model_copy(update={"notes": (*plan.notes, note)})


def _compared(recipe: Recipe, root: Root, plan: Plan) -> Iterator[Compared]:
    for stage in plan.stages:
        hours = stage.hours - stage.preparing_hours
        if stage.stage == "codebook":
            codebook = root.manifest("codebook")
            whole = codebook is not None and codebook.extra.get("pace") is not None
            yield Compared("codebook", hours, codebook.seconds / 3600 if codebook and whole else None, 0, None, 0, None)
            continue
        name = POOLS[stage.stage]
        found = [Table(root, name, source.name).manifest() for source in recipe.sources]
        manifests = [manifest for manifest in found if manifest is not None]
        done = len(manifests) == len(found)
        at_once = done and all(manifest.extra.get("rows_done", 0) >= manifest.read for manifest in manifests)
        yield Compared(
            stage.stage,
            hours,
            max(manifest.extra["wall_seconds"] for manifest in manifests) / 3600 if at_once else None,
            stage.rows,
            sum(manifest.read for manifest in manifests) if done else None,
            sum(table.bytes for table in plan.tables if table.table == name),
            sum(map(_size, manifests)) if done else None,
        )


def _size(manifest: Manifest) -> int:
    return sum(entry.size for c in manifest.shards for entry in (c.data, c.rejects) if entry is not None)


def _listings(root: Root, folder: str, recipe: Recipe) -> dict[str, Manifest]:
    """The manifests of the sample's listings, by source."""
    found = {source.name: root.manifest(folder, "listing", source.name) for source in recipe.sources}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _remove(root: Root, folder: str) -> None:
    try:
        root.fs.rm(root.at(folder), recursive=True)
        if not root.folders("plan"):
            root.fs.rm(root.at("plan"), recursive=True)
    except FileNotFoundError:  # nothing was written, or a store without folders
        return
