"""Doubles within and across sources: one copy stays, and an interrupted pass ends as one that was not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.manifest import ShardCommit
from schemas.tables import IMAGES, REJECTS, Reason
from workflows import doubles as module
from workflows.commits import Table
from workflows.doubles import doubles
from workflows.drop import DropWorker
from workflows.shards import Work, rejects_table
from workflows.store import Root, open_root

Shards = dict[str, list[list[int]]]  # source -> shards -> numbers of images
Gone = dict[tuple[str, int], dict[int, str]]  # source and shard -> number -> reason

HELD_OUT = {"test"}
# one copy an image and shard, as `ingest` leaves them
SHARDS = st.lists(st.lists(st.integers(0, 5), unique=True, max_size=4), min_size=1, max_size=3)
SOURCES = st.fixed_dictionaries({"one": SHARDS, "two": SHARDS, "test": SHARDS})


def key(number: int) -> str:
    return f"{number:016x}"


def tables(root: Root, shards: Shards) -> list[Table]:
    """Committed images tables, not finished."""
    made = []
    for source, numbers in shards.items():
        table = Table(root, "images", source)
        for shard, ids in enumerate(numbers):
            rows = [dict.fromkeys(IMAGES.names) | {"id": key(n), "uri": f"{source}/{shard}/{n}"} for n in ids]
            table.commit(shard, "a", pa.Table.from_pylist(rows, schema=IMAGES), REJECTS.empty_table(), len(ids))
        made.append(table)
    return made


def found(made: list[Table], reject: bool = True) -> module.Doubles:
    return doubles({table: table.committed() for table in made}, HELD_OUT, reject)


def drop(table: Table, shard: int, payload: str) -> None:
    """A shard's next revision, as the pool's actors make it."""
    previous: ShardCommit = table.committed()[shard]
    made = DropWorker().process(Work(table, table, shard, {}, payload, previous))
    rejects = rejects_table(table, shard, made.rejects)
    table.commit(shard, "b", made.table, rejects, made.read, revision=previous.revision + 1)


def gone(made: list[Table]) -> Gone:
    return {
        (table.source, shard): {int(row["id"], 16): row["reason"] for row in table.rejects_of(commit).to_pylist()}
        for table in made
        for shard, commit in table.committed().items()
        if commit.rejected
    }


def run(made: list[Table], reject: bool = True) -> Gone:
    for table in made:
        for shard, payload in found(made, reject).drops.get(table.source, {}).items():
            drop(table, shard, payload)
    return gone(made)


def test_the_first_copy_stays_and_the_others_say_where_it_is(tmp_path: Path) -> None:
    made = tables(open_root(str(tmp_path)), {"one": [[1, 2], [2, 3], [1, 2]]})
    assert run(made) == {("one", 1): {2: "duplicate_id"}, ("one", 2): {1: "duplicate_id", 2: "duplicate_id"}}
    (row,) = made[0].rejects_of(made[0].committed()[1]).to_pylist()
    assert row["uri"] == "one/1/2" and row["row"] == 0 and "shard 0 of one" in row["message"]
    assert found(made).drops == {}


def test_a_training_image_of_an_evaluation_split_goes_wherever_it_stands_and_the_split_keeps_it(tmp_path: Path) -> None:
    made = tables(open_root(str(tmp_path)), {"one": [[1, 2], [1]], "two": [[1, 4]], "test": [[9], [1]]})
    split = Reason.IN_EVALUATION_SPLIT.value
    assert run(made) == {("one", 0): {1: split}, ("one", 1): {1: split}, ("two", 0): {1: split}}


def test_contamination_can_be_only_told(tmp_path: Path) -> None:
    made = tables(open_root(str(tmp_path)), {"one": [[1, 2], [1]], "two": [[1, 4]], "test": [[1], [9]]})
    told = found(made, reject=False)
    assert told.shared == Counter({("test", "one"): 1, ("test", "two"): 1})
    assert run(made, reject=False) == {("one", 1): {1: "duplicate_id"}}


def test_two_training_sources_keep_their_copies_and_say_so(tmp_path: Path) -> None:
    made = tables(open_root(str(tmp_path)), {"one": [[1, 2]], "two": [[2], [1]]})
    assert found(made).drops == {} and found(made).shared == Counter({("one", "two"): 2})


@settings(max_examples=12, deadline=None)
@given(SOURCES, st.booleans())
def test_every_image_stays_once_a_source_and_never_in_training_where_it_is_held_out(
    tmp_path_factory: pytest.TempPathFactory, shards: Shards, reject: bool
) -> None:
    made = tables(open_root(str(tmp_path_factory.mktemp("doubles"))), shards)
    run(made, reject)
    kept = {t.source: [int(k, 16) for c in t.committed().values() for k in t.ids_of(c)] for t in made}
    assert all(len(ids) == len(set(ids)) for ids in kept.values())
    before = {source: {n for shard in shards[source] for n in shard} for source in shards}
    barred = before["test"] if reject else set()
    assert {source: set(ids) for source, ids in kept.items()} == {
        source: before[source] - (barred if source != "test" else set()) for source in shards
    }
    assert found(made, reject).drops == {}


@settings(max_examples=12, deadline=None)
@given(SOURCES, st.data())
def test_a_pass_that_was_cut_off_anywhere_ends_with_the_same_rows_and_reasons(
    tmp_path_factory: pytest.TempPathFactory, shards: Shards, data: st.DataObject
) -> None:
    whole = tables(open_root(str(tmp_path_factory.mktemp("whole"))), shards)
    expected = run(whole)
    made = tables(open_root(str(tmp_path_factory.mktemp("cut"))), shards)
    first = [(t, shard, text) for t in made for shard, text in found(made).drops.get(t.source, {}).items()]
    done = data.draw(st.sets(st.sampled_from(range(len(first)))) if first else st.just(set()))
    for i in done:
        drop(*first[i])
    assert run(made) == expected
    for one, other in zip(whole, made, strict=True):
        assert [c.content for c in one.committed().values()] == [c.content for c in other.committed().values()]


def test_passes_over_parts_of_the_ids_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {"one": [[1, 2, 3], [2, 3, 4]], "test": [[3, 5], [5]]}
    made = tables(open_root(str(tmp_path)), shards)
    at_once = found(made)
    monkeypatch.setattr(module, "DOUBLES_AT_ONCE", 2)
    in_parts = found(made)
    assert in_parts.shared == at_once.shared
    texts = [{s: {i: json.loads(p) for i, p in d.items()} for s, d in f.drops.items()} for f in (at_once, in_parts)]
    assert texts[0] == texts[1] and texts[0]
