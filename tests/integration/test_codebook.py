"""The codebook stage: two workers end with one codebook, on a stated sample, published whole, whatever dies meanwhile.

Every test of a fault asserts that it met live work: a saved state stood and steps remained.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from conftest import CHECKOUT
from PIL import Image

from perceptio.data.maps import pack_map
from perceptio.depth.codec import DepthCodec
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import DEPTH, REJECTS
from workflows import codebook, stage_report
from workflows.codebook_sample import Part, load_share, sample
from workflows.commits import Table
from workflows.store import OtherInputsError, StageError, open_root

RECIPE = Path(codebook.__file__).parent / "recipes" / "rooms.yaml"
STEPS, EVERY = 300, 75
DRIVER = """
import logging, sys
from schemas.recipe import Recipe
from workflows import codebook
logging.basicConfig(level=logging.INFO)
codebook.run(Recipe.model_validate_json(sys.argv[1]))
"""
SMALL = (
    "codebook.image_size=16",
    "codebook.stride=4",
    "codebook.channels=[8, 16]",
    "codebook.codes=8",
    "codebook.dim=8",
    f"codebook.steps={STEPS}",
    f"codebook.checkpoint_every={EVERY}",
    "codebook.global_batch=16",
    "codebook.gradient_weight=0.1",
    "codebook.learning_rate=0.005",
    "codebook.sample_rows=150",
)


def tilted_planes(count: int, seed: int) -> list[bytes]:
    """16-bit maps of planes tilted every way: simple, and nothing like their mean."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:24j, 0:1:24j]
    maps = []
    for angle in rng.uniform(0, 2 * np.pi, count):
        plane = np.cos(angle) * x + np.sin(angle) * y
        plane = (plane - plane.min()) / (plane.max() - plane.min())
        maps.append(pack_map(np.rint(plane * 65535).astype(np.uint16)))
    return maps


def write_depth(root: str, source: str, shards: int, seed: int, teacher: str = "t") -> Manifest:
    """A finished depth table, 40 maps a shard, as `depth` leaves it."""
    table = Table(open_root(root), "depth", source)
    for shard in range(shards):
        ids = [f"{source}-{shard}-{row}" for row in range(40)]
        rows = {"id": ids, "inv_depth": tilted_planes(40, seed + shard), "raw_min": [0.0] * 40, "raw_max": [1.0] * 40}
        table.commit(shard, "a", pa.table(rows, schema=DEPTH), REJECTS.empty_table(), 40)
    inputs = {"teacher": teacher, "convention": "larger = closer"}
    return table.finish(table.committed(), attempt="a", recipe="r", code="c", inputs=inputs)


def recipe_at(root: Path, *overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides=[*SMALL, *overrides], root=str(root))


@pytest.fixture(scope="module", autouse=True)
def ray_stops() -> Iterator[None]:
    yield
    ray.shutdown()


def filled(root: Path) -> Recipe:
    """A recipe whose training sources have depth; the held-out source has none, since it must not be read."""
    recipe = recipe_at(root)
    for number, source in enumerate(source for source in recipe.sources if not source.held_out):
        write_depth(str(root), source.name, shards=1, seed=100 * number)
    return recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the codebook of a run that nothing disturbed."""
    place = tmp_path_factory.mktemp("root")
    codebook.run(filled(place))
    return place


def standing(root: Path) -> Manifest:
    manifest = open_root(str(root)).manifest("codebook")
    assert manifest is not None
    return manifest


def test_two_workers_learn_one_codebook_that_beats_the_mean_map(root: Path) -> None:
    manifest = standing(root)
    assert manifest.extra["workers"] == 2  # the stage itself raises where their digests differ
    assert manifest.extra["mae"] < 0.5 * manifest.extra["mean_map_mae"]
    assert manifest.extra["usage"] > 0.5
    assert (manifest.read, manifest.extra["rows"], manifest.extra["held_out_rows"]) == (150, 150, 15)
    assert (manifest.inputs["teacher"], manifest.extra["convention"]) == ("t", "larger = closer")
    assert manifest.extra["resumed_at"] == []
    assert not list((root / "runs").iterdir())


def test_the_published_folder_is_the_codebook_that_was_measured(root: Path) -> None:
    report = json.loads((root / "codebook" / "report.json").read_text())
    digest = DepthCodec.from_pretrained(root / "codebook").digest
    assert digest == report["codebook"] == standing(root).digest  # named by itself, not by its pictures


def test_the_report_counts_every_code_and_pictures_the_best_and_the_worst(root: Path) -> None:
    report = json.loads((root / "codebook" / "report.json").read_text())
    assert len(report["code_counts"]) == 8
    assert sum(report["code_counts"]) == 15 * (16 // 4) ** 2
    assert report["usage"] == sum(count > 0 for count in report["code_counts"]) / 8
    shown = {group: [row["mae"] for row in rows] for group, rows in report["shown"].items()}
    assert [len(maes) for maes in shown.values()] == [4, 4, 4]
    assert max(shown["best"]) <= min(shown["median"]) <= max(shown["median"]) <= min(shown["worst"])
    assert shown["best"][0] < report["mae"] < shown["worst"][-1]
    with Image.open(root / "codebook" / "reconstructions.png") as sheet:
        assert sheet.width > 9 * 128 and sheet.height > 4 * 128


def test_the_manifest_states_the_very_rows_of_the_sample(root: Path) -> None:
    stated = standing(root).extra["sample"]
    assert sum(part["rows"] for part in stated) == 150
    for part in stated:
        commit = Table(open_root(str(root)), "depth", part["source"]).find(part["shard"])
        assert commit is not None and part["content"] == commit.content


def test_a_finished_codebook_is_left_alone_and_other_settings_are_refused(root: Path) -> None:
    before = (root / "codebook" / "manifest.json").stat().st_mtime_ns
    codebook.run(recipe_at(root))
    codebook.run(recipe_at(root, "codebook.checkpoint_every=7"))
    assert (root / "codebook" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(OtherInputsError, match="settings"):
        codebook.run(recipe_at(root, "codebook.codes=9"))


def test_depth_that_is_added_later_leaves_a_finished_codebook_valid(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grown = tmp_path / "root"
    shutil.copytree(root, grown)
    write_depth(str(grown), "points", shards=2, seed=200)
    with caplog.at_level(logging.INFO):
        codebook.run(recipe_at(grown))
    assert standing(grown) == standing(root)
    assert (
        "codebook: complete; its 150 maps were drawn when the depth tables held 200, they hold 240 now" in caplog.text
    )


def wait_for_live_run(root: Path, seconds: float = 400) -> int:
    """The step of the last saved state as soon as there is one; fails where the training was over before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in root.glob("runs/codebook-*/checkpoint_manager_snapshot.json"):
            try:
                latest = json.loads(path.read_text())["latest_checkpoint_result"]
            except json.JSONDecodeError:
                continue  # it is being written
            step = int(latest["metrics"]["step"])
            assert 0 < step < STEPS, "the fault came too late to hit live work"
            return step
        time.sleep(0.01)
    raise AssertionError(f"no state was saved within {seconds} s")


def training_workers() -> list[psutil.Process]:
    """The live training workers among the processes that this test session started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def check_resumed(root: Path, undisturbed: Path, at_least: int) -> None:
    """The same files as undisturbed, from a run that went on at a saved state."""
    manifest, expected = standing(root), standing(undisturbed)
    assert manifest.digest == expected.digest
    assert manifest.files == expected.files  # with report and pictures
    resumed_at = manifest.extra["resumed_at"]
    assert resumed_at and at_least <= resumed_at[-1] < STEPS
    assert not list((root / "runs").iterdir())


def test_a_killed_worker_ends_in_the_same_codebook(root: Path, tmp_path: Path) -> None:
    recipe, fault = filled(tmp_path), dict[str, int]()

    def kill_when_live() -> None:
        step = wait_for_live_run(tmp_path)
        victim = training_workers()[-1]
        victim.send_signal(signal.SIGKILL)
        fault["step"] = step

    killer = threading.Thread(target=kill_when_live)
    killer.start()
    codebook.run(recipe)
    killer.join()
    assert fault, "no live worker was killed"
    check_resumed(tmp_path, root, fault["step"])


def start_driver(recipe: Recipe, address: str) -> subprocess.Popen[str]:
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    command = [sys.executable, "-c", DRIVER, recipe.model_dump_json()]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_after_a_killed_driver_the_run_goes_on_and_ends_in_the_same_codebook(
    root: Path, tmp_path: Path, local_ray: str
) -> None:
    recipe = filled(tmp_path)
    driver = start_driver(recipe, local_ray)
    step = wait_for_live_run(tmp_path)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "codebook").exists()
    codebook.run(recipe)
    check_resumed(tmp_path, root, step)


def test_of_two_drivers_at_once_one_publishes_and_the_other_says_so(
    root: Path, tmp_path: Path, local_ray: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = filled(tmp_path)
    driver = start_driver(recipe, local_ray)
    wait_for_live_run(tmp_path)
    codebook.run(recipe)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    assert (caplog.text + output).count("published one first") == 1
    assert (standing(tmp_path).digest, standing(tmp_path).files) == (standing(root).digest, standing(root).files)
    codec = DepthCodec.from_pretrained(tmp_path / "codebook")
    assert codec.digest == standing(root).digest


def test_missing_and_mixed_depth_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `depth` first"):
        codebook.run(recipe_at(tmp_path))
    for number, source in enumerate(source for source in recipe_at(tmp_path).sources if not source.held_out):
        write_depth(str(tmp_path), source.name, shards=1, seed=number, teacher=f"teacher-{number % 2}")
    with pytest.raises(StageError, match=r"differ in teacher.*teacher-1"):
        codebook.run(recipe_at(tmp_path))


def test_a_sample_that_is_too_small_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(StageError, match=r"has 19 maps \(codebook\.sample_rows\), expected at least 10 for each"):
        codebook.run(recipe_at(tmp_path, "codebook.sample_rows=19"))


def test_the_sample_is_drawn_by_seed_and_every_row_belongs_to_one_worker(tmp_path: Path) -> None:
    tables = {name: write_depth(str(tmp_path), name, shards=3, seed=7) for name in ("one", "two")}
    parts = sample(tables, rows=100, seed=1)
    assert parts == sample(tables, rows=100, seed=1)
    assert parts != sample(tables, rows=100, seed=2)
    assert [part.first for part in parts] == [0, 40, 80]
    assert sum(part.rows for part in parts) == 100
    shares = [load_share(open_root(str(tmp_path)), parts, 16, rank, 3) for rank in range(3)]
    assert [len(share.train_RSS) for share in shares] == [30, 30, 30]
    assert [len(share.held_out_RSS) for share in shares] == [4, 3, 3]
    names = {name for share in shares for name in share.names}
    expected = {n for n in range(100) if n % 10 == 9}
    assert names == {f"{p.source}/{p.source}-{p.shard}-{n - p.first}" for p in parts for n in expected if n in span(p)}
    whole = load_share(open_root(str(tmp_path)), parts, 16, 0, 1)
    assert all((share.train_RSS == whole.train_RSS[rank::3]).all() for rank, share in enumerate(shares))
    assert all((share.held_out_RSS == whole.held_out_RSS[rank::3]).all() for rank, share in enumerate(shares))


def span(part: Part) -> range:
    return range(part.first, part.first + part.rows)


def test_its_page_shows_usage_history_and_the_contact_sheet(root: Path) -> None:
    page = Path(stage_report.run(recipe_at(root), "codebook")).read_text(encoding="utf-8")
    extra = open_root(str(root)).manifest("codebook").extra  # type: ignore[union-attr]
    told = [int(n.replace(",", "")) for n in re.findall(r"<title>code \d+: ([\d,]+)</title>", page)]
    assert told == extra["code_counts"] and sum(told) > 0
    assert page.count('class="smooth"') == 3 and f"MAE {extra['mae']:.4f}" in page
    assert page.count("data:image/png;base64,") == 1
