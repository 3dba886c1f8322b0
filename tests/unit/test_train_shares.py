"""What was drawn beside what was asked for: at every step, behind every change of weights, and as a table."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from perceptio.data.mixture import Mixture, MixtureSource, WeightChange
from tests.mixtures import vqa_and_boxes
from workflows.train_shares import counted, shares, shares_table

WEIGHTS = {0: (6.0, 1.0, 3.0), 9: (1.0, 5.0, 0.0), 20: (0.0, 1.0, 3.0)}  # from each of these steps


def changing(*limits: int | None) -> Mixture:
    tables = {"a": [5] * 7, "b": [3, 8], "c": [4]}
    sources = [
        MixtureSource(name, weight, groups, max_passes=limit)
        for (name, groups), weight, limit in zip(tables.items(), WEIGHTS[0], limits, strict=True)
    ]
    changes = [WeightChange(step, weights) for step, weights in WEIGHTS.items() if step]
    return Mixture(sources, seed=2, streams=4, global_batch=12, changes=changes)


def lines_of(mixture: Mixture, steps: int) -> list[dict[str, Any]]:
    """Lines as a run of so many steps has them."""
    found = []
    for step in range(steps):
        seen = Counter(mixture.at(step * mixture.global_batch + b).source for b in range(mixture.global_batch))
        found.append({"step": step + 1, "samples": {mixture.sources[number].name: n for number, n in seen.items()}})
    return found


@pytest.mark.parametrize("limits", [(None, None, None), (2, None, 3)])
def test_the_periods_share_is_what_is_drawn_at_every_step(limits: tuple[int | None, ...]) -> None:
    mixture = changing(*limits)
    lines = lines_of(mixture, 30)
    for step in range(1, 31):
        found = shares(mixture, step, counted(lines[:step]))
        for of in found.values():
            assert of["period"] == of["share"]
        assert sum(of["samples"] for of in found.values()) == 12 * step
        assert sum(of["asked"] for of in found.values()) == pytest.approx(1)


def test_the_asked_share_is_the_mean_of_what_the_weights_said() -> None:
    mixture = changing(None, None, None)
    per_step = [max(itertools.takewhile(lambda first, s=step: first <= s, WEIGHTS)) for step in range(30)]
    for step in (1, 9, 10, 20, 21, 30):
        expected = np.mean([np.array(WEIGHTS[first]) / sum(WEIGHTS[first]) for first in per_step[:step]], axis=0)
        found = shares(mixture, step, {})
        assert [of["asked"] for of in found.values()] == pytest.approx(expected.tolist())


def test_what_was_not_counted_is_seen() -> None:
    found = shares(vqa_and_boxes(), 2, {"vqa": 10, "boxes": 6})
    assert found["boxes"] == {"asked": 0.25, "period": 0.25, "share": 0.375, "samples": 6, "passes": 1.5}


def test_the_table_says_all_of_it() -> None:
    mixture = vqa_and_boxes()
    title, head, *rows = shares_table(mixture, lines_of(mixture, 5)).splitlines()
    assert title.startswith("what 5 steps drew")
    assert head.split() == ["entry", "asked", "of", "the", "periods", "drawn", "samples", "passes"]
    assert [row.split() for row in rows] == [
        ["vqa", "0.7500", "0.7500", "0.7500", "30", "3.00"],
        ["boxes", "0.2500", "0.2500", "0.2500", "10", "2.50"],
    ]
