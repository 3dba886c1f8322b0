"""The study's arms: what each changes of the recipe and what it leaves; figures over seeds and paired by scene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.study import StudyArm, StudyRecipe
from workflows import study, study_page
from workflows.store import open_root

RECIPE = Path(study.__file__).parent / "recipes" / "rooms_study.yaml"


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


def run(arm: str, seed: int, right: dict[str, int]) -> dict[str, Any]:
    """A finished run whose yes/no questions, one a scene, were answered so; scenes 1 and more of them."""
    metric = {"baseline": 0.5, "against": "usual training answer", "n": len(right)}
    metrics = dict.fromkeys(("yes_no_accuracy", "reconstruction_mae"), metric)
    metrics["well_formed_without_grammar"] = metric | {"baseline": 0.0, "against": "none"}
    marks = [list(right.values()), [1] * len(right)]
    return {
        "arm": arm,
        "seed": seed,
        "code": "c",
        "machine": "m",
        "precision": "fp32",
        "inputs": {"codebook": "0123456789abcdef"},
        "seconds": {"train": 1, "evaluate": 2},
        "scenes": list(right),
        "metrics": metrics,
        "marks": dict.fromkeys(metrics, marks),
    }


def test_seeds_are_added_by_scene_and_arms_paired_by_it(recipe: Recipe, tmp_path: Path) -> None:
    arms = (
        StudyArm(name="a", title="Arm A", segmentation=False, depth="none", seeds=(1, 2)),
        StudyArm(name="b", title="Arm <B>", segmentation=False, depth="none", seeds=(1,), against=("a",)),
    )
    small = recipe.model_copy(update={"study": StudyRecipe(arms=arms)})
    runs = [
        run("a", 1, {"x": 0, "y": 0, "z": 1}),
        run("a", 2, {"x": 1, "y": 1, "z": 1}),
        run("b", 1, {"x": 1, "y": 1, "z": 1, "only here": 0}),
    ]
    page = study_page.write(small, open_root(str(tmp_path)), runs)
    summary = json.loads((tmp_path / "study.json").read_text())
    value = summary["values"]["a"]["yes_no_accuracy"]
    assert value["value"] == pytest.approx(4 / 6, abs=1e-4) and value["seeds"] == {"1": 0.3333, "2": 1.0}
    assert value["questions"] == 3 and value["baseline"] == 0.5
    free = summary["values"]["a"]["well_formed_without_grammar"]
    assert free["value"] == value["value"] and free["baseline"] is None, "it stands beside nothing, not beside 0"
    apart = summary["differences"]["b"]["a"]["yes_no_accuracy"]
    assert apart["value"] == pytest.approx(2 / 3, abs=1e-4), "seed 1 against seed 1, on the scenes that both have"
    assert apart["seeds"] == ["1"]
    assert summary["values"]["b"]["words"]["value"] == 0.75
    text = Path(page).read_text()
    assert "Arm &lt;B&gt;" in text and "Arm <B>" not in text
    assert "baseline none" in text
