"""Before a training starts: is there room for its workers, and on the disk for its checkpoints?"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources

from schemas.recipe import Recipe
from workflows.plan_train import plan_training
from workflows.store import Root, StageError

ASK_EVERY_S = 1.0
MOVED_BYTES = 12  # of a checkpoint, a trained parameter: fp32 masters and AdamW's two moments
MORE_CHECKPOINTS = 2  # than are kept: the latest, and the one that is being written

log = logging.getLogger(__name__)


def require_workers(recipe: Recipe) -> None:
    """Waits until the cluster has room for the fewest workers of the recipe, of which it is asked.

    Raises StageError where it has not within `train.room_within_s`: at once on a Ray of this machine alone, which does
    not grow. Ray Train itself would wait without end.
    """
    train = recipe.train
    fewest, each = train.possible_workers[0], {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    wanted = {name: amount for name, amount in each.items() if amount}
    if _room_for(wanted) >= fewest:
        return
    grows = bool(os.environ.get("RAY_ADDRESS"))
    end = time.monotonic() + (train.room_within_s if grows else 0)
    log.info("train: room for %d of %d workers, each %s", _room_for(wanted), fewest, wanted)
    request_resources(bundles=[wanted] * fewest)
    try:
        while (room := _room_for(wanted)) < fewest:
            if time.monotonic() >= end:
                raise StageError(
                    f"train: Ray has room for {room} workers, expected {fewest}, each with {wanted}"
                    f"{f', after {train.room_within_s:g} s' if grows else ''}; its machines: {_machines()}. Lower"
                    " train.workers, cpus_per_worker or gpus_per_worker, or"
                    f" {'add machines' if grows else 'raise cluster.logical_cpus'}"
                )
            time.sleep(ASK_EVERY_S)
    finally:
        request_resources(bundles=[])


def require_disk(recipe: Recipe, root: Root, standing: int) -> None:
    """Raises StageError where a local root has no room for the checkpoints that will stand at once, and the model.

    `standing` checkpoints of the run have their room already. Where the base's configuration cannot be read here, as
    workers on other machines may, a warning says that nothing was reckoned.
    """
    if not root.is_local:
        return
    try:
        planned = plan_training(recipe)
    except OSError as error:
        log.warning("train: whether the disk has room for the checkpoints is not known: %s", error)
        return
    kept = max(1, recipe.train.keep_checkpoints + MORE_CHECKPOINTS - standing)
    checkpoint = MOVED_BYTES * planned.trained
    needed = kept * checkpoint + 4 * planned.parameters
    folder = Path(root.at(""))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageError(
            f"train: {folder} has {free / 1e9:.1f} GB free, expected at least {needed / 1e9:.1f}:"
            f" {kept} more checkpoints of {checkpoint / 1e9:.2f} GB and the model. Free some, put root elsewhere, or"
            " lower train.keep_checkpoints"
        )


def _room_for(each: dict[str, float]) -> int:
    """How many workers the machines that are alive can hold, whether or not others work there now."""
    return sum(int(min(machine.get(name, 0.0) // amount for name, amount in each.items())) for machine in _resources())


def _machines() -> list[dict[str, float]]:
    return [{name: machine.get(name, 0.0) for name in ("CPU", "GPU")} for machine in _resources()]


def _resources() -> list[dict[str, float]]:
    """Of each machine that is alive."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
