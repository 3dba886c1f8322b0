"""LLaVA's JSON from rooms: conversations of one image become one row, what is no conversation is refused by its id."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perceptio.rooms.questions import ask
from perceptio.sources import json_array
from perceptio.sources.json_array import array_items
from perceptio.sources.llava import LlavaReader
from perceptio.sources.record import SourceError
from schemas.sources import LlavaSource
from schemas.tables import Reason
from tests.sources import good, jpeg, refusals, results, room, unique, write, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def record(key: str, image: str | None, *pairs: tuple[str, str]) -> dict[str, Any]:
    talk = [turn for question, answer in pairs for turn in (
        {"from": "human", "value": question}, {"from": "gpt", "value": answer})]  # fmt: skip
    return {"id": key, "conversations": talk} | ({} if image is None else {"image": image})


def reader(folder: Path, records: Any) -> LlavaReader:
    for index in (0, 1):
        write(folder / "data" / "coco" / "train2017" / f"{index:012d}.jpg", jpeg(index))
    path = folder / "llava_v1_5_mix665k.json"
    write(path, records) if isinstance(records, bytes) else write_json(path, records)
    section = {"format": "llava", "name": "llava", "path": str(path), "images": str(folder / "data")}
    return LlavaReader(LlavaSource.model_validate(section))


def image(index: int) -> str:
    return f"coco/train2017/{index:012d}.jpg"


def asked(index: int) -> list[tuple[str, str]]:
    return [(q.prompt, q.answer) for q in ask(room(index)) if q.kind in ("attribute", "yes_no", "count")]


def test_all_records_of_an_image_are_one_row_with_their_pairs_in_order(tmp_path: Path) -> None:
    first, second = asked(0), asked(1)
    (question, answer), *more = first
    records = [
        record("a", image(0), (f"<image>\n{question}", answer), *more),
        record("b", image(1), *second[:-1], (f"{second[-1][0]}\n<image>", second[-1][1])),
        record("c", "coco/./train2017/000000000000.jpg", ("<image>\nDescribe it.", "A room.")),
    ]
    found = good(reader(tmp_path, records))
    assert [row.data for row in found] == [jpeg(0), jpeg(1)]
    said = [[(turn.prompt, turn.answer) for turn in row.record.turns] for row in found]
    assert said == [[*first, ("Describe it.", "A room.")], second]
    assert {turn.kind for row in found for turn in row.record.turns} == {"vqa"}
    assert len(unique(reader(tmp_path, records).items())) == 2


@pytest.mark.parametrize(
    ("spoiled", "reason", "message"),
    [
        (record("t", None, ("Hello", "Hi")), Reason.TEXT_ONLY, "record 1, id 't': it has no image"),
        (record("b", "/etc/passwd", ("q", "a")), Reason.BAD_RECORD, "image '/etc/passwd' is outside"),
        (record("b", "a\x00", ("q", "a")), Reason.BAD_RECORD, "image 'a\\x00' is no valid text"),
        (record("b", image(0)), Reason.BAD_RECORD, "conversations has 0 turns"),
        ({"id": "b", "image": image(0)}, Reason.BAD_RECORD, "conversations has None"),
        ({"id": 7, "image": ["x", "y"]}, Reason.BAD_RECORD, "record 1, id 7: image is a list"),
        (["x"], Reason.BAD_RECORD, "record 1, id None: it is a list, expected an object"),
        (record("b", image(0), ("<image>", "a")), Reason.BAD_RECORD, "conversations[0].value is empty"),
        (record("b", image(0), ("q", " ")), Reason.BAD_RECORD, "conversations[1].value is empty"),
        (record("b", image(0), ("what <image> is", "a")), Reason.BAD_RECORD, "has <image> inside the text"),
        ({**record("b", image(0)), "conversations": [{"from": "human", "value": "q"}]}, Reason.BAD_RECORD, "1 turns"),
        (
            {**record("b", image(0)), "conversations": [{"from": "gpt", "value": "q"}, {"from": "human"}]},
            Reason.BAD_RECORD,
            "conversations[0].from is 'gpt', expected 'human'",
        ),
        (
            {**record("b", image(0)), "conversations": [{"from": "human", "value": 3}, {"from": "gpt"}]},
            Reason.BAD_RECORD,
            "conversations[0].value is 3",
        ),
        ({**record("b", image(0)), "conversations": [3, 4]}, Reason.BAD_RECORD, "conversations[0].from is None"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_and_its_neighbours_are_kept(
    tmp_path: Path, spoiled: Any, reason: Reason, message: str
) -> None:
    made = reader(tmp_path, [record("a", image(0), ("q", "a")), spoiled, record("z", image(1), ("q", "a"))])
    ((found, text),) = refusals(made)
    assert found == reason and message in text
    assert len(results(made)) == 3


def test_text_that_no_table_can_hold_refuses_its_image(tmp_path: Path) -> None:
    made = reader(tmp_path, [record("a", image(0), ("q\ud800", "a")), record("z", image(1), ("q", "a\x00"))])
    assert [reason for reason, _ in refusals(made)] == [Reason.BAD_RECORD] * 2


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    made = reader(tmp_path, [record("a", "coco/gone.jpg", ("q", "a"))])
    assert [reason for reason, _ in refusals(made)] == [Reason.MISSING_FILE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "begins with '', expected a JSON array"),
        (b'{"a": 1}', "expected a JSON array"),
        (b"[", "is no JSON behind character 1"),
        (b'[{"id": 1}', "expected ',' or ']', found ''"),
        (b"[1 2]", "expected ',' or ']', found '2'"),
        (b"[1,]", "is no JSON behind character 3"),
        (b'["\xff"]', "is no JSON behind character 0"),
        (b"[" * 100_000, "is nested too deep|no JSON"),
    ],
)
def test_a_file_that_is_no_array_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=f"sources.llava.path: '.*mix665k.json'.*({message})"):
        list(reader(tmp_path, text).items())


@settings(deadline=None)
@given(
    values=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_arrays_are_read_in_any_pieces(values: list[Any], indent: int | None, ascii_only: bool, chunk: int) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        assert list(array_items(io.BytesIO(text), "file")) == values


@settings(deadline=None)
@example(data=b"[]\x01")
@given(data=st.binary(max_size=40) | st.text('[]{}",:0123e-. tnaN\\u', max_size=40).map(str.encode))
def test_any_bytes_are_an_array_or_refused(data: bytes) -> None:
    try:
        found = list(array_items(io.BytesIO(data), "file"))
    except SourceError:
        return
    assert json.dumps(found) == json.dumps(json.loads(data.decode("utf-8-sig")))


def test_an_endless_item_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "LONGEST_ITEM", 1000)
    monkeypatch.setattr(json_array, "CHUNK", 100)
    with pytest.raises(SourceError, match="one item is longer than 1000 characters"):
        list(array_items(io.BytesIO(b'["' + b"x" * 10_000), "file"))
