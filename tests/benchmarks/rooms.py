"""Rooms rendered a second on two cores at 224 px, as a Ray Data job, beside a bare pool of two processes."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ray
import ray.data

from perceptio.rooms.render import render_room

SIZE, ROOMS, PROCESSES, SEED, BAR = 224, 160, 2, 31, 12.0


def _one(index: int) -> int:
    return len(render_room(SEED, index, SIZE).objects)


def _bare() -> float:
    """Images/s of a pool of processes, after each has rendered one."""
    with ProcessPoolExecutor(PROCESSES) as pool:
        list(pool.map(_one, range(10_000, 10_000 + PROCESSES)))
        began = time.monotonic()
        list(pool.map(_one, range(ROOMS), chunksize=8))
        return ROOMS / (time.monotonic() - began)


def _ray() -> float:
    """Images/s of a Ray Data job on as many CPUs, its start-up left out by a small job before."""
    ray.init(address="local", num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False)
    try:
        return _job(2 * PROCESSES, 10_000) and _job(ROOMS, 0)
    finally:
        ray.shutdown()


def _job(rooms: int, first: int) -> float:
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.monotonic()
    blocks = max(PROCESSES, rooms // 8)
    rows = ray.data.range(rooms, override_num_blocks=blocks).map(lambda row: {"objects": _one(first + row["id"])})
    assert len(rows.take_all()) == rooms
    return rooms / (time.monotonic() - began)


def run() -> dict[str, Any]:
    """The benchmark's result; the bar is the Ray Data job's."""
    bare, job = _bare(), _ray()
    rows = [
        {"name": "Ray Data", "images_per_s": job},
        {"name": "peer: bare pool of 2 processes", "images_per_s": bare},
    ]
    what = f"rooms rendered at {SIZE} px on {PROCESSES} cores"
    return {
        "name": "rooms",
        "what": what,
        "value": job,
        "unit": "images/s",
        "bar": BAR,
        "higher_is_better": True,
        "holds": job >= BAR,
        "rows": rows,
    }
