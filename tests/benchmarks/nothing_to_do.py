"""Seconds that each data stage takes to find out that a table of 1,000 files is complete, without starting Ray.

The tables are made by the stages themselves in a process of its own, one image a shard; what is timed is their second
run, here, with everything imported.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from perceptio.data.images import encode_png
from perceptio.depth.teacher import TeacherCard
from schemas.recipe import Recipe
from tests.benchmarks._stage import photographs, recipe_at
from tests.benchmarks.tokenize import write_codebook
from workflows import assemble, depth, ingest, tokenize_depth
from workflows.folders import publish
from workflows.runtime import shipped
from workflows.store import open_root
from workflows.teacher_maps import CONVENTION

FILES, SIDE, BAR = 1000, 32, 5.0
STAGES = {"ingest": ingest.run, "depth": depth.run, "tokenize": tokenize_depth.run, "assemble": assemble.run}


def _recipe(folder: Path) -> Recipe:
    source = {"name": "data", "format": "folder", "path": str(folder / "files")}
    return recipe_at(folder / "root", source, ingest__rows_per_shard=1)


def _make(folder: Path) -> None:
    """Complete tables of FILES shards of one image each."""
    (folder / "files").mkdir()
    for number, rgb_HW3 in enumerate(photographs(FILES, (SIDE, SIDE))):
        (folder / "files" / f"{number:04d}.png").write_bytes(encode_png(rgb_HW3))
    recipe = _recipe(folder)
    fields: dict[str, Any] = {"stage": "codebook", "attempt": "bench", "recipe": "bench", "code": "bench"}
    fields |= {"inputs": {"teacher": TeacherCard.read(shipped("teacher")).digest}, "extra": {"convention": CONVENTION}}
    publish(open_root(recipe.root), write_codebook(folder / "codebook"), "codebook", **fields)
    for stage in STAGES.values():
        stage(recipe)
    ray.shutdown()


def run() -> dict[str, Any]:
    """The benchmark's result: the slowest stage's seconds."""
    with tempfile.TemporaryDirectory() as name:
        maker = multiprocessing.get_context("spawn").Process(target=_make, args=(Path(name),))
        maker.start()
        maker.join()
        assert maker.exitcode == 0
        recipe, rows = _recipe(Path(name)), []
        for stage, again in STAGES.items():
            began = time.monotonic()
            again(recipe)
            rows.append({"stage": stage, "seconds": time.monotonic() - began})
        assert not ray.is_initialized()
    value = max(row["seconds"] for row in rows)
    return {
        "name": "nothing_to_do",
        "what": f"the slowest stage's look at its complete table of {FILES} files",
        "value": value,
        "unit": "s",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": rows,
    }
