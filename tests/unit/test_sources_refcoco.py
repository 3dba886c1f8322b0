"""RefCOCO as it was released, written from rooms: every sentence comes back on its object, every fault is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from perceptio.data.masks import rle_to_mask
from perceptio.rooms.questions import ask
from perceptio.sources.coco_file import box_of, rle_of
from perceptio.sources.record import Found, RowError, SourceError
from perceptio.sources.refcoco import RefcocoReader
from schemas.sources import RefcocoSource
from schemas.tables import Reason
from tests.sources import (
    file_name,
    good,
    instances,
    jpeg,
    masks,
    references,
    refusals,
    results,
    room,
    runs,
    unique,
    write,
    write_json,
)

ROOMS = (3, 0, 1)


def lay_out(folder: Path, refs: Any, coco: Any = None, protocol: int = 0, splits_by: str = "unc") -> None:
    for index in ROOMS:
        write(folder / "train2014" / file_name(index), jpeg(index))
    write(folder / "refcoco" / f"refs({splits_by}).p", pickle.dumps(refs, protocol))
    write_json(folder / "refcoco" / "instances.json", coco or instances(ROOMS))


def reader(folder: Path, split: str = "train", splits_by: str = "unc", **more: Any) -> RefcocoReader:
    places = {"path": str(folder / "refcoco"), "images": str(folder / "train2014")}
    section = {"format": "refcoco", "name": "ref", "split": split, "splits_by": splits_by, **places, **more}
    return RefcocoReader(RefcocoSource.model_validate(section))


@pytest.mark.parametrize(("protocol", "splits_by"), [(0, "unc"), (1, "umd"), (2, "google"), (4, "unc")])
def test_each_sentence_is_a_turn_about_its_object(tmp_path: Path, protocol: int, splits_by: str) -> None:
    lay_out(tmp_path, references(ROOMS) + references([1], "val"), protocol=protocol, splits_by=splits_by)
    found = good(reader(tmp_path, splits_by=splits_by))
    assert [row.uri for row in found] == [str(tmp_path / "train2014" / file_name(i)) for i in sorted(ROOMS)]
    for index, row in zip(sorted(ROOMS), found, strict=True):
        assert row.data == jpeg(index)
        asked = {q.expression: q.objects[0] for q in ask(room(index)) if q.kind == "referring" and len(q.objects) == 1}
        assert {turn.expression for turn in row.record.turns} == asked.keys()
        for turn in row.record.turns:
            assert (turn.kind, turn.answer) == ("referring", "Sure.")
            assert turn.prompt == f"Please segment {turn.expression} in this image."
            mask_HW = masks(index)[asked[turn.expression]]
            np.testing.assert_array_equal(rle_to_mask(row.record.masks[turn.objects[0]]), mask_HW)
            y, x = np.nonzero(mask_HW)
            assert row.record.boxes[turn.objects[0]] == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_a_split_has_its_own_images_only(tmp_path: Path) -> None:
    lay_out(tmp_path, references(ROOMS) + references([1], "testA"))
    assert [row.uri[-5] for row in good(reader(tmp_path, "testA"))] == ["1"]
    with pytest.raises(SourceError, match=r"sources.ref.split 'testB' has no ref .* has \['testA', 'train'\]"):
        list(reader(tmp_path, "testB").items())
    assert len(unique(reader(tmp_path).items())) == 3


def test_sentences_are_lower_cased_without_their_full_stop_and_raw_words_stand_in(tmp_path: Path) -> None:
    refs = references([0])[:1]
    refs[0]["sentences"] = [
        {"sent": " The LEFT One. ", "raw": "x", "tokens": [], "sent_id": 0},
        {"sent": "", "raw": "Tür links", "tokens": [], "sent_id": 1},
    ]
    lay_out(tmp_path, refs, protocol=2)
    (row,) = good(reader(tmp_path))
    assert [turn.expression for turn in row.record.turns] == ["the left one", "tür links"]


def test_texts_of_python_2_are_read_as_latin_1(tmp_path: Path) -> None:
    lay_out(tmp_path, [])
    said = {0: rb"S'caf\xe9 \'left\''" + b"\n", 1: b"U\x04caf\xe9", 2: b"V\\u00e9t\xe9\n"}
    for text in said.values():
        ref = b"(lp0\n(dp1\nS'ref_id'\nI7\nsS'ann_id'\nL0L\nsS'image_id'\nI0\nsS'split'\np2\nS'train'\np3\ns"
        data = ref + b"S'sentences'\n(lp4\n(dp5\nS'sent'\n" + text + b"sasa."
        assert pickle.loads(data, encoding="latin1")[0]["ref_id"] == 7  # noqa: S301  # written above
        write(tmp_path / "refcoco" / "refs(unc).p", data)
        (row,) = good(reader(tmp_path))
        expected = pickle.loads(data, encoding="latin1")[0]["sentences"][0]["sent"]  # noqa: S301
        assert "é" in expected and row.record.turns[0].expression == expected


@pytest.mark.parametrize("form", ["runs", "compressed"])
def test_run_lengths_are_read_like_polygons(tmp_path: Path, form: str) -> None:
    written = instances(ROOMS)
    for annotation in written["annotations"]:
        code = runs(masks(annotation["image_id"])[annotation["id"] % 100])
        if form == "compressed":
            code["counts"] = coco.frPyObjects(code, *code["size"])["counts"].decode()
        annotation["segmentation"] = code
    lay_out(tmp_path, references(ROOMS), written)
    by_runs = [row.record for row in good(reader(tmp_path))]
    lay_out(tmp_path, references(ROOMS))
    assert by_runs == [row.record for row in good(reader(tmp_path))]


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"ann_id": 999}, Reason.BAD_RECORD, "ann_id 999 is no annotation of image 0"),
        ({"ann_id": 300}, Reason.BAD_RECORD, "ann_id 300 is no annotation of image 0"),
        ({"image_id": 77}, Reason.BAD_RECORD, "image_id 77 of 1 refs is not in instances.json"),
        ({"sentences": [{"sent": " . ", "raw": "x"}]}, Reason.BAD_RECORD, "sentences[0]: sent is ' . '"),
        ({"sentences": [{"sent": "", "raw": ""}]}, Reason.BAD_RECORD, "sentences[0]: sent is ''"),
        ({"sentences": [{"sent": "x" * 2001}]}, Reason.BAD_RECORD, "up to 2000 characters"),
        ({"sentences": [[1]]}, Reason.BAD_RECORD, "sentences[0]: sent is a list"),
    ],
)
def test_a_ref_that_cannot_be_used_is_refused_and_the_others_are_kept(
    tmp_path: Path, change: dict[str, Any], reason: Reason, message: str
) -> None:
    refs = references(ROOMS)
    mine = next(ref for ref in refs if ref["image_id"] == 0)
    lay_out(tmp_path, [*refs, {**mine, **change, "ref_id": 1000}])
    ((found, text),) = refusals(reader(tmp_path))
    assert found == reason and message in text
    assert len(results(reader(tmp_path))) == 4


def change(part: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def apply(coco: dict[str, Any]) -> None:
        for entry in coco[part]:
            if entry["id"] == 0 or entry.get("image_id") == 0:
                entry.update(fields)

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (change("images", file_name="../x.jpg"), Reason.BAD_RECORD, "file_name '../x.jpg' is outside the folder"),
        (change("images", file_name="gone.jpg"), Reason.MISSING_FILE, "gone.jpg' is not there"),
        (change("images", height=0), Reason.BAD_RECORD, "image 0: height is 0"),
        (change("images", width=10**9), Reason.BAD_RECORD, "image 0: width is 1000000000"),
        (change("annotations", bbox=[1, 2, 3]), Reason.BAD_RECORD, "bbox is a list"),
        (change("annotations", bbox=[1, 2, 3, float("nan")]), Reason.BAD_RECORD, "bbox is a list"),
        (change("annotations", segmentation=[]), Reason.BAD_MASK, "there is no polygon"),
        (change("annotations", segmentation=[[1, 2, 3, 4]]), Reason.BAD_MASK, "no polygon of 3 or more corners"),
        (change("annotations", segmentation=[[1, 2, 3, 4, 5, "6"]]), Reason.BAD_MASK, "a corner is '6'"),
        (change("annotations", segmentation=[[1, 2, 3, 4, 5, 1e8]]), Reason.BAD_MASK, "far outside the image"),
        (change("annotations", segmentation=[[0, 0, 64, 64] * 40_000]), Reason.BAD_MASK, "outline is longer"),
        (change("annotations", segmentation=None), Reason.BAD_MASK, "neither polygons nor run lengths"),
        (change("annotations", segmentation={"counts": [4], "size": [2, 2]}), Reason.BAD_MASK, "size is another"),
        (change("annotations", segmentation={"counts": [4], "size": [64, 64]}), Reason.BAD_MASK, "cover 4 pixels"),
        (change("annotations", segmentation={"counts": [-4, 4100], "size": [64, 64]}), Reason.BAD_MASK, "whole number"),
        (change("annotations", segmentation={"counts": 7, "size": [64, 64]}), Reason.BAD_MASK, "whole numbers"),
    ],
)
def test_an_image_with_a_wrong_entry_is_refused_and_the_others_are_kept(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], reason: Reason, message: str
) -> None:
    coco = instances(ROOMS)
    spoil(coco)
    lay_out(tmp_path, references(ROOMS), coco)
    ((found, text),) = refusals(reader(tmp_path))
    assert found == reason and message in text
    assert len(results(reader(tmp_path))) == 3


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "holds a dict, expected a list of refs"),
        (["x"], "ref 0 is 'x', expected a dict"),
        ([{"ref_id": 1, "ann_id": "1", "image_id": 1}], "ref 0: ann_id is '1', expected a whole number"),
        ([{"ref_id": 1 << 90, "ann_id": 1, "image_id": 1}], "ref_id is a huge whole number"),
        ([{"ref_id": 1, "ann_id": 1, "image_id": 1}], "split is None"),
        ([{"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train"}], "sentences is None"),
    ],
)
def test_refs_of_another_form_are_named(tmp_path: Path, refs: Any, message: str) -> None:
    lay_out(tmp_path, refs)
    with pytest.raises(SourceError, match=message):
        list(reader(tmp_path).items())


def test_a_small_pickle_with_endless_sentences_is_refused(tmp_path: Path) -> None:
    sentences = [{"sent": "x"}] * 1000
    lay_out(tmp_path, [{"ref_id": n, "ann_id": 0, "image_id": 0, "split": "train", "sentences": sentences}
                       for n in range(1000)], protocol=2)  # fmt: skip
    with pytest.raises(SourceError, match="more sentences than bytes"):
        list(reader(tmp_path).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "has no list 'images'"),
        (b'{"images": [3]}', r"images\[0\].id is None"),
        (b'{"images": [{"id": 1}, {"id": 1}]}', r"images\[1\].id is 1, expected a whole number of its own"),
        (b'{"images": []}', "has no list 'annotations'"),
    ],
)
def test_broken_instances_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    lay_out(tmp_path, references(ROOMS))
    write(tmp_path / "refcoco" / "instances.json", text)
    with pytest.raises(SourceError, match=f"sources.ref.path: '.*instances.json'.*{message}"):
        list(reader(tmp_path).items())


def test_missing_and_huge_files_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, references(ROOMS))
    with pytest.raises(SourceError, match=r"refs\(umd\).p' is no file"):
        list(reader(tmp_path, splits_by="umd").items())
    with pytest.raises(SourceError, match=r"bytes, the limit is 10: raise max_file_bytes"):
        list(reader(tmp_path, max_file_bytes=10).items())
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(SourceError, match=r"instances.json' is no file"):
        list(reader(tmp_path).items())


PLAIN = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.lists(st.lists(st.integers(-200, 200) | st.floats(), min_size=6, max_size=8))
CODES = st.fixed_dictionaries(
    {"size": st.just([8, 9]) | PLAIN, "counts": st.lists(st.integers(-1, 80)) | st.text(max_size=9) | PLAIN}
)


@settings(deadline=None, max_examples=300)
@given(segmentation=PLAIN | NUMBERS | CODES, box=PLAIN | st.lists(st.floats() | st.integers(), min_size=4, max_size=4))
def test_any_annotation_is_a_mask_and_a_box_or_refused(segmentation: Any, box: Any) -> None:
    annotation = {"id": 1, "segmentation": segmentation, "bbox": box}
    try:
        assert rle_of(annotation, 8, 9).keys() == {"height", "width", "counts"}
        assert len(box_of(annotation)) == 4
    except RowError as error:
        assert str(error).startswith("annotation 1: ")  # noqa: PT017  # either outcome is right


@settings(deadline=None, max_examples=100)
@given(
    fields=st.dictionaries(st.sampled_from(["ann_id", "image_id", "sentences", "split"]), PLAIN),
    protocol=st.integers(0, 4),
)
def test_any_fields_of_a_ref_are_items_or_refused(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], protocol: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    lay_out(folder, [references([0])[0] | fields, *references([1])], protocol=protocol)
    try:
        rows = results(reader(folder))
    except SourceError as error:
        rows = []
        assert "ref 0" in str(error)  # noqa: PT017
    assert not rows or any(isinstance(row, Found) for row in rows)
