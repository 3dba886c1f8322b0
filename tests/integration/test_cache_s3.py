"""Row groups of an S3 store on a local disk: a second pass asks the store for nothing, and the limit is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from conftest import ROOMS
from s3_server import BUCKET, Faults, FaultyProxy, s3_server

from perceptio.data.disk_cache import LOCK_NAME, DiskCache
from perceptio.data.shards import SampleTable
from perceptio.train.feed import Samples
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from tests.samples import row, write

SHARDS, GROUP = (12, 8), 4


@pytest.fixture(scope="module")
def local_ray() -> str:
    """No Ray: what is tested here needs none."""
    return ""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that counts requests and lets all of them through, before a server of its own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as port, FaultyProxy(port, Faults()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # they keep the address that they were made with
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def stored(local: Path, uri: str, *shards: int, first: int = 0) -> Manifest:
    """The manifest of a table of `shards` rows in the store, its rows those from `first` on."""
    manifest = write(local, *shards, group=GROUP, first=first)
    fsspec.filesystem("s3").put(f"{local}/samples", f"{uri}/", recursive=True)
    return manifest


def one_pass(table: SampleTable) -> list[dict[str, Any]]:
    """All rows, in order; row groups are not kept in memory from one pass to the next."""
    return [table.row(group, number) for group, rows in enumerate(table.rows_per_group) for number in range(rows)]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != LOCK_NAME)


def test_a_second_pass_of_any_worker_asks_the_store_for_nothing(store: FaultyProxy, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/twice"
    manifest = stored(tmp_path / "local", uri, *SHARDS)
    size = sum(shard.data.size for shard in manifest.shards if shard.data)
    expected = [row(number) for number in range(sum(SHARDS))]
    with SampleTable(uri, manifest, cached=1, cache=DiskCache(tmp_path / "cache", 10**6)) as table:
        opened = table.bytes_read
        assert one_pass(table) == expected
        read, asked = table.bytes_read, store.requests["GET"]
        assert 0.85 * size < read - opened < size  # the rest is footers
        assert one_pass(table) == expected
        assert (table.bytes_read, store.requests["GET"]) == (read, asked)
    with SampleTable(uri, manifest, cached=1, cache=DiskCache(tmp_path / "cache", 10**6)) as other:
        opened, asked = other.bytes_read, store.requests["GET"]
        assert one_pass(other) == expected
        assert (other.bytes_read, store.requests["GET"]) == (opened, asked), "another worker of the machine"


def test_the_limit_is_kept_and_what_does_not_fit_is_read_again(store: FaultyProxy, tmp_path: Path) -> None:
    uri, folder = f"s3://{BUCKET}/limit", tmp_path / "cache"
    manifest = stored(tmp_path / "local", uri, *SHARDS)
    limit = 50_000  # two of the five row groups
    with SampleTable(uri, manifest, cached=1, cache=DiskCache(folder, limit)) as table:
        for group, is_read in ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (3, 0), (4, 0), (3, 0), (0, 1), (4, 1), (3, 1)):
            before = table.bytes_read
            assert table.row(group, 0) == row(4 * group)
            assert (table.bytes_read > before) == is_read, (group, before)
            assert held(folder) <= limit
        assert held(folder) > limit // 2


def test_a_damaged_entry_is_read_from_the_store_again(store: FaultyProxy, tmp_path: Path) -> None:
    uri, folder = f"s3://{BUCKET}/damaged", tmp_path / "cache"
    manifest = stored(tmp_path / "local", uri, *SHARDS)
    with SampleTable(uri, manifest, cached=1, cache=DiskCache(folder, 10**6)) as table:
        one_pass(table)
        for path in folder.iterdir():
            if path.name != LOCK_NAME:
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
        before = table.bytes_read
        assert one_pass(table) == [row(number) for number in range(sum(SHARDS))]
        assert table.bytes_read - before > 0.9 * sum(SHARDS) * 5000


def test_a_table_that_is_written_anew_under_the_same_names_gives_its_new_rows(
    store: FaultyProxy, tmp_path: Path
) -> None:
    uri, cache = f"s3://{BUCKET}/anew", DiskCache(tmp_path / "cache", 10**6)
    for first in (0, 100):
        manifest = stored(tmp_path / f"local-{first}", uri, *SHARDS, first=first)
        with SampleTable(uri, manifest, cached=1, cache=cache) as table:
            assert one_pass(table) == [row(first + number) for number in range(sum(SHARDS))]


def test_a_training_keeps_what_it_read_where_the_recipe_says(store: FaultyProxy, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/recipe"
    stored(tmp_path / "local", uri, *SHARDS)
    entry = {"source": "vqa", "weight": 1, "segmentation": False, "depth": True}
    settings: dict[str, Any] = {"mixture": [entry], "cache_dir": str(tmp_path / "cache"), "cache_gb": 0.001}
    overrides = [f"train.{name}={json.dumps(value)}" for name, value in settings.items()]
    recipe: Recipe = load_recipe(ROOMS, root=uri, overrides=overrides)
    reads = []
    for _ in range(2):  # a run, and one that goes on from it
        samples = Samples.open(recipe, None)  # type: ignore[arg-type]
        (table,) = samples.reader.tables
        opened = table.bytes_read
        found = [samples.reader.row(position)[1]["id"] for position in range(sum(SHARDS))]
        samples.reader.close()
        assert sorted(found) == [row(number)["id"] for number in range(sum(SHARDS))]
        reads.append(table.bytes_read - opened)
    assert reads[0] > 90_000 and reads[1] == 0
