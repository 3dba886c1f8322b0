"""A training of one to two workers on two machines, of which one is announced to go, goes, and is replaced."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import start_driver, two_nodes
from ray.cluster_utils import Cluster
from trainings import TRAIN_DRIVER, lines_of, prepared, run_of, series, wait_for_step

from schemas.recipe import Recipe
from tests.tiny import tiny_parts
from workflows import train
from workflows.checkpoints import places
from workflows.store import open_root

STEPS, EVERY = 80, 10
SIZES = {"train__steps": STEPS, "train__checkpoint_every": EVERY, "train__keep_checkpoints": STEPS}


@pytest.fixture(scope="module")
def cluster(local_ray: str) -> Iterator[Cluster]:
    with two_nodes() as started:
        yield started


def wait_for_workers(recipe: Recipe, count: int, since: int, seconds: float = 240) -> int:
    """The first step after `since` that so many workers took."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for line in lines_of(recipe):
            if line["step"] > since and line["workers"] == count:
                return int(line["step"])
        time.sleep(0.1)
    raise AssertionError(f"no step after {since} by {count} workers within {seconds} s")


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_workers_come_and_go_and_the_samples_stay(
    tmp_path: Path, cluster: Cluster, record: Callable[..., None]
) -> None:
    parts = tmp_path / "parts"
    tiny_parts(parts)
    steady = prepared(tmp_path / "steady", parts, **SIZES)
    train.run(steady)
    recipe = prepared(tmp_path / "elastic", parts, **SIZES, train__workers=[1, 2], train__resize_every_s=2)
    driver = start_driver(recipe, cluster.address, script=TRAIN_DRIVER)
    root = open_root(recipe.root)
    announced = wait_for_step(recipe, EVERY + 2)
    (second,) = cluster.worker_nodes
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id"]
    drain += [second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
    subprocess.run([*drain, "--deadline-remaining-seconds", "60"], check=True, capture_output=True, timeout=60)
    run = run_of(recipe)
    assert run is not None
    end = time.monotonic() + 60
    while not (last := [place for place in places(root, run) if place.step % EVERY]):
        assert time.monotonic() < end, "no checkpoint in the time of grace"
        time.sleep(0.1)
    assert last[0].step >= announced
    psutil.Process(second.all_processes["raylet"][0].process.pid).kill()
    alone = wait_for_workers(recipe, 1, last[0].step)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    together = wait_for_workers(recipe, 2, alone)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert EVERY < announced <= last[0].step < alone < together <= STEPS
    assert [line[:2] for line in series(recipe)] == [line[:2] for line in series(steady)]
    found, expected = ([loss for *_, loss in series(of)] for of in (recipe, steady))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    record(steps=STEPS, announced_after=announced, saved_after=last[0].step, alone_from=alone, together_from=together)
