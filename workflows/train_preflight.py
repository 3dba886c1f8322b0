"""Before the first step: the run's heaviest micro-batches are trained on, and all that came of it is thrown away.

Writes  runs/RUN/preflight.json
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from perceptio.train.feed import SIZED, Feed, Samples
from perceptio.train.preflight import Size, agreed, for_rehearsal, heaviest, rehearse
from schemas.recipe import Recipe, TrainRecipe
from workflows.store import Root
from workflows.train_engine import build, engine_of

PREFLIGHT_NAME = "preflight.json"  # in ROOT/runs/RUN


def preflight(recipe: Recipe, root: Root, run: str, train: TrainRecipe) -> None:
    """Looks at the run's micro-batches, and takes a step on those that are heaviest, with an engine of its own.

    `train` is the recipe's with its precision settled. All workers call it. Raises ValueError for a dialogue that is
    too long, MemoryError for a micro-batch that does not fit.
    """
    began = time.monotonic()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    objective, processor = build(recipe, root)
    looked_at = _spread(train.steps, train.preflight_steps or train.steps)
    with closing(Samples.open(recipe, processor, world=world, columns=SIZED)) as sized:
        found = agreed(
            heaviest(
                sized, looked_at, rank=rank, world=world, micro_batch=train.micro_batch, packed_to=objective.packed_to
            )
        )
    engine, _ = engine_of(objective, for_rehearsal(train, world), world)
    with closing(Samples.open(recipe, processor, world=world)) as samples:
        feed = Feed(samples, objective.model.segmenter.sam2.config.image_size)
        held = rehearse(engine, feed, found, [entry.called for entry in train.mixture])
    of_all = [held] * world
    dist.all_gather_object(of_all, held)
    engine.destroy()
    del engine, objective
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rank == 0:
        seconds = round(time.monotonic() - began, 1)
        said = {"workers": world, "steps": train.steps, "looked_at": len(looked_at), "seconds": seconds}
        said |= {
            "heaviest": [{"step": one.step, "samples": len(one.positions), **one.size._asdict()} for one in found],
            "memory": [dataclasses.asdict(one) for one in of_all],
        }
        root.write(json.dumps(said, indent=1).encode(), "runs", run, PREFLIGHT_NAME)


def read_preflight(root: Root, run: str) -> dict[str, Any] | None:
    """What the run's pre-flight found; None before it ends, and where there is none."""
    data = root.read("runs", run, PREFLIGHT_NAME)
    return None if data is None else dict(json.loads(data))


def described(found: Mapping[str, Any]) -> str:
    """What was found, in a line."""
    most = {name: max(one[name] for one in found["heaviest"]) for name in Size._fields}
    held = max(found["memory"], key=lambda one: one["peak"] / one["total"])
    of = "" if found["looked_at"] == found["steps"] else f" of {found['looked_at']:,} steps of {found['steps']:,}"
    return (
        f"the heaviest micro-batches{of} have {most['tokens']:,} tokens, {most['tiles']} tiles, {most['objects']}"
        f" objects; a step on each held at most {held['peak'] / 2**30:.1f} of {held['total'] / 2**30:.1f} GiB a worker"
        f" ({found['seconds']:.0f} s)"
    )


def _spread(steps: int, most: int) -> list[int]:
    """At most so many of the steps, evenly, the first and the last among them."""
    return [int(step) for step in np.unique(np.linspace(0, steps - 1, min(steps, most)).round())]
