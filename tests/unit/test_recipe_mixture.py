"""The mixture as a recipe says it: weights or a temperature, changes over the steps, passes; faults named by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perceptio.data.mixture import weights_by_size
from schemas.recipe import RecipeError, TrainRecipe
from schemas.recipe_file import load_recipe

ROOMS = Path(__file__).parents[2] / "workflows" / "recipes" / "rooms.yaml"
TASK = {"segmentation": False, "depth": True}


def entry(source: str, **more: Any) -> dict[str, Any]:
    return {"source": source, **TASK, **more}


def train(mixture: list[dict[str, Any]], **settings: Any) -> TrainRecipe:
    settings = {"train.mixture": mixture} | {f"train.{name}": value for name, value in settings.items()}
    return load_recipe(ROOMS, overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()]).train


def test_weights_come_from_sizes_where_there_is_a_temperature() -> None:
    assert weights_by_size([100, 300], 1) == pytest.approx([0.25, 0.75])
    assert weights_by_size([100, 900], 2) == pytest.approx([0.25, 0.75])
    assert weights_by_size([1, 10**9], 1e6) == pytest.approx([0.5, 0.5], abs=1e-4)
    assert weights_by_size([10**12, 10**12], 0.01) == pytest.approx([0.5, 0.5])  # no power overflows


def test_one_source_may_stand_in_two_tasks_under_two_names() -> None:
    two = train([entry("boxes", weight=1), entry("boxes", name="boxes in words", boxes=100, weight=3)])
    assert [one.called for one in two.mixture] == ["boxes", "boxes in words"]


@pytest.mark.parametrize(
    ("mixture", "settings", "message"),
    [
        ([entry("boxes", weight=-1)], {}, "'train.mixture.0.weight' = -1: Input should be greater than 0"),
        ([entry("boxes", weight=0)], {}, "'train.mixture.0.weight' = 0: Input should be greater than 0"),
        (
            [entry("boxes", weight=float("nan"))],
            {},
            "'train.mixture.0.weight' = 'NaN': Input should be a finite number",
        ),
        ([entry("boxes", weight=1, max_passes=0)], {}, "'train.mixture.0.max_passes' = 0"),
        ([entry("boxes"), entry("vqa", weight=1)], {}, r"mixture: ['boxes'] have no weight, expected one each"),
        ([entry("boxes", weight=1)], {"temperature": 2}, "temperature is 2, and ['boxes'] have weights too"),
        ([entry("boxes", weight=1)] * 2, {}, "entries are named twice: ['boxes']"),
        (
            [entry("boxes", weight=1)],
            {"schedule": [{"step": 5, "weights": {"boxs": 1}}]},
            "schedule: the weights from step 5 name ['boxs'], expected each of ['boxes']",
        ),
        (
            [entry("boxes", weight=1)],
            {"schedule": [{"step": 5, "weights": {"boxes": 0}}]},
            "schedule: the weights from step 5 are all 0",
        ),
        (
            [entry("boxes", weight=1)],
            {"schedule": [{"step": s, "weights": {"boxes": 1}} for s in (5, 5)]},
            "schedule: step 5 comes after step 5 of 250, expected rising steps",
        ),
        (
            [entry("boxes", weight=1)],
            {"schedule": [{"step": 250, "weights": {"boxes": 1}}]},
            "schedule: step 250 comes after step 0 of 250",
        ),
    ],
)
def test_a_fault_is_named_with_what_was_seen(mixture: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        train(mixture, **settings)
    assert message in str(error.value)


def test_a_run_may_have_as_many_workers_as_there_is_room_for() -> None:
    elastic = train([entry("depth", weight=1)], workers=[1, 2])
    assert list(elastic.possible_workers) == [1, 2] and elastic.most_workers == 2
    fixed = train([entry("depth", weight=1)], workers=2)
    assert list(fixed.possible_workers) == [2] and fixed.most_workers == 2


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([2, 1], r"workers is \[2, 1\], expected \[fewest, most\]"),
        ([2, 4], r"must both divide by every possible and allowed number of workers; 3 does not"),
        ([0, 2], r"train\.workers"),
    ],
)
def test_numbers_of_workers_that_cannot_be_are_refused(workers: list[int], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        train([entry("depth", weight=1)], workers=workers)
