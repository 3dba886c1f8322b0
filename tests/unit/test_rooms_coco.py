"""Rooms on disk are read by COCO's own reader, and hold exactly what was rendered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from perceptio.rooms.coco import write_coco
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Room


@pytest.fixture(scope="module")
def rooms() -> list[Room]:
    return [render_room(2, i, 64) for i in range(4)]


@pytest.fixture(scope="module")
def folder(rooms: list[Room], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rooms") / "out"
    assert write_coco(iter(rooms), out, split="val") == 4
    return out


def test_coco_reads_it_and_every_mask_matches(rooms: list[Room], folder: Path) -> None:
    coco = COCO(str(folder / "instances.json"))
    assert sorted(coco.getImgIds()) == [room.index for room in rooms]
    for room in rooms:
        found = coco.loadAnns(coco.getAnnIds(imgIds=[room.index]))
        assert len(found) == len(room.objects)
        for o, annotation in zip(room.objects, found, strict=True):
            mask_HW = room.instance_HW == o.index
            np.testing.assert_array_equal(coco.annToMask(annotation), mask_HW)
            y, x = np.nonzero(mask_HW)
            assert annotation["area"] == len(x)
            assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert coco.loadCats(annotation["category_id"])[0]["name"] == o.kind


def test_pictures_and_depth_come_back_exactly(rooms: list[Room], folder: Path) -> None:
    for room in rooms:
        name = f"{room.index:012d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "images" / name)), room.rgb_HW3)
        depth_HW = np.asarray(Image.open(folder / "depth" / name))
        assert depth_HW.dtype == np.uint16
        np.testing.assert_allclose(depth_HW / 1000, room.depth_HW, atol=0.0006)


def test_refs_have_refcoco_s_fields_and_point_at_the_object_meant(rooms: list[Room], folder: Path) -> None:
    refs = json.loads((folder / "refs(unc).json").read_text())
    coco = COCO(str(folder / "instances.json"))
    asked = {(room.index, q.expression): q.objects[0] for room in rooms for q in ask(room)
             if q.kind == "referring" and len(q.objects) == 1}  # fmt: skip
    sentences = [(ref, sentence) for ref in refs for sentence in ref["sentences"]]
    assert len(sentences) == len(asked)
    assert len({s["sent_id"] for _, s in sentences}) == len(sentences)
    assert [ref["ref_id"] for ref in refs] == list(range(1, len(refs) + 1))
    for ref, sentence in sentences:
        assert sentence["sent_id"] in ref["sent_ids"] and sentence["tokens"] == sentence["sent"].split()
        assert ref["split"] == "val"
        annotation = coco.loadAnns(ref["ann_id"])[0]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        room = rooms[ref["image_id"]]
        np.testing.assert_array_equal(
            coco.annToMask(annotation), room.instance_HW == asked[room.index, sentence["sent"]]
        )


def test_every_question_is_a_line_and_its_picture_exists(rooms: list[Room], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == sum(len(ask(room)) for room in rooms)
    assert all((folder / line["image"]).is_file() for line in lines)
    assert len({line["question_id"] for line in lines}) == len(lines)
    assert any(line["image"].startswith("points/") for line in lines)


def test_a_folder_in_use_and_a_double_index_are_refused(rooms: list[Room], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="give an empty folder"):
        write_coco(rooms, folder)
    with pytest.raises(ValueError, match="two rooms have the index 0"):
        write_coco([rooms[0], rooms[0]], tmp_path)
