"""The recipe's mixture over its tables: shares by size, changes over the steps, an end that comes too soon."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceptio.data.mixture import Mixture
from perceptio.data.shards import SampleTable
from perceptio.train.feed import mixture_of
from schemas.recipe_file import load_recipe
from tests.samples import write

ROOMS = Path(__file__).parents[2] / "workflows" / "recipes" / "rooms.yaml"
SMALL, BIG = 16, 144
Make = Callable[..., Mixture]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The mixture of a table of SMALL rows ("boxes") and one of BIG ("vqa"), under settings of `train`."""
    tables = [SampleTable(str(tmp_path), write(tmp_path, n, source=s)) for s, n in (("boxes", SMALL), ("vqa", BIG))]

    def make(of_small: dict[str, Any], of_big: dict[str, Any], **settings: Any) -> Mixture:
        sizes = {"steps": 10, "global_batch": 8, "micro_batch": 4, "workers": 1, "allowed_workers": [1], "streams": 8}
        task = {"segmentation": False, "depth": True}
        mixture = [{"source": "boxes", **task, **of_small}, {"source": "vqa", **task, **of_big}]
        values = {f"train.{key}": value for key, value in (sizes | settings | {"mixture": mixture}).items()}
        recipe = load_recipe(ROOMS, overrides=[f"{key}={json.dumps(value)}" for key, value in values.items()])
        return mixture_of(recipe.train, tables, seed=1)

    return make


def shares(mixture: Mixture, first: int = 0, count: int = 800) -> list[float]:
    seen = Counter(mixture.at(position).source for position in range(first, first + count))
    return [seen[source] / count for source in range(2)]


def test_shares_follow_weights_or_sizes(make: Make) -> None:
    assert shares(make({"weight": 3}, {"weight": 1})) == [0.75, 0.25]
    assert shares(make({}, {}, temperature=1)) == [0.1, 0.9]
    assert shares(make({}, {}, temperature=2)) == [0.25, 0.75]
    assert shares(make({"repeats": 9}, {}, temperature=1)) == [0.5, 0.5]


def test_shares_change_at_the_step_that_the_schedule_names(make: Make) -> None:
    later = [{"step": 4, "weights": {"boxes": 1, "vqa": 3}}, {"step": 6, "weights": {"boxes": 0, "vqa": 1}}]
    mixture = make({"weight": 1}, {"weight": 1}, schedule=later)
    assert shares(mixture, 0, 32) == [0.5, 0.5]
    assert shares(mixture, 32, 16) == [0.25, 0.75]
    assert shares(mixture, 48, 400) == [0, 1]


def test_a_mixture_that_ends_before_the_steps_do_is_refused_with_both_numbers(make: Make) -> None:
    passes = {"weight": 1, "max_passes": 1}
    assert make(passes, passes, steps=20).steps == (SMALL + BIG) // 8
    with pytest.raises(ValueError, match=r"train.steps is 21, but the mixture ends after 20 global batches of 8"):
        make(passes, passes, steps=21)
    assert make(passes, {"weight": 1}, steps=9999).steps is None
