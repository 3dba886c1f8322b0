"""Weights that change over the steps, and sources that are read so often and no more."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.data.mixture import Mixture, MixtureSource, Slot, WeightChange
from tests.mixtures import mixtures

CHANGES = (WeightChange(9, (1, 5, 0)), WeightChange(40, (0, 1, 3)), WeightChange(47, (2, 2, 2)))


def changing(*changes: WeightChange, limits: tuple[int | None, ...] = (None, None, None)) -> Mixture:
    tables = {"a": (6, [5] * 7), "b": (1, [3, 8]), "c": (3, [4])}
    sources = [MixtureSource(n, w, g, max_passes=m) for (n, (w, g)), m in zip(tables.items(), limits, strict=True)]
    return Mixture(sources, seed=2, streams=4, global_batch=12, changes=changes)


def drawn(mixture: Mixture, source: int, end: int) -> list[Slot]:
    return [slot for slot in map(mixture.at, range(end)) if slot.source == source]


def test_weights_change_at_the_steps_named_and_hold_at_every_prefix_from_there() -> None:
    mixture = changing(*CHANGES)
    marks = [0, *(change.step * 12 for change in CHANGES), 100 * 12]
    asked = [(6, 1, 3), *(change.weights for change in CHANGES)]
    for first, end, weights in zip(marks[:-1], marks[1:], asked, strict=True):
        shares, total = np.asarray(weights) / sum(weights), np.zeros(3)
        for position in range(first, end):
            total[mixture.at(position).source] += 1
            if (position - first + 1) % 4 == 0:
                assert np.all(np.abs(total - shares * (position - first + 1)) < 1 + 1e-9), position


@pytest.mark.parametrize("source", [0, 1, 2])
def test_passes_go_on_across_a_change_of_weights(source: int) -> None:
    mixture = changing(*CHANGES)
    rows = sum(mixture.sources[source].row_groups)
    slots = drawn(mixture, source, 100 * 12)
    whole = [slots[k : k + rows] for k in range(0, len(slots) - rows + 1, rows)]
    assert len(whole) >= 5
    for number, one_pass in enumerate(whole):
        assert {slot.pass_number for slot in one_pass} == {number}
        assert len({(slot.row_group, slot.row) for slot in one_pass}) == rows


def test_a_source_is_read_as_often_as_it_may_and_every_row_as_often() -> None:
    mixture = changing(limits=(2, None, 3))
    for source, often in ((0, 2), (2, 3)):
        seen = Counter((slot.row_group, slot.row) for slot in drawn(mixture, source, 4000))
        assert set(seen.values()) == {often}
        assert len(seen) == sum(mixture.sources[source].row_groups)
    assert mixture.steps is None
    assert {mixture.at(p).source for p in range(4000, 5000)} == {1}, "what is left goes to the others"


def test_a_mixture_of_spent_sources_ends_and_leaves_less_than_a_row_of_streams() -> None:
    mixture = changing(*CHANGES, limits=(2, 3, 1))
    end = mixture.phases.end
    assert end is not None and 2 * 35 + 3 * 11 + 4 - 4 < end <= 2 * 35 + 3 * 11 + 4
    slots = [mixture.at(position) for position in range(end)]
    assert len(set(slots)) == end, "no row twice in a pass"
    assert mixture.steps == end // 12
    with pytest.raises(ValueError, match=rf"position: got {end}, expected 0 or more, below {end}"):
        mixture.at(end)
    assert mixture.describe().endswith(f"all sources are spent after {end // 12} global batches")


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.data())
def test_every_row_comes_once_a_pass_however_weights_change_and_sources_end(
    plain: Mixture, data: st.DataObject
) -> None:
    count = len(plain.sources)
    steps = sorted(data.draw(st.sets(st.integers(1, 30), max_size=3)))
    weights = st.tuples(*[st.integers(0, 4).map(float)] * count).filter(any)
    limits = data.draw(st.tuples(*[st.none() | st.integers(1, 3)] * count))
    sources = [dataclasses.replace(s, max_passes=limit) for s, limit in zip(plain.sources, limits, strict=True)]
    changes = [WeightChange(step, data.draw(weights)) for step in steps]
    mixture = Mixture(sources, seed=plain.seed, streams=plain.streams, global_batch=plain.global_batch, changes=changes)
    end = min(600, 600 if mixture.phases.end is None else mixture.phases.end)
    seen: dict[int, list[Slot]] = defaultdict(list)
    for position in range(end):
        slot = mixture.at(position)
        seen[slot.source].append(slot)
    for source, slots in seen.items():
        rows, limit = sum(sources[source].row_groups), limits[source]
        assert [slot.pass_number for slot in slots] == [k // rows for k in range(len(slots))]
        assert len({slot[1:] for slot in slots}) == len(slots), "no row twice in a pass"
        assert limit is None or len(slots) <= limit * rows
    left = sum((limit or 0) * sum(s.row_groups) for s, limit in zip(sources, limits, strict=True))
    if mixture.phases.end is not None and mixture.phases.end < 600 and None not in limits:
        begun = [change.weights for change in changes if change.step * mixture.global_batch <= end]
        if not begun or all(begun[-1]):
            assert left - end < mixture.streams


def test_seeking_costs_the_same_behind_every_change() -> None:
    mixture = changing(*CHANGES, limits=(2, None, None))
    assert mixture.at(10**12).pass_number > 10**9
    assert len(mixture.phases.found) <= 2 * (len(CHANGES) + 1) + 1


def test_wrong_changes_are_refused() -> None:
    with pytest.raises(ValueError, match="step 9 comes after step 9, expected rising steps"):
        changing(WeightChange(9, (1, 1, 1)), WeightChange(9, (1, 1, 1)))
    with pytest.raises(ValueError, match="step 0 comes after step 0"):
        changing(WeightChange(0, (1, 1, 1)))
    for weights in ((1.0, 1.0), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"weights from step 3: got .*, expected 3 numbers from 0, not all 0"):
            changing(WeightChange(3, weights))
    with pytest.raises(ValueError, match="max_passes of source 'a': got 0, expected at least 1"):
        changing(limits=(0, None, None))


def test_the_digest_sees_changes_and_limits_that_matter() -> None:
    others = (changing(), changing(*CHANGES), changing(*CHANGES[:2]), changing(limits=(1, None, None)))
    assert len({mixture.digest for mixture in others}) == 4
