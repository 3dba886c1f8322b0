"""The masks stage on a real local Ray: pseudo-masks from boxes, recorded masks untouched, poor ones refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from conftest import in_this_process

from perceptio.data.images import decode
from perceptio.data.masks import rle_to_mask
from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from perceptio.segmentation.teacher import MaskTeacher
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import IMAGES, Reason
from workflows import ingest, masks
from workflows.commits import Table
from workflows.pool import TooManyRejectsError
from workflows.shards import Work
from workflows.store import OtherInputsError, open_root

ROOMS = Path(masks.__file__).parent / "recipes" / "rooms.yaml"
SOURCES = (
    "[{name: exact, format: rooms, count: 3, size: 64, seed: 1, questions: [referring], exact_masks: true},"
    " {name: boxes, format: rooms, count: 5, size: 64, seed: 2, questions: [referring], exact_masks: false}]"
)
ENTRY = "[{source: exact, weight: 1, kinds: [referring], segmentation: true, depth: false}]"


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with ingested rooms, and a random SAM2 beside it: its masks are poor, but they are its own."""
    folder = tmp_path_factory.mktemp("masks")
    torch.manual_seed(0)
    config = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    Sam2ImageModel(config).save_pretrained(folder / "sam2")
    with in_this_process():
        ingest.run(recipe(folder))
    return folder


def recipe(folder: Path, *, min_iou: float = 0.0, limit: float = 1.0) -> Recipe:
    overrides = [
        f"sources={SOURCES}",
        f"train.mixture={ENTRY}",
        "ingest.rows_per_shard=3",
        f"masks.teacher={folder / 'sam2'}",
        f"masks.min_predicted_iou={min_iou}",
        "masks.min_stability=0",
        f"max_reject_share={limit}",
        "cluster.min_memory_gb=1",
    ]
    return load_recipe(ROOMS, overrides=overrides, root=str(folder / "root"))


def rows(folder: Path, table: str, source: str) -> list[dict]:
    found = Table(open_root(str(folder / "root")), table, source)
    return [row for shard in sorted(found.committed()) for row in found.read_shard(shard).to_pylist()]


def test_boxes_become_masks_recorded_masks_stay_and_poor_ones_are_refused(folder: Path) -> None:
    masks.run(recipe(folder))
    exact, images = rows(folder, "masks", "exact"), rows(folder, "images", "exact")
    assert [row["masks"] for row in exact] == [row["masks"] for row in images]
    assert all(row["recorded"] and set(row["predicted_iou"]) == {1.0} for row in exact)

    boxes = rows(folder, "images", "boxes")
    drawn = rows(folder, "masks", "boxes")
    assert [row["id"] for row in drawn] == [row["id"] for row in boxes]
    for row, image in zip(drawn, boxes, strict=True):
        assert not row["recorded"] and not image["masks"]
        assert len(row["masks"]) == len(row["stability"]) == len(image["boxes"])
        assert all(rle_to_mask(rle).shape == (64, 64) for rle in row["masks"])
        assert all(0 <= value <= 1 for value in [*row["predicted_iou"], *row["stability"]])

    manifest = Table(open_root(str(folder / "root")), "masks", "boxes").require()
    assert (manifest.read, manifest.kept, manifest.rejected) == (5, 5, 0)
    assert "mask teacher" in {licence.part for licence in manifest.licences}

    with pytest.raises(OtherInputsError, match="settings"):
        masks.run(recipe(folder, min_iou=0.5))


def test_an_object_with_a_click_and_no_box_is_drawn_from_the_click(folder: Path) -> None:
    image = rows(folder, "images", "boxes")[0]
    box = image["boxes"][0]
    click = {"x": (box["x0"] + box["x1"]) / 2, "y": (box["y0"] + box["y1"]) / 2}
    clicked = pa.Table.from_pylist([image | {"boxes": [], "clicks": [click], "turns": []}], schema=IMAGES)
    made = masks.MaskWorker(str(folder / "sam2"), 0.0, 0.0, 1).drawn(clicked.select(masks.COLUMNS))
    rgb_HW3 = decode(image["image"], masks.STORED)
    expected = MaskTeacher.from_pretrained(folder / "sam2")(rgb_HW3, [], [(click["x"], click["y"])])
    found = made.table.to_pylist()[0]
    assert not found["recorded"] and len(found["masks"]) == 1
    assert (rle_to_mask(found["masks"][0]) == expected[0].mask_HW).all()


def test_low_quality_is_a_reject_with_its_figures_and_too_many_fail_the_stage(folder: Path) -> None:
    named = rows(folder, "masks", "boxes")
    limit = float(np.median([min(row["predicted_iou"]) for row in named])) + 1e-6
    worker = masks.MaskWorker(str(folder / "sam2"), limit, 0.0, 1)
    table, over = (Table(open_root(str(folder / "root")), name, "boxes") for name in ("masks", "images"))
    results = [worker.process(Work(table, over, shard, {})) for shard in (0, 1)]
    rejects = [reject for result in results for reject in result.rejects]
    assert sum(result.read for result in results) == 5 == sum(r.table.num_rows for r in results) + len(rejects)
    assert rejects and all(r.reason is Reason.LOW_MASK_QUALITY and "predicted IoU" in r.message for r in rejects)

    Table(open_root(str(folder / "root")), "masks", "boxes").require()
    fresh = recipe(folder, min_iou=1.0, limit=0.5)
    for source in ("exact", "boxes"):
        for path in (folder / "root" / "masks" / source).rglob("*"):
            path.unlink(missing_ok=True) if path.is_file() else None
    with in_this_process(), pytest.raises(TooManyRejectsError, match="low_mask_quality"):
        masks.run(fresh)
