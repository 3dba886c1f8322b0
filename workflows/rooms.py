"""Renders rooms into a folder, in the layout of COCO and RefCOCO (perceptio/rooms/coco.py), for other programs to read.

    perceptio rooms --out DIR --count N --size PX --seed S

Reads   nothing
Writes  DIR/images, DIR/depth, DIR/instances.json, DIR/refs(unc).json, DIR/questions.jsonl, ...
Needs   CPUs: rooms are rendered in parallel, questions asked and files written here as they come

The same seed gives the same rooms, in the same order, on any number of CPUs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data
from ray.exceptions import RayError
from rich.progress import track

from perceptio.rooms.coco import write_coco
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Room, RoomObject
from schemas.recipe import Recipe
from workflows.runtime import start
from workflows.store import StageError

ROOMS_A_BLOCK = 16

log = logging.getLogger(__name__)


def write(recipe: Recipe, out: Path, *, count: int, size: int, seed: int) -> None:
    """Writes rooms 0 to `count` of a seed; `recipe` says only how Ray is started.

    Raises StageError if `out` holds anything already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StageError(f"--out {out}: exists and is not an empty folder; give a new one")
    start(recipe)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rooms
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = -(-count // ROOMS_A_BLOCK)
    arrays = ray.data.range(count, override_num_blocks=blocks).map_batches(
        partial(_render, seed=seed, size=size), batch_size=ROOMS_A_BLOCK
    )
    try:
        written = write_coco(track(_rooms(arrays, seed), "rooms", total=count), out)
    except RayError as error:
        raise StageError(f"rooms: {error}. Delete {out} and start again") from error
    log.info("%d rooms are in %s", written, out)


def _render(batch: dict[str, npt.NDArray[Any]], *, seed: int, size: int) -> dict[str, npt.NDArray[Any]]:
    """Rooms of a batch of indices as arrays: what can travel between processes without a pickle of our classes."""
    rooms = [render_room(seed, int(index), size) for index in batch["id"]]
    return {
        "index": np.array([room.index for room in rooms]),
        "rgb_HW3": np.stack([room.rgb_HW3 for room in rooms]),
        "depth_HW": np.stack([room.depth_HW for room in rooms]),
        "instance_HW": np.stack([room.instance_HW for room in rooms]),
        "objects": np.array([json.dumps([asdict(thing) for thing in room.objects]) for room in rooms]),
    }


def _rooms(arrays: ray.data.Dataset, seed: int) -> Iterator[Room]:
    for row in arrays.iter_rows():
        objects = tuple(RoomObject(**values) for values in json.loads(str(row["objects"])))
        yield Room(seed, int(row["index"]), row["rgb_HW3"], row["depth_HW"], row["instance_HW"], objects)
