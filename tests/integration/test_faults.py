"""Faults in the middle of the work: killed actors, drivers and nodes, two drivers at once; nothing lost or doubled.

Every test asserts that the fault met live work: 0 < committed < total.
"""

from __future__ import annotations

import io
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import in_this_process, recipe_of
from faults import (
    RUN,
    TOTAL,
    Markers,
    Undisturbed,
    check,
    kill,
    markers,
    recipe_at,
    second_node,
    shard_actors,
    start_driver,
    tables,
    two_nodes,
    wait_for,
    wait_for_actors,
)
from PIL import Image
from ray.cluster_utils import Cluster

from perceptio.depth.teacher import DepthTeacher
from schemas.recipe import Recipe
from workflows import ingest, requeue, verify
from workflows.commits import Table
from workflows.shards import ShardResult, Work
from workflows.store import Root, open_root
from workflows.verify import problems_of


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, local_ray: str, teacher: Path, put_codebook: Callable[..., None]
) -> Undisturbed:
    recipe = recipe_at(tmp_path_factory.mktemp("undisturbed"), teacher)
    put_codebook(recipe, DepthTeacher.from_pretrained(teacher).digest)
    with in_this_process():
        for run in RUN.values():
            run(recipe)
        verify.run(recipe)
    assert tables(recipe, "ingest")["rooms"].require().rejected > 0, "the pass over doubles had nothing to do"
    return Undisturbed(recipe)


@pytest.fixture(scope="module")
def cluster(local_ray: str) -> Iterator[Cluster]:
    with two_nodes() as started:
        yield started


def killed_actor(recipe: Recipe, stage: str, moment: int) -> Markers:
    """Kills every actor at the moment; the engine itself goes on."""
    found: list[Markers] = []
    killed: list[psutil.Process] = []
    former = shard_actors()

    def kill_when_live() -> None:
        actors = wait_for_actors(former=former)
        found.append(wait_for(recipe, stage, moment, TOTAL[stage]))
        kill(*actors)
        killed.extend(actors)

    killer = threading.Thread(target=kill_when_live)
    killer.start()
    RUN[stage](recipe)
    killer.join()
    assert killed, "no live actor was found to kill"
    return found[0]


def killed_driver(recipe: Recipe, stage: str, moment: int, address: str) -> Markers:
    """Kills the driver at the moment, and runs the stage again."""
    driver = start_driver(recipe, address, stage)
    before = wait_for(recipe, stage, moment, TOTAL[stage])
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert any(table.manifest() is None for table in tables(recipe, stage).values())
    RUN[stage](recipe)
    return before


def killed_node(recipe: Recipe, stage: str, moment: int, cluster: Cluster) -> Markers:
    """Kills the raylet of the second node, with the actor that works there, at the moment; the engine goes on."""
    raylet = second_node(cluster)
    driver = start_driver(recipe, cluster.address, stage)
    actors = wait_for_actors(raylet)
    before = wait_for(recipe, stage, moment, TOTAL[stage])
    kill(raylet, *actors)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    assert len(actors) == 1, "no actor lived on the node that was killed"
    return before


def disturb(request: pytest.FixtureRequest, root: Path, victim: str, stage: str, moment: int) -> int:
    """Rows that were done after the fault."""
    undisturbed: Undisturbed = request.getfixturevalue("undisturbed")
    pool = {"min_actors": 2, "max_actors": 2} if victim == "node" else {}
    settings = {f"{stage}__pool__{name}": count for name, count in pool.items()}
    recipe = undisturbed.start_at(root, stage, **settings)
    if victim == "node":
        before = killed_node(recipe, stage, moment, request.getfixturevalue("cluster"))
    elif victim == "driver":
        before = killed_driver(recipe, stage, moment, request.getfixturevalue("local_ray"))
    else:
        before = killed_actor(recipe, stage, moment)
    return check(recipe, undisturbed, stage, before, new_driver=victim == "driver")


def drawn(seed: int, stages: tuple[str, ...] = tuple(RUN)) -> tuple[str, int]:
    """Stage and moment, in markers, of a fault."""
    draw = random.Random(seed)
    stage = draw.choice(stages)
    return stage, draw.randint(6, TOTAL[stage] // 2)  # the first shards of rooms have only doubles


@pytest.mark.parametrize(("victim", "seed"), [("actor", 2), ("driver", 0), ("node", 6)])
def test_after_a_kill_the_rows_are_those_of_an_undisturbed_run(
    tmp_path: Path, request: pytest.FixtureRequest, victim: str, seed: int
) -> None:
    disturb(request, tmp_path, victim, *drawn(seed))


def test_the_seeds_of_the_short_test_cover_every_stage() -> None:
    assert {drawn(seed)[0] for seed in (2, 0, 6)} == set(RUN)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_twelve_killed_actors_lose_and_double_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, record: Callable[..., None]
) -> None:
    prove(tmp_path, request, record, "actor")


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_twelve_killed_drivers_lose_and_double_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, record: Callable[..., None]
) -> None:
    prove(tmp_path, request, record, "driver")


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_twelve_killed_nodes_lose_and_double_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, record: Callable[..., None]
) -> None:
    prove(tmp_path, request, record, "node")


def prove(folder: Path, request: pytest.FixtureRequest, record: Callable[..., None], victim: str) -> None:
    """Four faults a stage, at moments of their own; keeps what was found."""
    faults = []
    for seed in range(12):
        stage, moment = drawn(100 + seed, (tuple(RUN)[seed % 3],))
        redone = disturb(request, folder / str(seed), victim, stage, moment)
        faults.append({"stage": stage, "moment": moment, "of": TOTAL[stage], "rows_done_after": redone})
        record(victim=victim, faults=faults)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_five_killed_drivers_in_a_row_lose_and_double_nothing(
    tmp_path: Path, local_ray: str, undisturbed: Undisturbed, record: Callable[..., None]
) -> None:
    recipe = undisturbed.start_at(tmp_path, "ingest")
    before: Markers = {}
    committed = []
    for _ in range(5):
        driver = start_driver(recipe, local_ray, "ingest")
        now = wait_for(recipe, "ingest", len(before) + 1, TOTAL["ingest"])
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        assert before.items() <= now.items(), "a shard was redone that was committed before"
        before = now
        committed.append(len(before))
    ingest.run(recipe)
    redone = check(recipe, undisturbed, "ingest", before, new_driver=True)
    record(kills=5, markers=TOTAL["ingest"], committed_at_each_kill=committed, rows_done_after_the_last=redone)


class DiesBeforeItsMarker(ingest.IngestWorker):
    """Kills its process, once, after the rows of a shard were written and before their marker is."""

    def __init__(self, recipe: str, forgotten: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, forgotten)
        self.done = Path(Recipe.model_validate_json(recipe).root) / "killed_once"

    def process(self, work: Work) -> ShardResult:
        if work.source == "rooms" and work.shard == 7 and not self.done.exists():
            self.done.touch()
            Root.create = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return super().process(work)


def test_an_actor_that_dies_between_rows_and_marker_leaves_nothing(
    tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = undisturbed.start_at(tmp_path, "ingest")
    monkeypatch.setattr(ingest, "IngestWorker", DiesBeforeItsMarker)
    left: list[list[str]] = []
    clean = Table.clean

    def look(table: Table, commits: object = None) -> list[str]:
        left.append([name for name in table.unnamed() if name.startswith("part-000007-")])
        return clean(table)

    monkeypatch.setattr(Table, "clean", look)
    ingest.run(recipe)
    assert (tmp_path / "killed_once").exists()
    assert sum(map(len, left)) == 1, "the killed attempt's rows were not on the disk"
    check(
        recipe, undisturbed, "ingest", {path: t for path, t in markers(recipe, "ingest").items() if "000001." in path}
    )


DIES_BEFORE_THE_MANIFEST = """
import os, signal, sys
from schemas.recipe import Recipe
from workflows import commits, depth
commits.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
depth.run(Recipe.model_validate_json(sys.argv[1]))
"""


def test_a_driver_that_dies_between_the_last_marker_and_the_manifest_is_finished_without_any_work(
    tmp_path: Path, local_ray: str, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = undisturbed.start_at(tmp_path, "depth")
    driver = start_driver(recipe, local_ray, script=DIES_BEFORE_THE_MANIFEST)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == -signal.SIGKILL, output
    before = markers(recipe, "depth")
    assert len(before) == TOTAL["depth"] and tables(recipe, "depth")["rooms"].manifest() is None
    RUN["depth"](recipe)
    assert markers(recipe, "depth") == before
    for source, table in tables(recipe, "depth").items():
        assert table.require().digest == undisturbed.manifest("depth", source).digest
        assert table.require().extra["rows_done"] == 0


def test_a_requeue_whose_driver_is_killed_is_finished_by_the_next_one(tmp_path: Path, local_ray: str) -> None:
    folder, shards = tmp_path / "photos", 24
    folder.mkdir()
    files = {f"{i:02d}.png": photograph(i) for i in range(2 * shards)}
    for i, (name, data) in enumerate(files.items()):  # one of each shard's two cannot be read at first
        (folder / name).write_bytes(data if i % 2 else data[: len(data) // 2])
    source = {"name": "photos", "format": "folder", "path": str(folder)}
    recipe = recipe_of(tmp_path / "root", [source], ingest__rows_per_shard=2)
    with in_this_process():
        ingest.run(recipe)
    table = Table(open_root(recipe.root), "images", "photos")
    assert table.require().rejected == shards
    for name, data in files.items():
        (folder / name).write_bytes(data)
    driver = start_driver(recipe, local_ray, "requeue", "truncated_image")
    wait_for(recipe, "ingest", shards + 3, 2 * shards)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = {shard: commit for shard, commit in table.committed().items() if commit.revision == 1}
    assert 0 < len(before) < shards and table.manifest() is None
    requeue.run(recipe, "truncated_image")
    after = table.require()
    assert [commit.revision for commit in after.shards] == [1] * shards and after.rejected == 0
    assert {shard: after.shards[shard] for shard in before} == before, "a shard was tried again that was mended before"
    whole = recipe_of(tmp_path / "whole", [source], ingest__rows_per_shard=2)
    with in_this_process():
        ingest.run(whole)
    assert after.digest == Table(open_root(whole.root), "images", "photos").require().digest
    assert problems_of(table) == []


def photograph(seed: int) -> bytes:
    """A picture that takes some milliseconds to read."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (400, 600, 3)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("stage", ["ingest", "depth"])
def test_of_two_drivers_at_once_the_loser_says_so_and_every_shard_is_done_once(
    tmp_path: Path, local_ray: str, undisturbed: Undisturbed, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    recipe = undisturbed.start_at(tmp_path, stage)
    driver = start_driver(recipe, local_ray, stage)
    wait_for(recipe, stage, 1, TOTAL[stage])
    slow = shard_actors()
    for actor in slow:  # in the middle of a shard, which the second driver does meanwhile
        actor.suspend()
    before = markers(recipe, stage)
    assert slow and 0 < len(before) < TOTAL[stage] - 1 and driver.poll() is None

    def wake() -> None:
        wait_for(recipe, stage, len(before) + 1, TOTAL[stage])
        for actor in slow:
            actor.resume()

    waker = threading.Thread(target=wake)
    waker.start()
    RUN[stage](recipe)
    waker.join()
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    check(recipe, undisturbed, stage, before)
    attempts = {c.attempt.rpartition("-")[0] for t in tables(recipe, stage).values() for c in t.committed().values()}
    assert len(attempts) >= 2, "only one of the two committed anything"
    assert "another attempt committed" in caplog.text + output
