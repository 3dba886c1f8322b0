"""The commit protocol on a local disk: one attempt wins, readers see only what was committed, damage is named."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from schemas.manifest import Manifest, ShardCommit
from schemas.tables import CODES, REJECTS, Reason
from workflows.commits import Table, content_digest
from workflows.store import DamagedTableError, OtherInputsError, StageError, open_root
from workflows.verify import problems_of

ROWS = 4


def rows(shard: int, count: int = ROWS) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"id": f"{1000 * shard + i:016x}", "codes": [i, shard], "depth_target": b"x" * i, "reconstruction_mae": 0.5}
            for i in range(count)
        ],
        schema=CODES,
    )


def rejects(shard: int, count: int = 1) -> pa.Table:
    where = {"stage": "tokenize", "source": "rooms", "shard": shard, "id": "", "message": "cut off"}
    return pa.Table.from_pylist(
        [{**where, "row": ROWS + i, "uri": f"{i}.png", "reason": Reason.TRUNCATED_IMAGE.value} for i in range(count)],
        schema=REJECTS,
    )


def commit(table: Table, shard: int, attempt: str = "first") -> ShardCommit:
    return table.commit(shard, attempt, rows(shard), rejects(shard), ROWS + 1)


def finish(table: Table, attempt: str = "first") -> Manifest:
    return table.finish(table.committed(), attempt=attempt, recipe="r", code="c", inputs={"settings": "s"})


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(open_root(str(tmp_path / "root")), "codes", "rooms")


def parts(table: Table) -> list[Path]:
    return sorted(Path(table.root.path).rglob("part-*"))


def test_what_was_committed_is_read_back(table: Table) -> None:
    made = commit(table, 3)
    assert (made.read, made.kept, made.rejected, made.reasons) == (5, 4, 1, {"truncated_image": 1})
    assert table.committed() == {3: made}
    assert table.read_shard(3).equals(rows(3))
    assert table.read_shard(3, ["id"]).column_names == ["id"]


def test_the_second_attempt_loses_and_takes_its_files_away(table: Table) -> None:
    first, second = commit(table, 0, "first"), commit(table, 0, "second")
    assert second == first and second.attempt == "first"
    assert all("first" in path.name for path in parts(table)) and len(parts(table)) == 2


def test_of_many_attempts_at_once_exactly_one_wins(table: Table) -> None:
    won: list[str] = []
    gate = threading.Barrier(8)

    def attempt(name: str) -> None:
        gate.wait()
        won.append(commit(table, 0, name).attempt)

    threads = [threading.Thread(target=attempt, args=(f"attempt{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 8 and len(set(won)) == 1
    assert len(parts(table)) == 2 and won[0] in parts(table)[0].name


def test_a_file_without_a_marker_is_nothing_to_a_reader(table: Table) -> None:
    table.root.write(b"half a file", "codes", "rooms", "part-000000-killed.parquet")
    assert table.committed() == {}
    with pytest.raises(DamagedTableError, match="not committed"):
        table.read_shard(0)


def test_a_half_written_draft_is_no_marker(table: Table) -> None:
    table.root.write(b"{", "codes", "rooms", "_commits", "000000.json~1a2b")
    assert table.committed() == {} and commit(table, 0).shard == 0


def test_what_a_killed_attempt_left_goes_when_the_table_is_finished(table: Table) -> None:
    table.root.write(b"half", "codes", "rooms", "part-000000-killed.parquet")
    commit(table, 0)
    finish(table)
    assert not [path for path in parts(table) if "killed" in path.name]


def test_clean_leaves_alone_what_may_be_under_way(table: Table) -> None:
    commit(table, 0)
    table.root.write(b"half", "codes", "rooms", "part-000001-working.parquet")
    assert table.clean() == []
    assert [path for path in parts(table) if "working" in path.name]


def test_clean_leaves_alone_the_next_revision_that_is_about_to_be_committed(table: Table) -> None:
    commit(table, 0)
    stale = table.committed()
    ahead = "part-000000.1-working.parquet"
    table.root.write(b"half", "codes", "rooms", ahead)
    finish(table)
    assert (Path(table.root.path) / "codes" / "rooms" / ahead).exists()
    table.commit(0, "second", rows(0), rejects(0), ROWS + 1, revision=1)
    assert table.clean(stale) == [], "who does not know of a revision must not delete its files"
    assert table.read_shard(0).equals(rows(0))
    replaced = "part-000000-first.parquet"
    assert set(table.clean()) == {ahead, replaced, f"../../rejects/tokenize/rooms/{replaced}"}
    assert table.revisions() == {0: 1} and finish(table).shards[0].revision == 1


def test_revisions_are_counted_by_number_and_not_by_name(table: Table) -> None:
    for revision in range(11):
        table.commit(0, f"attempt{revision}", rows(0), rejects(0), ROWS + 1, revision=revision)
    assert table.revisions() == {0: 10} and table.committed()[0].attempt == "attempt10"


def test_lost_and_doubled_rows_are_refused(table: Table) -> None:
    with pytest.raises(ValueError, match="rows were lost"):
        table.commit(0, "a", rows(0), rejects(0), ROWS + 2)
    with pytest.raises(ValueError, match="stand twice"):
        table.commit(0, "a", pa.concat_tables([rows(0), rows(0)]), REJECTS.empty_table(), 2 * ROWS)
    with pytest.raises(ValueError, match="columns"):
        table.commit(0, "a", rows(0).drop(["codes"]), REJECTS.empty_table(), ROWS)
    assert table.committed() == {} and parts(table) == []


def test_a_shard_without_kept_rows_is_committed_and_read_as_empty(table: Table) -> None:
    table.commit(0, "a", CODES.empty_table(), rejects(0), 1)
    assert table.read_shard(0).num_rows == 0 and table.read_shard(0).schema.equals(CODES)


def test_the_content_digest_knows_rows_and_not_their_chunks_or_attempts(table: Table) -> None:
    whole = rows(0)
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    sliced = pa.concat_tables([rows(9, 1), whole]).slice(1)
    assert content_digest(chunked) == content_digest(sliced) == content_digest(whole)
    others = [whole.slice(1), whole.slice(0, 3), whole.take([1, 0, 2, 3]), rows(1)]
    assert len({content_digest(other) for other in [whole, *others]}) == 5


def test_the_content_digest_tells_null_from_empty() -> None:
    schema = pa.schema([("id", pa.string()), ("codes", pa.list_(pa.uint16())), ("n", pa.int32())])
    variants = [
        [{"id": "a", "codes": None, "n": 0}],
        [{"id": "a", "codes": [], "n": 0}],
        [{"id": "a", "codes": [], "n": None}],
        [{"id": None, "codes": [], "n": 0}],
        [{"id": "", "codes": [], "n": 0}],
        [{"id": "a", "codes": [0], "n": 0}],
    ]
    digests = {content_digest(pa.Table.from_pylist(variant, schema=schema)) for variant in variants}
    assert len(digests) == len(variants)


def test_a_plan_made_from_other_inputs_is_refused_and_names_both(table: Table) -> None:
    table.plan({"images": "aaa", "settings": "s"})
    table.plan({"images": "aaa", "settings": "s"})
    with pytest.raises(OtherInputsError, match=r"images aaa, now bbb"):
        table.plan({"images": "bbb", "settings": "s"})


def test_the_manifest_does_not_depend_on_who_committed(table: Table, tmp_path: Path) -> None:
    other = Table(open_root(str(tmp_path / "other")), "codes", "rooms")
    for shard in (0, 1):
        commit(table, shard)
    for shard in (1, 0):
        commit(other, shard, f"attempt{shard}")
    first, second = finish(table), finish(other, "second")
    assert first.digest == second.digest and (first.read, first.kept, first.rejected) == (10, 8, 2)
    assert problems_of(table) == problems_of(other) == []


def test_an_unfinished_table_says_what_to_run(table: Table) -> None:
    with pytest.raises(StageError, match="run `tokenize` first"):
        table.require()
    commit(table, 0)
    assert "to finish it" in problems_of(table)[0]


def test_a_store_without_exclusive_create_is_refused() -> None:
    with pytest.raises(StageError, match="memory"):
        open_root("memory://somewhere")


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path) -> None:
    other = next(p for p in sorted(path.parent.glob("part-*")) if p != path)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def double(path: Path) -> None:
    shutil.copy(path, path.with_name("part-000007-copy.parquet"))


def lose_marker(path: Path) -> None:
    (path.parent / "_commits" / "000001.json").unlink()


def break_marker(path: Path) -> None:
    (path.parent / "_commits" / "000001.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (delete, "is missing"),
        (truncate, "was changed"),
        (flip, "was changed"),
        (swap, "was changed"),
        (double, "no marker names"),
        (lose_marker, "its marker says nothing"),
        (break_marker, "cannot be read"),
    ],
)
def test_verify_names_the_damage(table: Table, damage: object, named: str) -> None:
    for shard in (0, 1):
        commit(table, shard)
    finish(table)
    assert problems_of(table) == []
    assert callable(damage)
    damage(Path(table.root.path) / "codes" / "rooms" / "part-000001-first.parquet")
    assert any(named in problem for problem in problems_of(table)), problems_of(table)


def test_verify_finds_an_id_that_stands_in_two_shards(table: Table) -> None:
    commit(table, 0)
    table.commit(1, "first", rows(0), rejects(1), ROWS + 1)
    finish(table)
    assert "stands in shards 0 and 1" in problems_of(table)[0]


def test_verify_follows_the_chain(table: Table) -> None:
    table.commit(0, "first", rows(0), rejects(0), ROWS + 1, inputs={"depth": "1234"})
    table.finish(table.committed(), attempt="a", recipe="r", code="c", inputs={"codebook": "5678"})
    assert [problem for problem in problems_of(table) if "has no manifest" in problem] == [
        "its input depth/rooms has no manifest: run `depth`",
        "its input codebook has no manifest: run `codebook`",
    ]
