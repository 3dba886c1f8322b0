"""The `depth` stage on 2 cores beside a bare loop, with the shipped rooms teacher: here the engine's own cost shows."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perceptio.data.images import encode_png
from perceptio.rooms.render import render_room
from tests.benchmarks._stage import compare, put, recipe_at, result
from tests.benchmarks.depth import image_rows, load_bare
from workflows import depth
from workflows.runtime import shipped

SIZE, SHARDS, ROWS, BATCH, BAR = 128, 30, 100, 16, 0.85


def run() -> dict[str, Any]:
    """The benchmark's result."""
    rng = np.random.default_rng(0)
    rooms = [render_room(5, index, SIZE).rgb_HW3 for index in range(50)]
    pictures = [np.maximum(rooms[i % 50], rng.integers(0, 9, (1, 1, 3))).astype(np.uint8) for i in range(SHARDS * ROWS)]
    encoded = [encode_png(rgb_HW3) for rgb_HW3 in pictures]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = (image_rows(encoded[i : i + ROWS], (SIZE, SIZE), i) for i in range(0, len(encoded), ROWS))
        put(folder, "images", shards)
        recipe = recipe_at(folder, {"name": "data", "format": "folder", "path": str(folder)}, depth__batch_size=BATCH)
        load = partial(load_bare, shipped("teacher"), BATCH)
        rows = compare(folder, "images", "depth", depth.run, recipe, load, ROWS)
    return result("depth_rooms", f"depth, rooms teacher at {SIZE} px, of a bare loop's rows/s", BAR, rows)
