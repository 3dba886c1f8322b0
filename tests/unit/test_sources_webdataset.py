"""WebDataset shards from rooms: samples come back in order, hostile and cut-off tars are refused and never silent."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.data import store
from perceptio.sources.record import Found, Refused, SourceError
from perceptio.sources.webdataset import WebDatasetReader
from schemas.sources import WebDatasetSource
from schemas.tables import Reason
from tests.sources import good, jpeg, png, refusals, results, unique, write

TURN = {"kind": "vqa", "prompt": "q", "answer": "a"}
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def special(kind: bytes, **fields: Any) -> bytes:
    """A shard whose one member, a.png, is no plain file."""
    info = tarfile.TarInfo("a.png")
    info.type = kind
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def header(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a valid checksum and any size field."""
    block = bytearray(special(kind)[:512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def reader(path: Path | str, **more: Any) -> WebDatasetReader:
    section = {"format": "webdataset", "name": "web", "path": str(path), **more}
    return WebDatasetReader(WebDatasetSource.model_validate(section))


def shard(folder: Path, data: bytes) -> WebDatasetReader:
    return reader(write(folder / "s.tar", data))


@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_neighbours_of_one_name(tmp_path: Path, form: int) -> None:
    files = {
        "000/0001.jpg": jpeg(0),
        "000/0001.txt": " Ein Zimmer, grün.\n".encode(),
        "000/0001.json": b'{"caption": "not read", "url": "http://x", "width": 64}',
        "0002.seg.png": b"another thing",
        "0002.json": json.dumps({"turns": [TURN], "boxes": [[0, 0, 5, 5]]}).encode(),
        "0002.PNG": png(1),
        "0003.json": b'{"question": "How many?", "answer": "Two", "id": 7}',
        "0003.png": png(2),
        "0003.cls": b"1\n",
        "0004.png": png(3),
        "0004.txt": b" ",
        ".hidden.png": b"x",
        "README": b"y",
    }
    write(tmp_path / "s.tar", tar(files, form))
    found = good(reader(tmp_path / "s.tar", class_names=["hall", "kitchen"], caption_prompt="Describe it."))
    assert [row.data for row in found] == [jpeg(0), png(1), png(2), png(3)]
    said = [[(t.kind, t.prompt, t.answer) for t in row.record.turns] for row in found]
    assert said == [
        [("caption", "Describe it.", "Ein Zimmer, grün.")],
        [("vqa", "q", "a")],
        [("vqa", "How many?", "Two"), ("class", "What does this image show?", "kitchen")],
        [],
    ]
    assert found[1].record.boxes == ((0, 0, 5, 5),)
    assert [row.uri.removeprefix(f"{tmp_path}/") for row in found] == [
        "s.tar#000/0001", "s.tar#0002", "s.tar#0003", "s.tar#0004"
    ]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_come_back(tmp_path: Path, form: int) -> None:
    name = f"{'folder/' * 30}größe.png"
    (row,) = good(shard(tmp_path, tar({name: png(0)}, form)))
    assert row.uri.endswith(f"#{name.removesuffix('.png')}") and row.data == png(0)


def test_shards_come_from_a_folder_a_pattern_or_a_file(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"shard-{index:06d}.tar", tar({f"{index}.png": png(index)}))
    write(tmp_path / "notes.txt", b"")
    for path in (tmp_path, tmp_path / "shard-{000000..000002}.tar"):
        assert [row.data for row in good(reader(path))] == [png(0), png(1), png(2)]
        assert [item.rows for item in unique(reader(path).items())] == [0, 0, 0]
    assert [row.data for row in good(reader(tmp_path / "shard-000001.tar"))] == [png(1)]
    names = [item.uri for item in reader(tmp_path / "{8..10}-{0..1}.tar").items()]
    assert [name.rpartition("/")[2] for name in names] == [
        "8-0.tar", "8-1.tar", "9-0.tar", "9-1.tar", "10-0.tar", "10-1.tar"
    ]  # fmt: skip


def test_a_shard_of_a_pattern_that_is_missing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s-0.tar", tar({"0.png": png(0)}))
    rows = results(reader(tmp_path / "s-{0..1}.tar"))
    assert [type(row) for row in rows] == [Found, Refused] and rows[1].reason == Reason.MISSING_FILE  # type: ignore[union-attr]


def test_paths_without_shards_are_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "holds no .tar file"),
        (tmp_path / "gone", "holds no .tar file"),
        (tmp_path / "gone.tar", "is no file"),
        (tmp_path / "{5..1}.tar", "is no range"),
        (tmp_path / "{0..999999999999}.tar", "is no range"),
    ):
        with pytest.raises(SourceError, match=f"sources.web.path .*{message}"):
            list(reader(path).items())


@pytest.mark.parametrize(
    ("files", "reason", "message"),
    [
        ({"b.txt": b"x"}, Reason.MISSING_FILE, "the sample has 0 images"),
        ({"b.png": b"x", "b.jpg": b"y"}, Reason.BAD_RECORD, "the sample has 2 images"),
        ({"b.png": b"x", "b.txt": b"\xff"}, Reason.BAD_RECORD, ".txt is no UTF-8"),
        ({"b.png": b"x", "b.json": b"{"}, Reason.BAD_RECORD, ".json is no JSON"),
        ({"b.png": b"x", "b.json": b"[" * 100_000}, Reason.BAD_RECORD, ".json is no JSON"),
        ({"b.png": b"x", "b.json": b'{"turns": 3}'}, Reason.BAD_RECORD, "turns.0"),
        ({"b.png": b"x", "b.json": b'{"turns": [], "more": 3}'}, Reason.BAD_RECORD, "more"),
        ({"b.png": b"x", "b.json": b'{"question": 3, "answer": "x"}'}, Reason.BAD_RECORD, "turns.0.prompt"),
        ({"b.png": b"x", "b.txt": b"a\x00b"}, Reason.BAD_RECORD, "turns.0.answer"),
        ({"b.png": b"x", "b.cls": b"cat"}, Reason.BAD_RECORD, ".cls holds 'cat', expected the number"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused_and_its_neighbours_are_kept(
    tmp_path: Path, files: dict[str, bytes], reason: Reason, message: str
) -> None:
    made = shard(tmp_path, tar({"a.png": png(0), **files, "c.png": png(1)}))
    ((found, text),) = refusals(made)
    assert found == reason and message in text
    assert [row.data for row in results(made) if isinstance(row, Found)] == [png(0), png(1)]


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", tar({"a.png": png(0), "a.cls": b"2"}))
    ((_, message),) = refusals(reader(tmp_path / "s.tar", class_names=["x", "y"]))
    assert "expected a class from 0 to 1" in message


def test_a_large_member_is_refused_and_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", tar({"a.png": b"x" * 3000, "b.png": b"y", "c.png": b"z" * 2000}))
    rows = results(reader(tmp_path / "s.tar", max_member_bytes=2000))
    assert [row.reason if isinstance(row, Refused) else row.data for row in rows] == [
        Reason.TOO_LARGE, b"y", b"z" * 2000
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_never_followed(tmp_path: Path, kind: bytes) -> None:
    write(tmp_path / "secret.png", png(0))
    link = special(kind, linkname=str(tmp_path / "secret.png"))[:512]
    rows = results(shard(tmp_path, link + tar({"b.png": png(1)})))
    assert [type(row) for row in rows] == [Refused, Found]
    assert "a link, which is never followed" in rows[0].message  # type: ignore[union-attr]


def flip(data: bytes) -> bytes:
    return data[:100] + b"\xff" + data[101:]


THIRD = 2048  # where the third member begins
HOSTILE: dict[str, Callable[[], bytes]] = {
    "cut inside a member": lambda: tar({"b.png": png(1)})[:700],
    "cut inside a header": lambda: tar({"b.png": png(1)})[:300],
    "no end mark": lambda: b"",
    "one flipped header byte": lambda: flip(tar({"b.png": png(1)})),
    "two tars in one": lambda: bytes(1024) + tar({"b.png": png(1)}),
    "a size below zero": lambda: header(b"\xff" * 12),
    "a size beyond the file": lambda: header(b"77777777777") + bytes(1024),
    "a size of 2 ** 88": lambda: header(b"\x80" + b"\xff" * 11) + bytes(1024),
    "an extended header of gigabytes": lambda: header(b"77777777777", tarfile.XHDTYPE) + bytes(1024),
    "a long name of gigabytes": lambda: header(b"77777777777", tarfile.GNUTYPE_LONGNAME) + bytes(1024),
    "a long name below zero": lambda: header(b"\xff" * 12, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
    "a sparse file": lambda: special(tarfile.GNUTYPE_SPARSE),
    "a device": lambda: special(tarfile.CHRTYPE),
    "a pipe": lambda: special(tarfile.FIFOTYPE),
    "a size in words": lambda: pax(b"14 size=12345\n".replace(b"12345", b"a lot")),
    "a size below zero in an extended header": lambda: pax(b"11 size=-5\n"),
    "a record of no length": lambda: pax(b"0 size=5\n"),
    "a record longer than its header": lambda: pax(b"99 size=5\n"),
    "a record without a value": lambda: pax(b"8 sizes\n"),
    "a sparse map": lambda: pax(b"25 GNU.sparse.size=123456\n"[:24] + b"\n"),
}


def pax(records: bytes) -> bytes:
    size = b"%011o" % len(records)
    return header(size, tarfile.XHDTYPE) + records.ljust(512, b"\0") + tar({"b.png": png(1)})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_shard_keeps_what_came_before_and_is_named(tmp_path: Path, name: str) -> None:
    whole = tar({"a.png": b"first", "b.png": b"may have more files"})[:THIRD]
    rows = results(shard(tmp_path, whole + HOSTILE[name]()))
    kept = [row.data for row in rows if isinstance(row, Found)]  # the second sample, where its end is known
    assert kept[0] == b"first" and kept[1:] in ([], [b"may have more files"])
    (refusal,) = (row for row in rows if isinstance(row, Refused))
    assert refusal.reason == Reason.DAMAGED_ARCHIVE and f"'{tmp_path}/s.tar' is no whole tar: " in refusal.message


def test_a_sample_that_may_be_cut_in_two_is_not_kept(tmp_path: Path) -> None:
    whole = tar({"a.png": png(0), "b.png": b"short", "b.json": json.dumps({"turns": [TURN]}).encode()})
    assert len(good(shard(tmp_path, whole))) == 2
    cut = whole.index(b"b.json")
    rows = results(shard(tmp_path, whole[:cut]))
    assert [type(row) for row in rows] == [Found, Refused]


def test_a_store_that_fails_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shard(tmp_path, tar({"a.png": png(0)}))
    (item,) = made.items()

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionError("503 slow down")

    monkeypatch.setattr(store, "FIRST_WAIT", 0.0001)
    monkeypatch.setattr(made.place.fs, "open", lambda *a, **k: Broken())
    with pytest.raises(store.StoreError, match=r"reading .*s.tar: the store failed 6 times"):
        list(made.read(item))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_and_cut_bytes_are_found_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(tar({"a.png": b"one", "a.json": b'{"turns": []}', f"{'b' * 120}.png": b"two"}))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    path = write(tmp_path_factory.getbasetemp() / "flipped.tar", bytes(whole[:cut]))
    rows = results(reader(path))
    assert all(isinstance(row, Found | Refused) for row in rows) and rows
