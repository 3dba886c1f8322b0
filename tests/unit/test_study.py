"""The study's arms: what each changes of the recipe and what it leaves, and that its finished runs are the recipe's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.study import StudyArm, StudyRecipe
from workflows import study

RECIPE = Path(study.__file__).parent / "recipes" / "rooms_study.yaml"
RESULTS = Path(study.__file__).parents[1] / "docs" / "study"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPE)


def test_the_shipped_study_has_the_arms_of_the_method_and_seeds_for_each(recipe: Recipe) -> None:
    assert recipe.study is not None
    seeds = {arm.name: len(arm.seeds) for arm in recipe.study.arms}
    assert {"text", "segmentation", "plain", "objectives", "full", "after_text"} <= set(seeds)
    assert {arm.codes for arm in recipe.study.arms} == {"own", "oracle", "shuffled", "other"}
    assert all(seeds[name] >= 3 for name in ("text", "plain", "full"))
    order = [(arm.name, seed) for arm, seed in study.in_order(recipe)]
    assert len(set(order)) == len(order) == sum(seeds.values())
    forced = [arm.name for arm in recipe.study.arms if arm.codes != "own"]
    first = order.index(("full", 1))
    assert [name for name, _ in order[first + 1 : first + 1 + len(forced)]] == forced, "they ask the model that stands"


def test_arms_differ_in_what_they_name_alone(recipe: Recipe) -> None:
    assert recipe.study is not None
    own = {arm.name: study.arm_recipe(recipe, arm, arm.seeds[0]) for arm in recipe.study.arms}
    for found in own.values():
        assert found.sources == recipe.sources and found.codebook == recipe.codebook
        assert found.train.steps == recipe.train.steps
        assert [e.source for e in found.train.mixture] == [e.source for e in recipe.train.mixture]
        assert [e.weight for e in found.train.mixture] == [e.weight for e in recipe.train.mixture]
    terms = ("marker", "token", "count", "reconstruction")
    on = {name: [bool(getattr(r.train.losses, term)) for term in terms] for name, r in own.items()}
    assert not any(on["text"]) and not any(on["segmentation"]) and not any(on["plain"])
    assert on["objectives"] == [True, True, True, False] and all(on["full"])
    assert own["plain"].train.losses.plain and not own["full"].train.losses.plain
    assert not any(e.segmentation or e.depth for e in own["text"].train.mixture)
    assert own["text"].train.mixture[0].boxes == 100, "what others segment, it answers by a box in words"
    assert own["after_text"].model.depth_after_text and not own["full"].model.depth_after_text
    assert own["full_oracle"].train == own["full"].train and own["full_oracle"].model == own["full"].model


def test_another_seed_changes_the_run_and_not_the_data(recipe: Recipe) -> None:
    assert recipe.study is not None
    arm = recipe.study.arms[0]
    one, two = (study.arm_recipe(recipe, arm, seed) for seed in (1, 2))
    assert one.digest != two.digest and one.sources == two.sources


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "b", "against": ("c",)}, r"against \['c'\]"),
        ({"name": "a"}, "two arms are called 'a'"),
        ({"name": "b", "depth": "none", "codes": "oracle"}, "writes no depth tokens"),
    ],
)
def test_arms_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    first = StudyArm(name="a", title="A", segmentation=True, depth="plain", seeds=(1,))
    with pytest.raises(ValidationError, match=message):
        StudyRecipe(arms=(first, StudyArm.model_validate(first.model_dump() | changes)))


def test_finished_runs_are_of_the_recipe_as_it_stands(recipe: Recipe) -> None:
    """Else `perceptio study` would refuse them: a change of the recipe wants other runs, or none of its digest."""
    arms = {arm.name: arm for arm in recipe.study.arms} if recipe.study else {}
    files = sorted(path for path in RESULTS.glob("*.json") if path.name != "study.json")
    assert files, "no finished run is committed"
    for path in files:
        made = json.loads(path.read_text())
        assert made["settings"] == study.arm_recipe(recipe, arms[made["arm"]], made["seed"]).digest, path.name
        assert made["seed"] in arms[made["arm"]].seeds and path.name == f"{made['arm']}-{made['seed']}.json"


def test_arms_of_one_seed_were_trained_and_asked_on_the_same_data() -> None:
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*.json") if path.name != "study.json"]
    for seed in {made["seed"] for made in found}:
        own = [made for made in found if made["seed"] == seed]
        data = ("codebook", "samples/referring", "samples/points", "samples/vqa")
        assert len({tuple(made["inputs"][name] for name in data) for made in own}) == 1
        every = set().union(*(made["scenes"] for made in own))
        masks = [made for made in own if "referring_ciou" in made["metrics"]]
        assert all(set(made["scenes"]) == every for made in masks), "some rooms have nothing to ask but for masks"
        models = {json.dumps(made["inputs"], sort_keys=True): made["model"] for made in own}
        assert all(models[json.dumps(made["inputs"], sort_keys=True)] == made["model"] for made in own)
