"""Pickles from anybody: plain data come out as Python reads them, anything else is refused and runs nothing."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.sources.record import SourceError
from perceptio.sources.restricted_pickle import load_plain

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
)


class Runs:
    """Unpickled by the book, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@settings(deadline=None)
@given(values=PLAIN, protocol=st.integers(0, 5))
def test_plain_values_come_back_as_they_were(values: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(values, protocol), "refs") == values


@pytest.mark.parametrize("protocol", range(6))
def test_shared_values_stay_shared(protocol: int) -> None:
    shared: list[int] = [1]
    first, second = load_plain(pickle.dumps([shared, shared], protocol), "refs")
    assert first is second and first == [1]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_program_is_refused_by_its_name(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps([Runs(tmp_path / "ran")], protocol)
    with pytest.raises(SourceError, match=r"'refs\(unc\).p' holds the opcode (STACK_)?GLOBAL of .*system"):
        load_plain(data, "refs(unc).p")
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)  # noqa: S301  # the same bytes do run where nobody refuses them
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cos\nsystem\n(S'ls'\ntR.", "GLOBAL of 'os system'"),
        (b"(S'ls'\nios\nsystem\n.", "INST of 'os system'"),
        (b"(S'x'\no.", "OBJ"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL of 'os' 'system'"),
        (b"\x80\x02]\x82\x01.", "EXT1"),
        (b"\x80\x02]\x83\x01\x00.", "EXT2"),
        (b"\x80\x02]\x84\x01\x00\x00\x00.", "EXT4"),
        (b"Pelsewhere\n.", "PERSID of 'elsewhere'"),
        (b"]Q.", "BINPERSID"),
        (b"]}b.", "BUILD"),
        (b"](R.", "REDUCE"),
        (b"\x80\x02])\x81.", "NEWOBJ"),
        (b"\x80\x04])}\x92.", "NEWOBJ_EX"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        (b"]2.", "DUP"),
    ],
)
def test_every_opcode_that_is_not_for_plain_data_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(SourceError, match="holds the opcode " + named):
        load_plain(data, "refs")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it ends before its STOP"),
        (b"]", "it ends before its STOP"),
        (b".", "ends with 0 values"),
        (b"]].", "ends with 2 values"),
        (b"(].", "1 marks"),
        (b"\xff.", "is no opcode"),
        (b"a.", "too few values"),
        (b"]I1\n(a.", "too few values"),
        (b"e.", "finds no mark"),
        (b"I1\nI2\na.", "are appended to 1"),
        (b"}I1\n(e.", "byte"),
        (b"](I1\nu.", "1 keys and values"),
        (b"}]I1\ns.", "a dict's key is a list"),
        (b"}(tI1\ns.", "a dict's key is a tuple"),
        (b"g7\n.", "byte 0"),
        (b"Ix\n.", "byte 0"),
        (b"S'a\n.", "is no quoted text"),
        (b"S'\\q'\n.", "is no quoted text"),
        (b"X\xff\xff\xff\x7fabc.", "byte 0"),
        (b"\x8d" + b"\xff" * 8 + b"abc.", "byte 0"),
        (b"I" + b"9" * 5000 + b"\n.", "byte 0"),
    ],
)
def test_a_damaged_pickle_is_named_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=f"'refs' is no whole pickle: byte .*{message}|'refs' is no .*{message}"):
        load_plain(data, "refs")


def test_bombs_take_no_more_memory_than_their_bytes_ask_for() -> None:
    deep = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    far = b"\x80\x02]r\xff\xff\xff\xff."  # a place in the memo for which Python's reader takes gigabytes
    tracemalloc.start()
    try:
        level, nested = 1, load_plain(deep, "refs")
        assert load_plain(far, "refs") == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    while nested:
        (nested,), level = nested, level + 1
    assert level == 50_000 and peak < 100 * len(deep)


def test_keys_nested_deep_enough_to_crash_a_hash_are_refused() -> None:
    with pytest.raises(SourceError, match="a dict's key is a tuple"):
        load_plain(b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", "refs")


@settings(deadline=None, max_examples=500)
@given(
    data=st.binary(max_size=60)
    | st.lists(st.sampled_from([bytes([n]) for n in b"(])}edasu0123KNI\n.tlpqX"])).map(b"".join)
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = load_plain(data, "refs")
    except SourceError as error:
        value = str(error)
    assert value is None or isinstance(value, list | tuple | dict | str | bytes | int | float)
