"""Work that is worth disturbing, the processes that do it, and what must have come of it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CHECKOUT, recipe_of, rooms
from ray.cluster_utils import Cluster

from schemas.manifest import Manifest
from schemas.recipe import Recipe
from workflows import depth, ingest, tokenize_depth
from workflows.commits import Table
from workflows.store import open_root
from workflows.verify import problems_of

TRAINING, HELD_OUT, PER_SHARD = 40, 10, 2  # the held-out rooms are the first training rooms: `ingest` has doubles
RUN: Mapping[str, Callable[[Recipe], None]] = {
    "ingest": ingest.run,
    "depth": depth.run,
    "tokenize": tokenize_depth.run,
}
TABLE = {"ingest": "images", "depth": "depth", "tokenize": "codes"}
BEFORE = {
    "ingest": (),
    "depth": ("listing", "images", "rejects"),
    "tokenize": ("listing", "images", "rejects", "depth", "codebook"),
}
SOURCES = ("rooms", "test")
FIRST = (TRAINING + HELD_OUT) // PER_SHARD  # markers of a stage's first revisions
TOTAL = {"ingest": FIRST + HELD_OUT // PER_SHARD, "depth": FIRST, "tokenize": FIRST}
DRIVER = """
import importlib, logging, sys
from schemas.recipe import Recipe
logging.basicConfig(level=logging.INFO)
recipe, stage, extra = Recipe.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3:]
module = importlib.import_module("workflows." + {"tokenize": "tokenize_depth"}.get(stage, stage))  # torch takes seconds
module.run(recipe, *extra)
"""
Markers = dict[str, bytes]  # path below the root -> what it says


@dataclass(frozen=True)
class Undisturbed:
    """A root on which every stage ran to its end, and the recipe that it ran with."""

    recipe: Recipe

    def manifest(self, stage: str, source: str) -> Manifest:
        return tables(self.recipe, stage)[source].require()

    def start_at(self, root: Path, stage: str, **settings: Any) -> Recipe:
        """A recipe for a new root that holds all that comes before a stage."""
        for name in BEFORE[stage]:
            shutil.copytree(Path(self.recipe.root) / name, root / name)
        shutil.rmtree(root / "rejects" / stage, ignore_errors=True)
        return recipe_at(root, Path(self.recipe.depth.teacher), **settings)


def recipe_at(root: Path, teacher: Path, **settings: Any) -> Recipe:
    sources = [rooms(count=TRAINING, size=160), rooms("test", HELD_OUT, size=160, held_out=True)]
    mixture = json.dumps([{"source": "rooms", "weight": 1, "segmentation": False, "depth": True}])
    settings = {"ingest__rows_per_shard": PER_SHARD, "depth__teacher": teacher, "depth__batch_size": 1, **settings}
    return recipe_of(root, sources, train__mixture=mixture, **settings)


def tables(recipe: Recipe, stage: str) -> dict[str, Table]:
    root = open_root(recipe.root)
    return {source.name: Table(root, TABLE[stage], source.name) for source in recipe.sources}


def markers(recipe: Recipe, stage: str) -> Markers:
    """Every marker of a stage's tables, all revisions."""
    root = Path(recipe.root)
    found = root.glob(f"{TABLE[stage]}/*/_commits/[0-9]*.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def wait_for(recipe: Recipe, stage: str, least: int, total: int, seconds: float = 400) -> Markers:
    """The markers as soon as there are `least`; fails where the work was over before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = markers(recipe, stage)
        if len(found) >= least:
            assert 0 < len(found) < total, f"{len(found)} of {total} markers: the fault came too late for live work"
            return found
        time.sleep(0.005)
    raise AssertionError(f"no {least} markers of {stage} within {seconds} s")


def start_driver(recipe: Recipe, address: str, *arguments: str, script: str = DRIVER) -> subprocess.Popen[str]:
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    command = [sys.executable, "-c", script, recipe.model_dump_json(), *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def shard_actors(below: psutil.Process | None = None) -> list[psutil.Process]:
    """The live actors that work on shards, among the processes that this session or the given process started."""
    found = []
    for process in (below or psutil.Process()).children(recursive=True):
        try:
            if process.cmdline()[:1] and "_ShardActor" in process.cmdline()[0]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for_actors(
    below: psutil.Process | None = None, former: Collection[psutil.Process] = (), seconds: float = 400
) -> list[psutil.Process]:
    """The actors, but for those of former work, as soon as there is one: they are built before they work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := [actor for actor in shard_actors(below) if actor not in former]:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no actor that works on shards within {seconds} s")


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A Ray of its own with one CPU on each of two nodes, so that a pool of two actors has one on either.

    It lies in a folder of its own: in the usual one, every other Ray on this machine would join it.
    """
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
    store = 80 * 2**20
    cluster = Cluster()
    with tempfile.TemporaryDirectory(prefix="two_nodes", ignore_cleanup_errors=True) as folder:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RAY_TMPDIR", folder)
                cluster.add_node(num_cpus=1, object_store_memory=store, include_dashboard=False, _system_config=quick)
            cluster.add_node(num_cpus=1, object_store_memory=store)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RAY_TMPDIR", folder)
                cluster.shutdown()


def second_node(cluster: Cluster) -> psutil.Process:
    """The raylet of the second node; a new node where the last one was killed."""
    living = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.poll() is None]
    node = living[0] if living else cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def check(recipe: Recipe, undisturbed: Undisturbed, stage: str, before: Markers, *, new_driver: bool = False) -> int:
    """How many rows were done after the fault, after all was compared.

    The same rows as undisturbed, every shard once, and no marker touched that stood before the fault. Where a new
    driver finished the table, it had no more to do than what was not committed.
    """
    rows = redone = done = 0
    for source, table in tables(recipe, stage).items():
        manifest, expected = table.require(), undisturbed.manifest(stage, source)
        assert [c.content for c in manifest.shards] == [c.content for c in expected.shards]
        assert manifest.digest == expected.digest
        assert (manifest.read, manifest.kept, manifest.rejected) == (expected.read, expected.kept, expected.rejected)
        assert [table.ids_of(c) for c in manifest.shards] == [
            tables(undisturbed.recipe, stage)[source].ids_of(c) for c in expected.shards
        ]
        done += manifest.extra["rows_done"]
        assert table.unnamed() == [] and problems_of(table) == []
    after = markers(recipe, stage)
    assert after.keys() == markers(undisturbed.recipe, stage).keys(), "a shard has a revision that nobody needed"
    assert {path: after[path] for path in before} == before, "a marker was replaced"
    for path, text in after.items():
        rows += json.loads(text)["read"]
        redone += 0 if path in before else json.loads(text)["read"]
    assert 0 < len(before) < len(after) and 0 < redone <= rows
    assert not new_driver or 0 < done <= redone, "a shard was done again that was committed before"
    print(f"{stage}: {len(before)} of {len(after)} markers stood at the fault, {redone} of {rows} rows were done after")
    return redone
