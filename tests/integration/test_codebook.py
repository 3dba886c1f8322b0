"""The codebook stage: learnt by two workers that end with one codebook, on a stated sample, and published whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from perceptio.data.images import encode_depth16
from perceptio.depth.codec import DepthCodec
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import DEPTH, REJECTS
from workflows import codebook
from workflows.commits import Table
from workflows.store import OtherInputsError, StageError, open_root

RECIPE = Path(codebook.__file__).parent / "recipes" / "rooms.yaml"
SMALL = (
    "codebook.image_size=16",
    "codebook.stride=4",
    "codebook.channels=[8, 16]",
    "codebook.codes=8",
    "codebook.dim=8",
    "codebook.steps=120",
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
        maps.append(encode_depth16(np.rint(plane * 65535).astype(np.uint16)))
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose every training source has depth; the held-out source has none, since it must not be read."""
    place = tmp_path_factory.mktemp("root")
    for number, source in enumerate(source for source in recipe_at(place).sources if not source.held_out):
        write_depth(str(place), source.name, shards=1, seed=100 * number)
    codebook.run(recipe_at(place))
    return place


def test_two_workers_learn_one_codebook_that_beats_the_mean_map(root: Path) -> None:
    manifest = open_root(str(root)).manifest("codebook")
    assert manifest is not None
    assert manifest.extra["workers"] == 2  # the stage itself raises where their digests differ
    assert manifest.extra["mae"] < 0.5 * manifest.extra["mean_map_mae"]
    assert manifest.extra["usage"] > 0.5
    assert (manifest.read, manifest.extra["rows"], manifest.extra["held_out_rows"]) == (150, 150, 15)
    assert (manifest.inputs["teacher"], manifest.extra["convention"]) == ("t", "larger = closer")


def test_the_published_folder_is_the_codebook_that_was_measured(root: Path) -> None:
    report = json.loads((root / "codebook" / "report.json").read_text())
    assert DepthCodec.from_pretrained(root / "codebook").digest == report["codebook"]


def test_a_finished_codebook_is_left_alone_and_other_settings_are_refused(root: Path) -> None:
    before = (root / "codebook" / "manifest.json").stat().st_mtime_ns
    codebook.run(recipe_at(root))
    assert (root / "codebook" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(OtherInputsError, match="settings"):
        codebook.run(recipe_at(root, "codebook.codes=9"))


def test_missing_and_mixed_depth_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `depth` first"):
        codebook.run(recipe_at(tmp_path))
    for number, source in enumerate(source for source in recipe_at(tmp_path).sources if not source.held_out):
        write_depth(str(tmp_path), source.name, shards=1, seed=number, teacher=f"teacher-{number % 2}")
    with pytest.raises(StageError, match=r"differ in teacher.*teacher-1"):
        codebook.run(recipe_at(tmp_path))


def test_the_sample_is_drawn_by_seed_and_every_row_belongs_to_one_worker(tmp_path: Path) -> None:
    tables = {name: write_depth(str(tmp_path), name, shards=3, seed=7) for name in ("one", "two")}
    parts = codebook.sample(tables, rows=100, seed=1)
    assert parts == codebook.sample(tables, rows=100, seed=1)
    assert parts != codebook.sample(tables, rows=100, seed=2)
    assert [part.first for part in parts] == [0, 40, 80]
    assert sum(part.rows for part in parts) == 100
    shares = [codebook.load_share(open_root(str(tmp_path)), parts, 16, rank, 3) for rank in range(3)]
    assert sum(len(maps) for maps, _ in shares) == 100
    assert sum(int(held_out.sum()) for _, held_out in shares) == 10
    assert all(abs(len(maps) - 100 / 3) <= 1 for maps, _ in shares)
