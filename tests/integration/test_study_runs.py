"""A study of tiny arms on real training and evaluation: what each run leaves, what is not done twice or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from schemas.recipe import Recipe
from schemas.study import StudyArm, StudyRecipe
from tests.tables import SCENES, fill, published, recipe_in
from tests.tiny import tiny_parts
from workflows import pipeline, study
from workflows.store import OtherInputsError, StageError, open_root

KINDS = ["referring", "points", "count", "yes_no"]
ARMS = (
    StudyArm(name="text", title="Text", segmentation=False, depth="none", seeds=(1,)),
    StudyArm(name="full", title="Full", segmentation=True, depth="soft_merging", seeds=(1,), against=("text",)),
    StudyArm(
        name="oracle",
        title="Oracle",
        segmentation=True,
        depth="soft_merging",
        codes="oracle",
        seeds=(1,),
        against=("full",),
    ),
)


def recipe_under(folder: Path, parts: Path) -> Recipe:
    def rooms(name: str, seed: int, held_out: bool) -> dict[str, Any]:
        source = {"name": name, "format": "rooms", "count": SCENES, "size": 64, "seed": seed, "exact_masks": True}
        return source | {"questions": KINDS, "held_out": held_out}

    settings = {
        "sources": [rooms("training", 1, False), rooms("heldout", 2, True)],
        "train__mixture": [
            {"source": "training", "weight": 1, "kinds": ["referring"], "segmentation": True, "depth": True}
        ],
        "train__steps": 2,
        "train__checkpoint_every": 1,
        "train__global_batch": 8,
        "train__micro_batch": 4,
        "model__max_length": 512,
        "evaluate__blank": 0,
        "evaluate__untrained": False,
    }
    return recipe_in(folder, parts, **settings).model_copy(update={"study": StudyRecipe(arms=ARMS)})


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("studied")
    tiny_parts(folder / "parts")
    recipe = recipe_under(folder / "root", folder / "parts")
    root = open_root(recipe.root)
    fill(recipe, root, published(root, folder / "parts" / "codebook", "codebook", {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DATA", {})  # its tables stand
        study.run(recipe)
    return recipe


def results(recipe: Recipe) -> dict[str, dict[str, Any]]:
    folder = Path(recipe.root) / "study"
    return {arm.name: json.loads((folder / f"{arm.name}-1.json").read_text()) for arm in ARMS}


def test_every_arm_leaves_its_figures_and_their_sums_by_scene(studied: Recipe) -> None:
    found = results(studied)
    assert "referring_ciou" not in found["text"]["metrics"] and "generated_depth_mae" not in found["text"]["metrics"]
    assert {"referring_ciou", "generated_depth_mae"} <= set(found["full"]["metrics"])
    for run in found.values():
        assert len(run["scenes"]) == SCENES and run["precision"] in ("fp32", "bf16_autocast")
        for name, metric in run["metrics"].items():
            numerator, denominator = (sum(row) for row in run["marks"][name])
            assert numerator / denominator == pytest.approx(metric["value"], abs=1e-5), name


def test_forced_codes_are_asked_of_the_same_model_and_are_the_teachers(studied: Recipe) -> None:
    full, oracle = results(studied)["full"], results(studied)["oracle"]
    assert oracle["inputs"] == full["inputs"] and oracle["seconds"]["train"] < 5 < full["seconds"]["train"]
    assert oracle["model"] == full["model"] != results(studied)["text"]["model"]
    assert "well_formed_without_grammar" in full["metrics"], "but codes are forced by the grammar alone"
    assert "well_formed_without_grammar" not in oracle["metrics"]
    assert oracle["metrics"]["code_accuracy"]["value"] == 1 > full["metrics"]["code_accuracy"]["value"]
    ceiling = oracle["metrics"]["reconstruction_mae"]["value"]
    assert oracle["metrics"]["generated_depth_mae"]["value"] == pytest.approx(ceiling)


def test_the_page_pairs_arms_and_names_what_it_came_from(studied: Recipe) -> None:
    folder = Path(studied.root)
    summary = json.loads((folder / "study" / "study.json").read_text())
    apart = summary["differences"]["full"]["text"]["yes_no_accuracy"]
    own, other = (results(studied)[name]["metrics"]["yes_no_accuracy"]["value"] for name in ("full", "text"))
    assert apart["value"] == pytest.approx(own - other, abs=1e-4) and list(apart["seeds"]) == ["1"]
    assert "code_accuracy" not in summary["differences"]["oracle"]["full"], "it says nothing of codes that are forced"
    page = (folder / "study.html").read_text()
    assert all(arm.title in page for arm in ARMS) and summary["command"] in page


def test_curves_outlive_the_checkpoints(studied: Recipe) -> None:
    for name, found in results(studied).items():
        assert found["curves"]["step"] == [2], "two steps are one mean"
        parts = {"text"} if name == "text" else {"text", "token", "reconstruction", "mask_dice"}
        assert found["curves"].keys() == {"step", "gradient_norm"} | parts, "no curve of what an arm does not train"
        assert found["curves"]["gradient_norm"][0] > 0


def test_codes_forced_on_another_model_than_the_one_compared_are_refused(studied: Recipe, tmp_path: Path) -> None:
    shutil.copytree(Path(studied.root) / "study", tmp_path / "study")
    (tmp_path / "study" / "oracle-1.json").unlink()
    made = tmp_path / "study" / "full-1.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"model": "another's"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DATA", {})
        with pytest.raises(OtherInputsError, match=r"full-1\.json: its model is another's, the same training made"):
            study.run(studied, str(tmp_path))


def test_a_finished_study_trains_and_asks_nothing(studied: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run", None)  # calling it would fail
    page = Path(studied.root) / "study.html"
    page.unlink()
    assert study.run(studied) == str(page) and page.exists()


def test_a_run_made_with_other_settings_is_refused(studied: Recipe) -> None:
    longer = studied.train.model_copy(update={"steps": 3})
    with pytest.raises(OtherInputsError, match=r"text-1\.json: was made with settings"):
        study.run(studied.model_copy(update={"train": longer}))


def test_a_seed_is_not_finished_on_other_data(studied: Recipe, tmp_path: Path) -> None:
    shutil.copytree(Path(studied.root) / "study", tmp_path / "study")
    (tmp_path / "study" / "full-1.json").unlink()
    made = tmp_path / "study" / "text-1.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"inputs": {"codebook": "another's"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DATA", {})
        with pytest.raises(OtherInputsError, match=r"text-1\.json: its codebook is another's.*finish a seed where"):
            study.run(studied, str(tmp_path))


def test_a_model_that_is_none_of_the_studys_is_left_alone(studied: Recipe) -> None:
    root = open_root(studied.root)
    other = studied.train.model_copy(update={"steps": 4})
    foreign = studied.model_copy(update={"train": other, "study": StudyRecipe(arms=ARMS[:1])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DATA", {})
        with pytest.raises(StageError, match="a root of its own"):
            study.run(foreign, str(Path(studied.root) / "elsewhere"))
    assert root.manifest("model") is not None


def test_a_recipe_without_a_study_is_refused(studied: Recipe) -> None:
    with pytest.raises(StageError, match="no `study` section"):
        study.run(studied.model_copy(update={"study": None}))
