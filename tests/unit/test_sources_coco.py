"""COCO instances from rooms: every mask and box comes back, crowds stay out, categories are asked for where clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceptio.data.masks import rle_to_mask
from perceptio.rooms.coco import write_coco
from perceptio.sources.coco import CocoReader
from perceptio.sources.record import SourceError
from schemas.sources import CocoSource
from schemas.tables import Reason
from tests.sources import (
    file_name,
    good,
    instances,
    jpeg,
    masks,
    refusals,
    results,
    room,
    runs,
    unique,
    write,
    write_json,
)

ROOMS = (2, 0)


def lay_out(folder: Path, coco: Any) -> None:
    for index in ROOMS:
        write(folder / "train2017" / file_name(index), jpeg(index))
    write_json(folder / "annotations" / "instances_train2017.json", coco)


def reader(folder: Path, **more: Any) -> CocoReader:
    path, images = folder / "annotations" / "instances_train2017.json", folder / "train2017"
    section = {"format": "coco", "name": "coco", "path": str(path), "images": str(images), **more}
    return CocoReader(CocoSource.model_validate(section))


def test_each_image_has_its_masks_and_boxes_and_no_turns(tmp_path: Path) -> None:
    lay_out(tmp_path, instances(ROOMS))
    found = good(reader(tmp_path))
    assert [row.data for row in found] == [jpeg(0), jpeg(2)]
    for index, row in zip((0, 2), found, strict=True):
        assert row.record.turns == ()
        for mask_HW, rle, box in zip(masks(index), row.record.masks, row.record.boxes, strict=True):
            np.testing.assert_array_equal(rle_to_mask(rle), mask_HW)
            y, x = np.nonzero(mask_HW)
            assert box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
    assert len(unique(reader(tmp_path).items())) == 2


def test_rooms_written_by_the_project_are_read_too(tmp_path: Path) -> None:
    write_coco([room(0), room(1)], tmp_path / "out")
    section = {"path": str(tmp_path / "out" / "instances.json"), "images": str(tmp_path / "out" / "images")}
    source = CocoSource.model_validate({"format": "coco", "name": "coco", **section})
    for index, row in enumerate(good(CocoReader(source))):
        for mask_HW, rle in zip(masks(index), row.record.masks, strict=True):
            np.testing.assert_array_equal(rle_to_mask(rle), mask_HW)


def test_a_category_is_asked_for_where_it_has_one_object_and_no_crowd(tmp_path: Path) -> None:
    coco = instances([0])
    first, second, third, fourth = (dict(coco["annotations"][0], id=n) for n in range(4))
    first["category_id"], second["category_id"], third["category_id"], fourth["category_id"] = 1, 2, 2, 3
    crowd = dict(first, id=9, iscrowd=1, category_id=3, segmentation=runs(masks(0)[0]))
    coco["annotations"] = [second, first, crowd, third, fourth]
    lay_out(tmp_path, coco)
    (row,) = good(reader(tmp_path, turns="category"))
    name = coco["categories"][0]["name"]
    (turn,) = row.record.turns
    assert (turn.kind, turn.expression, turn.objects) == ("referring", name, (1,))
    assert turn.prompt == f"Please segment the {name} in this image."
    assert len(row.record.masks) == len(row.record.boxes) == 4


def test_crowds_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco = instances(ROOMS)
    coco["annotations"].append(dict(coco["annotations"][0], id=999, iscrowd=1, segmentation="not looked at"))
    lay_out(tmp_path, coco)
    with caplog.at_level("INFO"):
        found = good(reader(tmp_path))
    assert [len(row.record.masks) for row in found] == [len(room(i).objects) for i in (0, 2)]
    assert "1 crowd annotations" in caplog.text


def test_an_image_without_annotations_is_kept(tmp_path: Path) -> None:
    lay_out(tmp_path, {**instances(ROOMS), "annotations": []})
    assert [row.record.masks for row in good(reader(tmp_path))] == [(), ()]


@pytest.mark.parametrize(
    ("fields", "message", "rows"),
    [
        ({"image_id": 55}, "annotation 0: image_id 55 is no image", 3),
        ({"image_id": None}, "annotation 0: image_id None is no image", 3),
        ({"category_id": 5000}, "annotation 0: category_id 5000 has no category", 2),
        ({"bbox": "x"}, "annotation 0: bbox is 'x'", 2),
    ],
)
def test_an_annotation_that_cannot_be_used_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str, rows: int
) -> None:
    coco = instances(ROOMS)
    next(entry for entry in coco["annotations"] if entry["id"] == 0).update(fields)
    lay_out(tmp_path, coco)
    ((reason, text),) = refusals(reader(tmp_path, turns="category"))
    assert reason == Reason.BAD_RECORD and message in text
    assert len(results(reader(tmp_path, turns="category"))) == rows


def test_files_without_images_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"images": [], "annotations": [], "categories": []})
    with pytest.raises(SourceError, match="lists no image"):
        list(reader(tmp_path).items())
    with pytest.raises(SourceError, match=r"sources.coco.images '.*gone' is no folder"):
        list(reader(tmp_path, images=str(tmp_path / "gone")).items())
    with pytest.raises(SourceError, match=r"sources.coco.path: '.*gone.json' is no file"):
        list(reader(tmp_path, path=str(tmp_path / "gone.json")).items())
