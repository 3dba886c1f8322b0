"""The mixture's promises: shares at every prefix, every row once a pass, one order for every number of workers."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.data.mixture import Mixture, MixtureSource, Slot
from perceptio.data.period import Period, period_counts
from tests.mixtures import held_or_rejected, mixtures


def rooms(seed: int = 7) -> Mixture:
    groups = {"referring": (6, 32), "boxes": (1, 4), "points": (3, 6), "vqa": (3, 12), "depth": (3, 12)}
    sources = [MixtureSource(name, weight, [25] * n) for name, (weight, n) in groups.items()]
    return Mixture(sources, seed=seed, streams=8, global_batch=32)


def passes(mixture: Mixture, source: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """The rows of a source's first passes, cut by the number of its rows alone, in the order in which they come."""
    rows = sum(mixture.sources[source].row_groups)
    drawn: list[tuple[int, int]] = []
    for position in range(10**7):
        slot = mixture.at(position)
        if slot.source == source:
            drawn.append(slot[2:])
            if len(drawn) == rows:
                yield drawn
                count, drawn = count - 1, []
                if not count:
                    return


@settings(max_examples=20, deadline=None)
@given(mixtures())
def test_every_row_comes_exactly_once_a_pass(mixture: Mixture) -> None:
    for index, source in enumerate(mixture.sources):
        every_row = {(group, row) for group, rows in enumerate(source.row_groups) for row in range(rows)}
        for one_pass in passes(mixture, index, 3):
            assert len(one_pass) == len(every_row)
            assert set(one_pass) == every_row


@settings(max_examples=20, deadline=None)
@given(mixtures())
def test_shares_hold_at_every_prefix_globally_and_in_every_stream(mixture: Mixture) -> None:
    streams, shares = mixture.streams, np.asarray(mixture.shares)
    total = np.zeros(len(shares))
    each = np.zeros((streams, len(shares)))
    for position in range(2 * streams * sum(mixture.counts) + 3):
        source = mixture.at(position).source
        total[source] += 1
        each[position % streams, source] += 1
        off = np.abs(total - shares * (position + 1))
        inside_row = (position + 1) % streams > 0
        assert np.all(off < 1 + inside_row * streams * shares * (1 - shares) + 1e-9)
        assert np.all(np.abs(each[position % streams] - shares * (position // streams + 1)) < 1)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 10**12))
def test_global_batches_are_the_same_for_every_number_of_workers(mixture: Mixture, step: int) -> None:
    first = step * mixture.global_batch
    for world in (1, 2, 4, 8):
        if mixture.streams % world:
            with pytest.raises(ValueError, match=rf"of {world}: .* divides the {mixture.streams} streams"):
                mixture.positions_of(step, 0, world)
            continue
        parts = [mixture.positions_of(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {mixture.global_batch // world}
        assert sorted(chain.from_iterable(parts)) == list(range(first, first + mixture.global_batch))
        assert all(part == sorted(part) for part in parts)


def test_a_stream_stays_with_one_worker_and_workers_own_neighbouring_streams() -> None:
    mixture = rooms()
    for rank in range(2):
        streams = {p % 8 for step in range(5) for p in mixture.positions_of(step, rank, 2)}
        assert streams == set(range(4 * rank, 4 * rank + 4))


def test_order_is_a_pure_function_of_seed_and_position() -> None:
    forward = [rooms().at(p) for p in range(300)]
    mixture = rooms()
    backward = [mixture.at(p) for p in reversed(range(300))]
    assert forward == backward[::-1]
    assert forward != [rooms(seed=8).at(p) for p in range(300)]


def test_the_order_is_pinned() -> None:
    """A change of the order breaks the resumption of every run: it needs a new digest, and this test a new list."""
    mixture = rooms()
    assert mixture.digest == "41283362a40e173f"
    assert [mixture.at(p) for p in (0, 1, 2000, 10**9)] == [
        (0, 0, 0, 6),
        (0, 0, 17, 0),
        (0, 0, 6, 8),
        (0, 468750, 21, 8),
    ]


def test_each_pass_has_another_order_and_sources_differ() -> None:
    mixture = Mixture([MixtureSource(n, 1, [5] * 16) for n in "ab"], seed=0, streams=4, global_batch=8)
    first, second, third = passes(mixture, 0, 3)
    (other,) = passes(mixture, 1, 1)
    assert len({tuple(order) for order in (first, second, third, other)}) == 4
    assert [group for group, _ in first] != sorted(group for group, _ in first)


def test_rows_are_well_mixed_over_passes() -> None:
    """Over many passes, every row is as likely early as late."""
    mixture = Mixture([MixtureSource("a", 1, [4] * 8)], seed=3, streams=4, global_batch=4)
    places = Counter[tuple[int, int]]()
    for one_pass in passes(mixture, 0, 400):
        places.update({row: place for place, row in enumerate(one_pass)})
    means = np.asarray([places[group, row] / 400 for group in range(8) for row in range(4)])
    assert np.abs(means - 15.5).max() < 4 * math.sqrt((32**2 - 1) / 12 / 400)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_all_workers_together_read_each_row_group_about_once_a_pass(world: int) -> None:
    groups, streams = 50, 8
    mixture = Mixture(
        [MixtureSource("a", 3, [20] * groups), MixtureSource("b", 1, [7, 30] * 25)], seed=1, streams=8, global_batch=32
    )
    reads = Counter[int]()
    steps = 3 * groups * 20 * 4 // 3 // 32  # three passes of `a`
    for rank in range(world):
        cache: dict[int, OrderedDict[int, None]] = {0: OrderedDict(), 1: OrderedDict()}
        for step in range(steps):
            for slot in map(mixture.at, mixture.positions_of(step, rank, world)):
                held = cache[slot.source]
                reads[slot.source] += slot.row_group not in held
                held[slot.row_group] = None
                held.move_to_end(slot.row_group)
                if len(held) > mixture.row_groups_in_use(world):
                    held.popitem(last=False)
    assert reads[0] <= 3 * (groups + streams)
    assert reads[0] <= 1.2 * 3 * groups


@pytest.mark.parametrize("row_groups", [[1], [2, 1], [1, 1, 1], [50]])
def test_a_source_smaller_than_the_streams_is_repeated_whole(row_groups: list[int]) -> None:
    mixture = Mixture(
        [MixtureSource("small", 1, row_groups), MixtureSource("big", 1, [9] * 20)], seed=5, streams=8, global_batch=8
    )
    for one_pass in passes(mixture, 0, 5):
        assert len(set(one_pass)) == sum(row_groups)
    slots = [slot for slot in map(mixture.at, range(400)) if slot.source == 0]
    assert [slot.pass_number for slot in slots] == [k // sum(row_groups) for k in range(len(slots))]


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    def calls(position: int) -> int:
        mixture, seen = rooms(), 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        mixture.at(1)
        sys.setprofile(count)
        try:
            for offset in range(64):
                mixture.at(position + offset)
        finally:
            sys.setprofile(None)
        return seen

    assert calls(10**9) < 1.2 * calls(10)


def test_ten_thousand_files_open_within_seconds() -> None:
    start = time.perf_counter()
    mixture = Mixture(
        [MixtureSource("a", 0.7, [64] * 40_000), MixtureSource("b", 0.3, [64])], seed=0, streams=8, global_batch=8
    )
    assert isinstance(mixture.at(10**10), Slot)
    assert time.perf_counter() - start < 5


def test_weights_are_rounded_to_a_printed_period() -> None:
    assert period_counts([6, 1, 3, 3, 3]) == [6, 1, 3, 3, 3]
    assert period_counts([0.7, 0.3]) == [7, 3]
    assert period_counts([2, 2]) == [1, 1]
    assert period_counts([1 / 3, 2 / 3]) == [1, 2]
    lines = rooms().describe().splitlines()
    assert lines[0] == "a period of 16 draws in each of 8 streams:"
    assert lines[1] == "  referring: 6 of 16 = 0.3750 (asked 0.3750), 800 rows in 32 row groups"


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_rounded_shares_are_near_the_asked_ones(weights: list[float]) -> None:
    counts = np.asarray(held_or_rejected(weights))
    asked = np.asarray(weights) / sum(weights)
    assert np.all(np.abs(counts / counts.sum() / asked - 1) <= 0.05)


def test_a_share_that_no_period_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights: the smallest, 1, is a share of 0\.0001, which no period"):
        period_counts([9999, 1])


@pytest.mark.parametrize("counts", [(207, 120, 179, 118, 188), (84, 45, 170, 166, 133), (384, 98, 128, 63, 115)])
def test_long_periods_are_dealt_in_moments(counts: tuple[int, ...]) -> None:
    """Tables that a matching without marks on its dead ends did not deal within minutes."""
    table = Period.of(counts, 8)
    rows = np.arange(1, table.rows + 1)
    for source, count in enumerate(counts):
        drawn_PC = np.cumsum(table.source_PC == source, axis=0)
        assert np.all(np.abs(drawn_PC - (rows * count / sum(counts))[:, None]) < 1)


def test_state_resumes_at_the_next_step_and_refuses_another_mixture() -> None:
    mixture = rooms()
    state = mixture.state(3 * 32)
    assert state == {"position": 96, "digest": mixture.digest}
    assert rooms().step_of(state) == 3
    with pytest.raises(ValueError, match=rf"mixture {mixture.digest}, this is mixture {rooms(8).digest}"):
        rooms(8).step_of(state)
    with pytest.raises(ValueError, match="position 5"):
        mixture.step_of(mixture.state(5))


def test_digest_sees_weights_rows_tables_and_sizes() -> None:
    def digest(weight: float = 1, rows: int = 5, table: str = "x", streams: int = 2, batch: int = 4) -> str:
        sources = [MixtureSource("a", weight, [rows, 5], table), MixtureSource("b", 1, [3])]
        return Mixture(sources, seed=0, streams=streams, global_batch=batch).digest

    assert digest() == digest()
    others = (digest(weight=2), digest(rows=6), digest(table="y"), digest(streams=4), digest(batch=8))
    assert len({digest(), *others}) == 6


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"weight of source 'a': got {weight}"):
        Mixture([MixtureSource("a", weight, [1])], seed=0, streams=1, global_batch=1)


def test_wrong_sources_and_sizes_are_refused() -> None:
    one = [MixtureSource("a", 1, [1])]
    with pytest.raises(ValueError, match="no source"):
        Mixture([], seed=0, streams=1, global_batch=1)
    for row_groups in ([], [3, 0]):
        with pytest.raises(ValueError, match="row groups of source 'a'"):
            Mixture([MixtureSource("a", 1, row_groups)], seed=0, streams=1, global_batch=1)
    with pytest.raises(ValueError, match="global_batch 6, streams 4"):
        Mixture(one, seed=0, streams=4, global_batch=6)
    with pytest.raises(ValueError, match="share of 1e-06"):
        Mixture([*one, MixtureSource("rare", 1e-6, [1])], seed=0, streams=1, global_batch=1)
    mixture = Mixture(one, seed=0, streams=4, global_batch=4)
    with pytest.raises(ValueError, match="position: got -1"):
        mixture.at(-1)
    with pytest.raises(ValueError, match="worker 2 of 2"):
        mixture.positions_of(0, 2, 2)


def test_needs_no_torch() -> None:
    code = "import sys, perceptio.data.mixture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
