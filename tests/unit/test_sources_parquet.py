"""Parquet as the hub has it, from rooms: rows come back through a map of columns, faults stay with their row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.data import store
from perceptio.data.masks import masks_to_rle, rle_to_mask
from perceptio.sources import parquet_file
from perceptio.sources.parquet import ParquetReader
from perceptio.sources.record import Found, Item, Refused, SourceError
from schemas.sources import ParquetSource
from schemas.tables import Reason
from tests.sources import box, encoded, good, jpeg, masks, png, refusals, results, unique, write

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub(*files: bytes | None) -> pa.Array:
    return pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(files)], FILE)


def save(path: Path, table: dict[str, Any], rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=rows_per_group)
    return path


def reader(path: Path, columns: dict[str, str] | None = None, **more: Any) -> ParquetReader:
    section = {"format": "parquet", "name": "hub", "path": str(path), "columns": {"image": "image", **(columns or {})}}
    return ParquetReader(ParquetSource.model_validate({**section, **more}))


def test_images_of_the_hub_come_back_with_questions_and_answers(tmp_path: Path) -> None:
    for name, indices in (("data/b.parquet", (2, 3, 4)), ("data/a.parquet", (0, 1))):
        asked = [f"What is {i}?" for i in indices]
        table = {"image": hub(*map(jpeg, indices)), "query": asked, "label": [[f"Room {i}"] for i in indices]}
        save(tmp_path / name, {**table, "unread": [b"\xff"] * len(indices)})
    made = reader(tmp_path / "data", {"question": "query", "answer": "label"})
    found = good(made)
    assert [row.data for row in found] == [jpeg(i) for i in range(5)]
    assert [(t.kind, t.prompt, t.answer) for row in found for t in row.record.turns] == [
        ("vqa", f"What is {i}?", f"Room {i}") for i in range(5)
    ]
    assert [row.uri.removeprefix(f"{tmp_path}/data/") for row in found] == [
        "a.parquet#0", "a.parquet#1", "b.parquet#0", "b.parquet#1", "b.parquet#2"
    ]  # fmt: skip


def test_items_are_ranges_that_stay_inside_row_groups(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", {"image": hub(*[png(0)] * 11)}, rows_per_group=5)
    items = unique(reader(path, rows_per_item=3).items())
    assert [(item.first, item.rows) for item in items] == [(0, 3), (3, 2), (5, 3), (8, 2), (10, 1)]
    assert {item.uri for item in items} == {str(path)}


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), group=st.integers(1, 40), most=st.integers(1, 40), batch=st.integers(1, 9))
def test_every_range_reads_its_own_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, most: int, batch: int
) -> None:
    files = [b"%d" % i for i in range(rows)]
    path = save(tmp_path_factory.getbasetemp() / "ranges.parquet", {"image": hub(*files)}, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_file, "BATCH", batch)
        assert [row.data for row in good(reader(path, rows_per_item=most))] == files


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), FILE])
def test_paths_of_images_are_read_from_their_folder(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "images" / "a.png", png(0))
    values = ["a.png", "gone.png", "../a.png", None]
    column = pa.array([{"bytes": None, "path": v} for v in values] if kind == FILE else values, kind)
    path = save(tmp_path / "a.parquet", {"image": column})
    found, *other = results(reader(path, images=str(tmp_path / "images")))
    assert isinstance(found, Found) and found.data == png(0)
    assert [row.reason for row in other if isinstance(row, Refused)] == [
        Reason.MISSING_FILE, Reason.BAD_RECORD, Reason.MISSING_FILE
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_are_images(tmp_path: Path, kind: pa.DataType) -> None:
    path = save(tmp_path / "a.parquet", {"image": pa.array([png(0), None, b""], kind)})
    first, missing, empty = results(reader(path))
    assert isinstance(first, Found) and first.data == png(0)
    assert isinstance(missing, Refused) and missing.reason == Reason.MISSING_FILE
    assert isinstance(empty, Found) and empty.data == b""


def test_expressions_boxes_and_masks_in_every_form(tmp_path: Path) -> None:
    one, two = masks(0)[:2]
    rle = masks_to_rle(np.stack([one, two]))
    ours = [[dict(code) for code in rle]]
    theirs = [[{"size": [64, 64], "counts": code["counts"]} for code in rle]]
    drawn = [[{"bytes": encoded(m.astype(np.uint8) * 255, "PNG"), "path": None} for m in (one, two)]]
    for column in (ours, theirs, drawn):
        table = {
            "image": hub(png(0)),
            "said": [["The Lamp.", "a chair"]],
            "mask": column,
            "bbox": [[box(one), box(two)]],
        }
        columns = {"expression": "said", "mask": "mask", "box": "bbox", "box_form": "xywh"}
        (row,) = good(reader(save(tmp_path / "a.parquet", table), columns))
        for mask_HW, code, found in zip((one, two), row.record.masks, row.record.boxes, strict=True):
            np.testing.assert_array_equal(rle_to_mask(code), mask_HW)
            y, x = np.nonzero(mask_HW)
            assert found == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert [(turn.kind, turn.expression, turn.objects) for turn in row.record.turns] == [
            ("referring", "the lamp", (0,)), ("referring", "a chair", (1,))
        ]  # fmt: skip


def test_one_object_is_meant_by_all_expressions_and_none_by_none(tmp_path: Path) -> None:
    table = {"image": hub(png(0), png(1)), "said": [["a", "b"], ["c"]], "bbox": [[0.0, 0.0, 5.0, 5.0], None]}
    first, second = good(reader(save(tmp_path / "a.parquet", table), {"expression": "said", "box": "bbox"}))
    assert [turn.objects for turn in first.record.turns] == [(0,), (0,)] and len(first.record.boxes) == 1
    assert [turn.objects for turn in second.record.turns] == [()]


@pytest.mark.parametrize(
    ("values", "columns", "reason", "message"),
    [
        (["a", "", "c"], {"question": "x", "answer": "x"}, Reason.BAD_RECORD, "column 'x' holds ''"),
        ([["a"], [None], []], {"question": "x", "answer": "x"}, Reason.BAD_RECORD, "column 'x' holds None"),
        ([1, 2, None], {"expression": "x"}, Reason.BAD_RECORD, "column 'x' holds 1"),
        (["ok", " . ", None], {"expression": "x"}, Reason.BAD_RECORD, "expression is empty"),
        ([[1.0, 2.0], None, None], {"box": "x"}, Reason.BAD_RECORD, "expected 4 numbers a box"),
        ([["a"], None, None], {"box": "x"}, Reason.BAD_RECORD, "expected 4 numbers a box"),
        ([[1.0, 2.0, 3.0, float("nan")], None, None], {"box": "x"}, Reason.BAD_RECORD, "boxes.0.3"),
        (
            [{"counts": "4", "size": [1]}, None, None],
            {"mask": "x"},
            Reason.BAD_MASK,
            "expected COCO's compressed run lengths",
        ),
        (
            [{"counts": "4", "height": 0, "width": 2}, None, None],
            {"mask": "x"},
            Reason.BAD_RECORD,
            "mask's height is no whole number",
        ),
        ([b"no image", None, None], {"mask": "x"}, Reason.BAD_MASK, "mask cannot be read as an image"),
        ([encoded(np.ones((3, 64), np.uint8), "PNG"), None, None], {"mask": "x"}, Reason.BAD_MASK, "mask is (64, 3)"),
        ([3, None, None], {"mask": "x"}, Reason.MISSING_FILE, "column 'x', mask 0 holds no bytes"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_and_the_others_are_kept(
    tmp_path: Path, values: list[Any], columns: dict[str, str], reason: Reason, message: str
) -> None:
    path = save(tmp_path / "a.parquet", {"image": hub(png(0), png(1), png(2)), "x": values}, 3)
    found = refusals(reader(path, columns))
    assert found and found[0][0] == reason and message in found[0][1]
    assert len(results(reader(path, columns))) == 3 > len(found)


def test_a_mask_for_an_image_that_cannot_be_opened_refuses_its_row(tmp_path: Path) -> None:
    mask = encoded(np.uint8(masks(0)[0]), "PNG")
    path = save(tmp_path / "a.parquet", {"image": hub(b"no image", png(0)), "x": [mask, None]})
    ((reason, message),) = refusals(reader(path, {"mask": "x"}))
    assert reason == Reason.NOT_AN_IMAGE and "no mask can be laid on it" in message
    assert len(results(reader(path, {"mask": "x"}))) == 2


def test_columns_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    table = {"image": hub(png(0)), "q": [["a", "b"]], "a": [["c"]], "b": [[[0.0, 0.0, 1.0, 1.0]] * 3]}
    path = save(tmp_path / "a.parquet", table)
    ((_, message),) = refusals(reader(path, {"question": "q", "answer": "a"}))
    assert "'q' has 2 texts, 'a' 1" in message
    ((_, message),) = refusals(reader(path, {"expression": "q", "box": "b"}))
    assert "'q' has 2 texts for 3 objects" in message


def test_a_text_that_is_no_utf_8_refuses_its_row_alone(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xc3\x28c")]
    )
    path = save(tmp_path / "a.parquet", {"image": hub(png(0), png(1), png(2)), "q": text}, 3)
    rows = results(reader(path, {"question": "q", "answer": "q"}))
    assert [type(row) for row in rows] == [Found, Refused, Found]
    assert "no UTF-8" in rows[1].message  # type: ignore[union-attr]


def test_wrong_columns_are_named_before_anything_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", {"image": ["a.png"], "n": [1]})
    with pytest.raises(SourceError, match=r"columns: '.*a.parquet' has no column 'q', or two; it has image, n"):
        list(reader(path, {"question": "q", "answer": "n"}).items())
    with pytest.raises(SourceError, match=r"columns.image 'image' holds paths: set sources.hub.images"):
        list(reader(path).items())
    with pytest.raises(SourceError, match=r"columns.image 'n' is int64"):
        list(reader(path, {"image": "n"}).items())
    with pytest.raises(ValueError, match="question and answer go together"):
        reader(path, {"question": "n"})
    (tmp_path / "empty").mkdir()
    for name in ("empty", "gone", "gone.parquet"):
        with pytest.raises(SourceError, match=rf"sources.hub.path '.*{name}' is no .parquet file, nor a folder of any"):
            list(reader(tmp_path / name).items())


def test_a_broken_file_is_one_refusal_and_its_neighbours_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", {"image": hub(png(0))})
    whole = save(tmp_path / "c.parquet", {"image": hub(png(1))}).read_bytes()
    for name, data in (("b0", b""), ("b1", b"PAR1"), ("b2", whole[:-9]), ("b3", b"x" * 100)):
        write(tmp_path / f"{name}.parquet", data)
    rows = results(reader(tmp_path))
    assert [type(row) for row in rows] == [Found, Refused, Refused, Refused, Refused, Found]
    assert {reason for reason, _ in refusals(reader(tmp_path))} == {Reason.BAD_RECORD}


def test_a_file_that_changes_after_listing_refuses_each_of_its_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", {"image": hub(*[png(0)] * 5)}, 5)
    made = reader(path)
    (item,) = made.items()
    whole = path.read_bytes()
    for data in (whole[:100], save(tmp_path / "b", {"other": [1] * 5}).read_bytes()):
        path.write_bytes(data)
        assert [row.reason for row in made.read(item) if isinstance(row, Refused)] == [Reason.BAD_RECORD] * 5
    save(path, {"image": hub(png(0), png(1))})
    rows = list(made.read(item))
    assert [type(row) for row in rows] == [Found, Found, Refused, Refused, Refused]
    path.unlink()
    assert [row.reason for row in made.read(item) if isinstance(row, Refused)] == [Reason.MISSING_FILE] * 5


class Flaky:
    """A stored file whose connection breaks at some reads, told by their number."""

    def __init__(self, stream: Any, breaks: Callable[[int], bool]) -> None:
        self.stream, self.breaks, self.reads = stream, breaks, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def close(self) -> None:
        self.stream.close()

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.breaks(self.reads):
            self.stream.read(size // 2)  # lost on the way
            raise ConnectionError("503 slow down")
        return bytes(self.stream.read(size))


def test_a_store_that_fails_is_tried_again_and_never_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.parquet", {"image": hub(*[png(0)] * 9)}, 9)
    made = reader(path)
    whole = results(made)
    (item,) = made.items()
    fs, opened = made.place.fs, made.place.fs.open
    monkeypatch.setattr(store, "FIRST_WAIT", 0.0001)

    def breaking(breaks: Callable[[int], bool]) -> None:
        monkeypatch.setattr(fs, "open", lambda *a, **k: Flaky(opened(*a, **k), breaks))

    breaking(lambda read: bool(read % 3))
    assert results(made) == whole
    for last in range(3):
        breaking(lambda read, last=last: read > last)
        with pytest.raises(store.StoreError, match=r"reading .*a.parquet: the store failed 6 times"):
            list(made.read(item))
    breaking(lambda read: True)
    with pytest.raises(store.StoreError):
        list(made.items())


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_give_items_rows_and_refusals(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.parquet"
    table = {"image": hub(b"one", b"two", b"three"), "q": ["a", "b", "c"]}
    whole = bytearray(save(path, table).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    made = reader(path, {"question": "q", "answer": "q"})
    try:
        rows = results(made)
    except SourceError as error:
        rows = [Refused(Reason.BAD_RECORD, str(error), "")]
    assert all(isinstance(row, Found | Refused) for row in rows)


def test_an_item_that_lies_behind_the_end_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", {"image": hub(png(0))})

    def read() -> Iterator[Found | Refused]:
        return reader(path).read(Item(str(path), first=10**12, rows=2))

    assert [row.message for row in read() if isinstance(row, Refused)] == [
        f"'{path}' has fewer rows than its footer said when it was listed"
    ] * 2
