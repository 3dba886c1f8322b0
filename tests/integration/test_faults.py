"""Faults in the middle of the work: a killed actor, a killed driver, two drivers at once; nothing lost or doubled.

Every test asserts that the fault met live work: 0 < committed < total.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import CHECKOUT, recipe_of, rooms

from schemas.manifest import Manifest, ShardCommit
from schemas.recipe import Recipe
from workflows import ingest, verify
from workflows.commits import Table
from workflows.store import open_root

ROOMS, PER_SHARD = 60, 4
SHARDS = ROOMS // PER_SHARD
DRIVER = """
import logging, sys
from schemas.recipe import Recipe
from workflows import ingest
logging.basicConfig(level=logging.INFO)
ingest.run(Recipe.model_validate_json(sys.argv[1]))
"""


def recipe_at(root: Path) -> Recipe:
    return recipe_of(root, [rooms(count=ROOMS, size=160)])


def images(recipe: Recipe) -> Table:
    return Table(open_root(recipe.root), "images", "rooms")


def wait_for_live_work(recipe: Recipe, seconds: float = 120, least: int = 2) -> dict[int, ShardCommit]:
    """The markers as soon as there are `least`; fails where the work was over before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        commits = images(recipe).committed()
        if len(commits) >= least:
            assert 0 < len(commits) < SHARDS, "the fault came too late to hit live work"
            return commits
        time.sleep(0.02)
    raise AssertionError(f"no {least} shards committed within {seconds} s")


def start_driver(recipe: Recipe, address: str) -> subprocess.Popen[str]:
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    command = [sys.executable, "-c", DRIVER, recipe.model_dump_json()]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def shard_actors() -> list[psutil.Process]:
    """The live actors that work on shards, among the processes that this test session started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and "_ShardActor" in process.cmdline()[0]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> Manifest:
    recipe = recipe_at(tmp_path_factory.mktemp("undisturbed"))
    ingest.run(recipe)
    return images(recipe).require()


def check(recipe: Recipe, undisturbed: Manifest, before: dict[int, ShardCommit]) -> None:
    """The same rows as undisturbed, every shard once, and none redone that was committed before the fault."""
    manifest = images(recipe).require()
    assert manifest.digest == undisturbed.digest
    assert [c.content for c in manifest.shards] == [c.content for c in undisturbed.shards]
    assert (manifest.read, manifest.kept) == (undisturbed.read, undisturbed.kept) and len(manifest.shards) == SHARDS
    assert {shard: manifest.shards[shard] for shard in before} == before
    verify.run(recipe)
    redone = sum(commit.read for commit in manifest.shards if commit.shard not in before)
    print(f"{redone} of {manifest.read} rows were done after the fault")


def test_a_killed_actor_is_replaced_and_its_shard_done_once(
    tmp_path: Path, local_ray: str, undisturbed: Manifest
) -> None:
    recipe = recipe_at(tmp_path)
    fault: dict[str, object] = {}

    def kill_when_live() -> None:
        fault["before"] = wait_for_live_work(recipe)
        actors = shard_actors()
        for actor in actors:
            actor.send_signal(signal.SIGKILL)
        fault["killed"] = len(actors)

    killer = threading.Thread(target=kill_when_live)
    killer.start()
    ingest.run(recipe)
    killer.join()
    assert fault["killed"], "no live actor was found to kill"
    before = fault["before"]
    assert isinstance(before, dict)
    check(recipe, undisturbed, before)


def test_after_a_killed_driver_only_uncommitted_shards_are_done(
    tmp_path: Path, local_ray: str, undisturbed: Manifest
) -> None:
    recipe = recipe_at(tmp_path)
    driver = start_driver(recipe, local_ray)
    before = wait_for_live_work(recipe)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert images(recipe).manifest() is None
    ingest.run(recipe)
    check(recipe, undisturbed, before)


def test_of_two_drivers_at_once_the_loser_says_so_and_every_shard_is_done_once(
    tmp_path: Path, local_ray: str, undisturbed: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_at(tmp_path)
    driver = start_driver(recipe, local_ray)
    before = wait_for_live_work(recipe)
    ingest.run(recipe)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    check(recipe, undisturbed, before)
    assert "another attempt committed" in caplog.text + output


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_five_killed_drivers_in_a_row_lose_and_double_nothing(
    tmp_path: Path, local_ray: str, undisturbed: Manifest, record: Callable[..., None]
) -> None:
    recipe = recipe_at(tmp_path)
    before: dict[int, ShardCommit] = {}
    committed = []
    for _ in range(5):
        driver = start_driver(recipe, local_ray)
        now = wait_for_live_work(recipe, least=len(before) + 1)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert before.items() <= now.items(), "a shard was redone that was committed before"
        before = now
        committed.append(len(before))
    ingest.run(recipe)
    record(kills=5, shards=SHARDS, committed_at_each_kill=committed, digest=images(recipe).require().digest)
    check(recipe, undisturbed, before)
