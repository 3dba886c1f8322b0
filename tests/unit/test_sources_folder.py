"""Plain folders with and without records: what is listed, what is refused, and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.sources.folder import FolderReader
from perceptio.sources.record import Found, Item, SourceError
from schemas.sources import FolderSource
from schemas.tables import Reason
from tests.sources import good, jpeg, png, refusals, results, unique, write

TURN = {"kind": "vqa", "prompt": "What is it?", "answer": "A room."}


def reader(folder: Path) -> FolderReader:
    return FolderReader(FolderSource(format="folder", name="mine", path=str(folder)))


def lines(folder: Path, *records: object) -> None:
    texts = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    write(folder / "records.jsonl", b"\n".join(texts))


def test_images_come_by_path_with_their_records(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.PNG", png(0))
    write(tmp_path / "b-a.jpg", jpeg(1))
    write(tmp_path / "a.png", png(2))
    write(tmp_path / "notes.txt", b"no image")
    lines(tmp_path, {"image": "./b/2.PNG", "turns": [TURN], "boxes": [[0, 0, 5, 5]]}, b"", {"image": "a.png"})
    found = good(reader(tmp_path))
    assert [row.uri for row in found] == [str(tmp_path / name) for name in ("a.png", "b-a.jpg", "b/2.PNG")]
    assert [row.data for row in found] == [png(2), jpeg(1), png(0)]
    assert [[turn.answer for turn in row.record.turns] for row in found] == [[], [], ["A room."]]
    assert found[2].record.boxes == ((0, 0, 5, 5),) and found[0].recorded_depth is None


def test_items_have_sizes_and_ids_of_their_own_that_stay(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    lines(tmp_path, {"image": "x.png"}, {"image": "y.png"}, b"broken", b"broken")
    items = unique(reader(tmp_path).items())
    assert [item.rows for item in items] == [1] * 5 and items[0].size == len(png(0))
    assert [item.id for item in items] == [item.id for item in reader(tmp_path).items()]
    assert len(items[0].id) == 16 and Item("a", first=1).id != Item("a").id


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b"{", Reason.BAD_RECORD, "is no JSON"),
        (b'"a.png"', Reason.BAD_RECORD, "no JSON object with an 'image'"),
        (b'{"turns": []}', Reason.BAD_RECORD, "no JSON object with an 'image'"),
        (b'{"image": "caf\xe9.png"}', Reason.BAD_RECORD, "is no JSON in UTF-8"),
        (b"[" * 100_000, Reason.BAD_RECORD, "is no JSON"),
        (b'{"image": ' + b"9" * 5000 + b"}", Reason.BAD_RECORD, "image|JSON"),
        (b'{"image": 3}', Reason.BAD_RECORD, "image is 3, expected the path"),
        (b'{"image": "../a.png"}', Reason.BAD_RECORD, "outside the folder"),
        (b'{"image": "/etc/passwd"}', Reason.BAD_RECORD, "outside the folder"),
        (b'{"image": "\\ud800.png"}', Reason.BAD_RECORD, "no valid text"),
        (b'{"image": "a\\u0000.png"}', Reason.BAD_RECORD, "no valid text"),
        (b'{"image": "gone.png"}', Reason.MISSING_FILE, "'gone.png' is not there"),
        (b'{"image": "a.png"}\n{"image": "x/../a.png"}', Reason.DUPLICATE_ID, "has a line before, 1"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_number(
    tmp_path: Path, line: bytes, reason: Reason, message: str
) -> None:
    write(tmp_path / "a.png", png(0))
    lines(tmp_path, line)
    made = results(reader(tmp_path))
    assert isinstance(made[0], Found)
    (found,) = refusals(reader(tmp_path))
    assert found[0] == reason
    assert found[1].startswith("records.jsonl, line ") and any(part in found[1] for part in message.split("|"))


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"turns": [{**TURN, "answer": None}]}, "turns.0.answer"),
        ({"turns": [{**TURN, "prompt": "a\x00"}]}, "turns.0.prompt"),
        ({"turns": [{**TURN, "prompt": "\ud800"}]}, "record"),
        ({"turns": [{**TURN, "kind": "referring", "expression": " "}]}, "turns.0: Value error, expression is empty"),
        ({"turns": [{**TURN, "more": 1}]}, "turns.0.more"),
        ({"boxes": [[0, 0, 1]]}, "boxes.0"),
        ({"boxes": [[0, 0, 1, float("nan")]]}, "boxes.0.3"),
        ({"masks": [{"height": 2, "width": 2}]}, "masks.0"),
        ({"masks": [{"height": 10**9, "width": 2, "counts": ""}]}, "masks.0"),
        (
            {"masks": [{"height": 60_000, "width": 60_000, "counts": "P"}]},
            "masks.0: Value error, mask is 60000 x 60000",
        ),
        ({"masks": [{"height": 2, "width": 2, "counts": [4]}]}, "masks.0"),
        ({"bboxes": []}, "bboxes"),
    ],
)
def test_a_wrong_record_refuses_its_image_and_names_the_field(
    tmp_path: Path, record: dict[str, object], named: str
) -> None:
    write(tmp_path / "a.png", png(0))
    write(tmp_path / "b.png", png(1))
    lines(tmp_path, {"image": "a.png", **record})
    ((reason, message),) = refusals(reader(tmp_path))
    assert reason == Reason.BAD_RECORD and named in message
    assert [row.data for row in results(reader(tmp_path)) if isinstance(row, Found)] == [png(1)]


def test_files_that_vanish_shrink_or_may_not_be_named_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / name, png(0))
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "caf\udce9.png").write_bytes(png(0))
    made = reader(tmp_path)
    items = list(made.items())
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(png(0)[:-9])
    rows = [row for item in items for row in made.read(item)]
    assert [row.reason for row in rows if not isinstance(row, Found)] == [
        Reason.MISSING_FILE,
        Reason.TRUNCATED_IMAGE,
        Reason.MISSING_FILE,
        Reason.BAD_RECORD,
    ]
    assert all((item.uri + item.message).encode() for item in items)


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.png", png(0))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert [row.uri for row in good(reader(folder))] == [str(folder / "linked" / "a.png")]
    (folder / "again").symlink_to(folder)
    with pytest.raises(SourceError, match="link to a folder that it lies in"):
        list(reader(folder).items())


def test_a_folder_that_is_none_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"sources.mine.path '.*gone' is no folder"):
        list(reader(tmp_path / "gone").items())
    write(tmp_path / "a.txt", b"")
    with pytest.raises(SourceError, match=r"holds no image \(.jpg"):
        list(reader(tmp_path).items())
    with pytest.raises(SourceError, match="is on 'http', expected a local path or an s3"):
        FolderReader(FolderSource(format="folder", name="mine", path="http://host/folder"))


@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=200))
def test_any_bytes_as_records_give_items_and_refusals(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "a.png", png(0))
    write(folder / "records.jsonl", data)
    made = results(reader(folder))
    assert sum(isinstance(row, Found) and row.data == png(0) for row in made) == 1
