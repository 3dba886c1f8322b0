"""Reading samples: every row where the manifest says, each row group once, and damage named."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceptio.data.shards import SampleTable, ShardError, UnreadableError
from perceptio.data.store import StoreError
from schemas.tables import SAMPLES
from tests.samples import row, spoil, write


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SampleTable]:
    with SampleTable(str(tmp_path), write(tmp_path, 10, 0, 5)) as table:
        yield table


def test_every_row_is_found_in_the_order_of_the_shards(table: SampleTable) -> None:
    assert table.rows_per_group == [4, 4, 2, 4, 1]
    found = [table.row(g, r) for g, rows in enumerate(table.rows_per_group) for r in range(rows)]
    assert found == [row(number) for number in range(15)]
    assert len(table) == 15


def test_opening_reads_footers_and_each_row_group_is_read_once(table: SampleTable) -> None:
    opened = table.bytes_read
    assert opened < 2 * 65536  # Parquet readers fetch up to 64 KiB of a file's end
    for _ in range(3):
        table.row(1, 0)
        table.row(1, 3)
    assert 4 * 5000 < table.bytes_read - opened < 4 * 5000 + 4096
    table.row(2, 1)
    assert table.bytes_read - opened < 6 * 5000 + 2 * 4096


def test_a_pass_reads_the_table_about_once(tmp_path: Path) -> None:
    manifest = write(tmp_path, *[40] * 5, group=8)
    size = sum(shard.data.size for shard in manifest.shards if shard.data)
    with SampleTable(str(tmp_path), manifest, cached=3) as table:  # the last, this one and the next
        opened = table.bytes_read
        for group, rows in enumerate(table.rows_per_group):
            table.prefetch([group + 1] if group + 1 < len(table.row_groups) else [])
            for number in range(rows):
                table.row(group, number)
        assert size * 0.9 < table.bytes_read - opened < size * 1.05


def test_least_recently_used_row_groups_are_let_go(tmp_path: Path) -> None:
    with SampleTable(str(tmp_path), write(tmp_path, 16), cached=2) as table:
        for group in (0, 1, 0, 2):
            table.row(group, 0)
        before = table.bytes_read
        table.row(0, 1)
        assert table.bytes_read == before
        table.row(1, 1)
        assert table.bytes_read > before


def test_threads_that_ask_at_once_share_one_read(tmp_path: Path) -> None:
    with SampleTable(str(tmp_path), write(tmp_path, 64, group=64)) as table:
        opened = table.bytes_read
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: table.row(0, number)["id"], range(64)))
        assert found == [row(number)["id"] for number in range(64)]
        assert table.bytes_read - opened < 64 * 5000 * 1.2


def test_other_stores_are_read_through_their_address(tmp_path: Path) -> None:
    manifest = write(tmp_path, 6)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "samples"), "/shards-test/samples", recursive=True)
    try:
        with SampleTable.open("memory://shards-test", "vqa") as table:
            assert table.manifest == manifest
            assert table.row(1, 1) == row(5)
    finally:
        memory.rm("/shards-test", recursive=True)


def test_a_row_outside_the_table_is_an_index_error(table: SampleTable) -> None:
    for group, number in ((5, 0), (-1, 0), (2, 2), (0, -1)):
        with pytest.raises(IndexError, match=f"no row {number} in row group {group} of 5"):
            table.row(group, number)


def test_an_unfinished_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="run `assemble` first"):
        SampleTable.open(str(tmp_path), "vqa")


def test_damage_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path, 5, 5)
    file = tmp_path / "samples" / "vqa" / "part-000001-a.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    with pytest.raises(ShardError, match=r"part-000001-a.parquet is no Parquet file .* expected 5 rows"):
        SampleTable(str(tmp_path), manifest)
    file.write_bytes((tmp_path / "samples" / "vqa" / "part-000000-a.parquet").read_bytes())
    other = manifest.model_copy(update={"kept": 11})
    with pytest.raises(ShardError, match="files hold 10 rows, the manifest says 11"):
        SampleTable(str(tmp_path), other)
    pq.write_table(pa.Table.from_pylist([row(0)], SAMPLES), file)
    with pytest.raises(ShardError, match=r"part-000001-a.parquet has 1 rows, the manifest says 5"):
        SampleTable(str(tmp_path), manifest)
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(5)], SAMPLES).drop_columns(["codes"]), file)
    with pytest.raises(ShardError, match=r"column 'codes' is missing, expected list<.*uint16>"):
        SampleTable(str(tmp_path), manifest)
    file.unlink()
    with pytest.raises(ShardError, match=r"part-000001-a.parquet is missing, the manifest names it with 5 rows"):
        SampleTable(str(tmp_path), manifest)


def test_a_row_group_that_failed_is_read_again(tmp_path: Path) -> None:
    manifest = write(tmp_path, 8)
    file = tmp_path / "samples" / "vqa" / "part-000000-a.parquet"
    whole = file.read_bytes()
    with SampleTable(str(tmp_path), manifest) as table:
        file.write_bytes(whole[:100])
        with pytest.raises(ShardError, match=r"part-000000-a.parquet: row group 1 of 4 rows cannot be read"):
            table.row(1, 0)
        file.write_bytes(whole)
        assert table.row(1, 0) == row(4)


def test_a_single_changed_byte_is_named_with_file_and_row_group_after_it_was_read_again(tmp_path: Path) -> None:
    manifest = write(tmp_path, 12, 8)
    with SampleTable(str(tmp_path), manifest) as table:
        file, before = spoil(tmp_path, manifest, 0, 1), table.bytes_read
        with pytest.raises(UnreadableError, match=rf"{file.name}: row group 1 of 4 rows cannot be read .*CRC") as found:
            table.row(1, 0)
        assert found.value.group == table.row_groups[1]
        assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)  # noqa: S301
        assert 3 * 4 * 5000 < table.bytes_read - before < 4 * 4 * 5000, "three reads"
        assert table.row(0, 0) == row(0) and table.row(2, 0) == row(8)
    with SampleTable(str(tmp_path), manifest) as table:
        file.unlink()
        with pytest.raises(UnreadableError, match=r"row group 0 of 4 rows cannot be read .*No such file"):
            table.row(0, 0)


def test_bytes_that_are_spoilt_on_their_way_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleTable(str(tmp_path), write(tmp_path, 4)) as table:
        whole, left = table._fs.cat_file, [b"spoilt", b""]
        spoilt = SimpleNamespace(cat_file=lambda *a, **range: left.pop() if left else whole(*a, **range))
        monkeypatch.setattr(table, "_fs", spoilt)
        assert table.row(0, 0) == row(0)
        assert not left


def test_a_store_that_refuses_or_is_away_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleTable(str(tmp_path), write(tmp_path, 4)) as table:
        for error in (PermissionError("no"), StoreError("away")):
            monkeypatch.setattr(table, "_fs", SimpleNamespace(cat_file=Mock(side_effect=error)))
            with pytest.raises(type(error)) as found:
                table.row(0, 0)
            assert found.value is error


def test_needs_no_torch() -> None:
    code = "import sys, perceptio.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
