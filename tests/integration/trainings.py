"""Small trainings for tests: tables and codebook ready, real workers found and killed, what the log says compared."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from schemas.recipe import Recipe
from tests.tables import fill, published, recipe_in
from workflows.commits import ROW_GROUP_ROWS
from workflows.store import open_root
from workflows.train_log import read_metrics

STEPS, EVERY = 12, 3
TRAIN_DRIVER = """
import sys
from schemas.recipe import Recipe
from workflows import train
train.run(Recipe.model_validate_json(sys.argv[1]))
"""


def prepared(folder: Path | str, parts: Path, *, row_group_rows: int = ROW_GROUP_ROWS, **more: Any) -> Recipe:
    """A recipe whose tables and codebook stand, ready to train on."""
    sizes = {"train__steps": STEPS, "train__checkpoint_every": EVERY, "train__global_batch": 8}
    sizes |= {
        "train__micro_batch": 2,
        "model__max_length": 512,
        "train__max_failures": 1,
        "train__publish_dtype": "float16",
    }
    recipe = recipe_in(folder, parts, **{**sizes, **more})
    root = open_root(recipe.root)
    fill(recipe, root, published(root, parts / "codebook", "codebook", {}), row_group_rows=row_group_rows)
    return recipe


def run_of(recipe: Recipe) -> str | None:
    """The name of the root's one training run."""
    names = open_root(recipe.root).folders("runs")
    assert len(names) <= 1, names
    return names[0] if names else None


def lines_of(recipe: Recipe) -> list[dict[str, Any]]:
    run = run_of(recipe)
    return read_metrics(open_root(recipe.root), run) if run else []


def series(recipe: Recipe) -> list[tuple[int, str, float]]:
    """Step, samples and loss of each step; its length is that of the run."""
    return [(line["step"], line["drawn"], line["loss"]) for line in lines_of(recipe)]


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers that this session's processes started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for_step(recipe: Recipe, least: int, seconds: float = 300) -> int:
    """The last step that the log has, once it has `least`; it must be before the run's end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = lines_of(recipe)
        if lines and lines[-1]["step"] >= least:
            assert lines[-1]["step"] < recipe.train.steps, "the fault came too late to hit live work"
            return int(lines[-1]["step"])
        time.sleep(0.02)
    raise AssertionError(f"no step {least} within {seconds} s")


@contextmanager
def killed_at(recipe: Recipe, *moments: int) -> Iterator[list[int]]:
    """While the block trains, a worker is killed after each of these steps; at which steps that was."""
    hit: list[int] = []

    def kill_each() -> None:
        for moment in moments:
            step = wait_for_step(recipe, moment)
            victims, left_behind = train_workers(), lines_of(recipe)
            victims[len(hit) % len(victims)].send_signal(signal.SIGKILL)
            hit.append(step)
            while moment != moments[-1] and lines_of(recipe) == left_behind:
                time.sleep(0.05)  # until others train

    killer = threading.Thread(target=kill_each, daemon=True)
    killer.start()
    yield hit
    killer.join(timeout=1)
    assert len(hit) == len(moments), f"of the moments {moments} only {hit} hit live work"
