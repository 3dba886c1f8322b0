"""The study's figures against values counted by hand, and its page: seeds, pairs, verdicts, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.study import StudyArm, StudyRecipe
from workflows import study, study_page
from workflows.scores import NO_BASELINE
from workflows.store import open_root
from workflows.study_figures import differences, replies, values

DRAW = {"resamples": 200, "seed": 0}
SCENES = tuple("stuvwxyz")


def run(arm: str, seed: int, **right: list[float]) -> dict[str, Any]:
    """A finished run; each figure's marks by scene, one question each, judged a little above its blind baseline."""
    metrics = {
        name: {
            "baseline": 0.0 if name.startswith("well") else 0.5,
            "against": NO_BASELINE if name.startswith("well") else "usual training answer",
            "n": len(marks),
            "difference_low": 0.1,
            "difference_high": 0.2,
            "higher_is_better": not name.endswith("mae"),
        }
        for name, marks in right.items()
    }
    return {
        "arm": arm,
        "seed": seed,
        "code": "c",
        "machine": "m",
        "precision": "fp32",
        "inputs": {"codebook": "0123456789abcdef"},
        "seconds": {"train": 60, "evaluate": 120},
        "scenes": list(SCENES[: max(len(marks) for marks in right.values())]),
        "metrics": metrics,
        "marks": {name: [marks, [1] * len(marks)] for name, marks in right.items()},
        "curves": {"step": [10, 20], "text": [2, 1], "token": [0, 0], "gradient_norm": [3, 1]},
    }


def arm(name: str, seeds: tuple[int, ...] = (1,), against: tuple[str, ...] = (), **more: Any) -> StudyArm:
    settings = {"title": f"Arm <{name}>", "segmentation": False, "depth": "none"} | more
    return StudyArm(name=name, seeds=seeds, against=against, **settings)


def test_seeds_are_added_by_scene() -> None:
    runs = {"1": run("a", 1, yes_no_accuracy=[0, 0, 1]), "2": run("a", 2, yes_no_accuracy=[1, 1, 1])}
    found = values(runs, DRAW, forced=False)
    value = found["yes_no_accuracy"]
    assert value.value == pytest.approx(4 / 6, abs=1e-4) and value.seeds == {"1": 0.3333, "2": 1.0}
    assert (value.scenes, value.questions, value.baseline) == (3, 3, 0.5)
    assert value.verdicts == {"1": "better", "2": "better"}
    assert found["words"].value == value.value and found["words"].verdicts == {}


def test_a_figure_that_stands_alone_has_no_baseline() -> None:
    found = values({"1": run("a", 1, well_formed_without_grammar=[1, 0])}, DRAW, forced=False)
    assert found["well_formed_without_grammar"].baseline is None
    assert found["well_formed_without_grammar"].verdicts == {}


def test_points_are_counted_as_questions_though_their_weights_are_not() -> None:
    """Three questions of 3 points and one of 5: a scene may have both, and each size weighs the same together."""
    made = run("a", 1, closest_point_accuracy=[1, 0, 1])
    made["marks"]["closest_point_accuracy"] = [[1 / 3, 0, 1], [1 / 3, 1 / 3, 1 / 3 + 1]]
    made["marks"]["closest_point_accuracy_3"] = [[1 / 3, 0, 0], [1 / 3, 1 / 3, 1 / 3]]
    made["marks"]["closest_point_accuracy_5"] = [[0, 0, 1], [0, 0, 1]]
    made["metrics"] |= dict.fromkeys(made["marks"], made["metrics"]["closest_point_accuracy"])
    found = values({"1": made}, DRAW, forced=False)
    assert found["closest_point_accuracy"].questions == 4
    assert found["closest_point_accuracy_3"].questions == 3
    assert found["closest_point_accuracy"].value == pytest.approx((1 / 3 + 1) / 2, abs=1e-4)


def test_arms_are_paired_by_seed_and_scene() -> None:
    by_arm = {
        "a": {"1": run("a", 1, yes_no_accuracy=[0, 0, 1]), "2": run("a", 2, yes_no_accuracy=[1, 1, 1])},
        "b": {"1": run("b", 1, yes_no_accuracy=[1, 1, 1, 0])},  # and a scene that the other has not
    }
    apart = differences(arm("b", against=("a",)), by_arm, DRAW)["a"]["yes_no_accuracy"]
    assert apart.value == pytest.approx(2 / 3, abs=1e-4) and apart.seeds == {"1": 0.6667}


def test_better_is_said_only_where_every_seed_agrees() -> None:
    zeros, ones = [0.0] * 8, [1.0] * 8
    some = [0.0] * 7 + [1.0]
    by_arm = {
        "a": {"1": run("a", 1, yes_no_accuracy=zeros), "2": run("a", 2, yes_no_accuracy=some)},
        "b": {"1": run("b", 1, yes_no_accuracy=ones), "2": run("b", 2, yes_no_accuracy=ones)},
        "c": {"1": run("c", 1, yes_no_accuracy=ones), "2": run("c", 2, yes_no_accuracy=zeros)},
    }
    b = differences(arm("b", (1, 2), ("a",)), by_arm, DRAW)["a"]["yes_no_accuracy"]
    c = differences(arm("c", (1, 2), ("a",)), by_arm, DRAW)["a"]["yes_no_accuracy"]
    assert (b.verdict, c.verdict) == ("better", "open")
    assert c.low > 0 and c.seeds == {"1": 1.0, "2": -0.125}, "its interval alone would have said better"


def test_an_error_that_grows_is_worse() -> None:
    by_arm = {
        "a": {"1": run("a", 1, generated_depth_mae=[0.1] * 8)},
        "b": {"1": run("b", 1, generated_depth_mae=[0.2] * 8)},
    }
    assert differences(arm("b", against=("a",)), by_arm, DRAW)["a"]["generated_depth_mae"].verdict == "worse"


def test_forced_codes_are_no_findings_about_codes_maps_and_masks() -> None:
    made = {
        name: {"1": run(name, 1, generated_depth_mae=[0.1], well_formed_without_grammar=[1], yes_no_accuracy=[1])}
        for name in ("full", "oracle")
    }
    oracle = arm("oracle", against=("full",), depth="soft_merging", codes="oracle")
    assert set(values(made["oracle"], DRAW, forced=True)) == {"yes_no_accuracy", "words"}
    assert set(differences(oracle, made, DRAW)["full"]) == {"yes_no_accuracy", "words"}


def test_replies_are_right_wrong_or_no_answer() -> None:
    made = run("a", 1, yes_no_accuracy=[1, 0, 0, 0], yes_no_readable=[1, 1, 0, 0])
    assert replies([made], "yes_no") == (0.25, 0.25, 0.5)
    assert replies([made], "count") is None


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(Path(study.__file__).parent / "recipes" / "rooms_study.yaml")


def test_the_page_says_whose_what_and_beside_what(recipe: Recipe, tmp_path: Path) -> None:
    arms = (arm("a", (1, 2)), arm("b", (1,), ("a",)))
    small = recipe.model_copy(update={"study": StudyRecipe(arms=arms, notes=("Mind the <gap>.",))})
    figures = {"yes_no_accuracy": [0, 0, 1], "yes_no_readable": [1, 0, 1], "well_formed_without_grammar": [1, 1, 0]}
    runs = [run("a", 1, **figures), run("a", 2, **figures), run("b", 1, **figures)]
    page = Path(study_page.write(small, open_root(str(tmp_path)), runs, "perceptio study --results out")).read_text()
    for part in (
        "Arm &lt;b&gt;",
        "Mind the &lt;gap&gt;.",
        "perceptio study --results out",
        "0.333 / 0.333",
        "of 0.500",
    ):
        assert part in page, part
    assert "Arm <b>" not in page and "9 minutes" in page
    assert "blind none" in page, "a figure that stands alone"
    assert "right 33.3 %, wrong 33.3 %, no answer 33.3 %" in page
    assert page.count("<polyline") == 2 * 2, "words and gradient of two arms, which write no codes"
    summary = json.loads((tmp_path / "study" / "study.json").read_text())
    assert summary["command"] == "perceptio study --results out" and len(summary["runs"]) == 3
