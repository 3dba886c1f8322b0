"""Rows at positions: a pass costs its table about once over all workers, and nobody waits for a store that is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings

from perceptio.data.mixture import Mixture, MixtureSource, Windows
from perceptio.data.reading import Reader
from perceptio.data.shards import SampleTable
from perceptio.train.feed import Feed, Samples
from schemas.manifest import Manifest
from tests.mixtures import mixtures
from tests.samples import write

STREAMS, BATCH = 8, 32


def mixture_over(tables: list[SampleTable], *weights: float, **settings: Any) -> Mixture:
    sources = [
        MixtureSource(table.manifest.source, weight, table.rows_per_group)
        for table, weight in zip(tables, weights, strict=True)
    ]
    return Mixture(sources, seed=1, streams=STREAMS, global_batch=BATCH, **settings)


@settings(max_examples=30, deadline=None)
@given(mixtures())
def test_the_next_window_is_the_one_that_comes(mixture: Mixture) -> None:
    before: dict[tuple[int, int], tuple[int, Windows]] = {}
    for position in range(600):
        slot, windows = mixture.at(position), mixture.windows(position)
        assert slot.row_group in windows.now and len(windows.now) <= mixture.window
        key = (slot.source, position % mixture.streams)
        known = before.get(key)
        if known is not None and slot.pass_number - known[0] <= 1 and (slot.pass_number, windows) != known:
            assert windows.now == known[1].next or (not known[1].next and slot.pass_number > known[0])
        before[key] = (slot.pass_number, windows)


def test_behind_the_last_pass_there_is_no_next_window() -> None:
    mixture = Mixture([MixtureSource("a", 1, [4] * 4, max_passes=2)], seed=0, streams=2, global_batch=2)
    assert mixture.windows(15).next and not mixture.windows(31).next
    with pytest.raises(ValueError, match="position: got 32"):
        mixture.windows(32)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Manifest]]:
    """A root with a table of 80 row groups and one of 45, in several files each."""
    root = tmp_path_factory.mktemp("two")
    return str(root), [write(root, *[100] * 4, group=5), write(root, *[50, 41, 59], group=3, source="boxes")]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_all_workers_together_read_a_table_at_most_1_2_times_a_pass(
    two: tuple[str, list[Manifest]], world: int
) -> None:
    root, manifests = two
    passes, rows, weights = 3, manifests[0].kept, (3, 1)
    steps = -(-passes * rows * sum(weights) // (weights[0] * BATCH))
    read, drawn = [0, 0], [0, 0]
    for rank in range(world):
        tables = [SampleTable(root, manifest) for manifest in manifests]
        opened = [table.bytes_read for table in tables]
        reader = Reader(mixture_over(tables, *weights), tables, world=world)
        reader.begin(0, rank)
        for step in range(steps):
            for position in reader.mixture.positions_of(step, rank, world):
                slot, row = reader.row(position)
                drawn[slot.source] += 1
                assert int(row["turns"][0]["answer"]) < manifests[slot.source].kept
            for table in tables:
                assert len(table._groups) <= reader.mixture.row_groups_in_use(world) == 4 * STREAMS // world
        reader.close()
        for source, table in enumerate(tables):
            read[source] += table.bytes_read - opened[source]
    for source, manifest in enumerate(manifests):
        size = sum(shard.data.size for shard in manifest.shards if shard.data)
        gone_through = drawn[source] / manifest.kept
        assert gone_through > 0.99
        assert 1 < read[source] / size < 1.2 * gone_through


class SlowStore(LocalFileSystem):  # type: ignore[misc]
    """Stands for a store so slow that whoever trains takes two steps until a read is answered."""

    protocol = "slow"
    trained, steps = threading.Condition(), 0
    STEPS_A_READ = 2

    @classmethod
    def train(cls, steps: int = 1) -> None:
        with cls.trained:
            cls.steps += steps
            cls.trained.notify_all()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        with self.trained:
            due = self.steps + self.STEPS_A_READ
            assert self.trained.wait_for(lambda: SlowStore.steps >= due, timeout=30), "someone waits for this read"
        found: bytes = super().cat_file(path, start, end, **options)
        return found


class Ids(Feed):
    """Feeds the samples' ids alone, which needs no model."""

    def batches(self, step: int, *, rank: int, world: int, micro_batch: int) -> Any:
        return [self.samples.reader.row(p)[1]["id"] for p in self.samples.mixture.positions_of(step, rank, world)]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SampleTable]:
    """A table of 32 row groups of 20 rows: with 8 streams, windows of 40 rows, of which a step takes 4."""
    with SampleTable(str(tmp_path), write(tmp_path, *[160] * 4, group=20), threads=2 * STREAMS) as table:
        monkeypatch.setattr(table, "_fs", SlowStore())
        yield table
        SlowStore.train(10**6)  # so that what is still being read ends


def test_training_does_not_wait_for_a_slow_store(slow: SampleTable, tmp_path: Path) -> None:
    reader, steps = Reader(mixture_over([slow], 1), [slow]), 40  # two passes
    feed = Ids(Samples(reader, None, None), 0).ahead(0, steps, rank=0, world=1, micro_batch=1)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, feed)
        while not first.done():  # the first step alone has to wait
            SlowStore.train()
            time.sleep(0.01)
        found = [first.result()]
        for _ in range(1, steps):
            SlowStore.train()
            found.append(pool.submit(next, feed).result(timeout=30))
            assert len(slow._groups) <= reader.mixture.row_groups_in_use(1)
        SlowStore.train(10**6)
        assert pool.submit(next, feed, None).result(timeout=30) is None
    slow._groups.clear()
    with pytest.raises(RuntimeError, match="after shutdown"):
        slow.prefetch([0])
    with SampleTable(str(tmp_path), slow.manifest) as plain:
        other = Reader(reader.mixture, [plain])
        assert found == [[other.row(p)[1]["id"] for p in range(s * BATCH, s * BATCH + BATCH)] for s in range(steps)]
