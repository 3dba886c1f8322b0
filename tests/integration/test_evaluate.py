"""The evaluation on tiny random models, real tables and a real local Ray: what stands, what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import pytest

from schemas.recipe import Recipe
from schemas.tables import PREDICTIONS
from tests.tables import SCENES, fill, published, recipe_in
from tests.tiny import tiny_model
from workflows import evaluate
from workflows.store import OtherInputsError, Root, open_root


@dataclass(frozen=True)
class World:
    recipe: Recipe
    root: Root

    def metrics(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads(self.root.read("eval", "metrics.json") or b"")["metrics"]
        return found

    def name(self) -> str:
        return str(json.loads(self.root.read("eval", "metrics.json") or b"")["evaluation"])

    def predictions(self, key: str) -> list[dict[str, Any]]:
        table = pq.read_table(io.BytesIO(self.root.read("eval", self.name(), f"{key}.parquet") or b""))
        assert table.schema.equals(PREDICTIONS)
        return table.to_pylist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> World:
    folder = tmp_path_factory.mktemp("evaluated")
    model = tiny_model(folder / "tiny")
    recipe = recipe_in(folder / "root", folder / "tiny" / "parts")
    root = open_root(recipe.root)
    codebook = published(root, folder / "tiny" / "parts" / "codebook", "codebook", {})
    fill(recipe, root, codebook)
    published(root, model, "model", {"codebook": codebook.digest})
    evaluate.run(recipe)
    return World(recipe, root)


def test_every_figure_has_its_interval_and_its_baseline(world: World) -> None:
    metrics = world.metrics()
    wanted = {
        "reconstruction_mae",
        "generated_depth_mae",
        "generated_depth_mae_vs_other_image",
        "code_accuracy",
        "referring_ciou",
        "referring_giou",
        "referring_ciou_vs_untrained",
        "closest_point_accuracy",
        "closest_point_on_generated_map",
        "yes_no_accuracy",
        "well_formed_without_grammar",
        "teacher_abs_rel",
        "generated_delta1",
    }
    assert wanted <= set(metrics)
    for name, metric in metrics.items():
        assert metric["low"] <= metric["value"] <= metric["high"], name
        assert metric["difference"] == pytest.approx(metric["value"] - metric["baseline"]), name
        assert metric["difference_low"] <= metric["difference"] <= metric["difference_high"], name
        assert 1 <= metric["n"] <= SCENES, name


def test_recorded_depth_as_teacher_has_no_error_in_z(world: World) -> None:
    assert world.metrics()["teacher_delta1"]["value"] > 0.99
    assert world.metrics()["teacher_abs_rel"]["value"] < world.metrics()["teacher_abs_rel"]["baseline"]


def test_the_grammar_forces_a_whole_block_and_its_absence_does_not(world: World) -> None:
    told = world.predictions("model")
    assert {len(row["codes"]) for row in told} == {4}
    assert all(row["well_formed"] and row["grammar"] for row in told)
    free = world.predictions("free")
    assert not any(row["grammar"] for row in free)
    share = sum(row["well_formed"] for row in free) / len(free)
    assert world.metrics()["well_formed_without_grammar"]["value"] == pytest.approx(share)


def test_one_segmentation_a_picture_and_masks_of_its_size(world: World) -> None:
    rows = [row for row in world.predictions("model") if row["masks"]]
    assert len({row["id"] for row in rows}) == len(rows) > 0
    assert all((mask["height"], mask["width"]) == (64, 64) for row in rows for mask in row["masks"])


def test_an_untrained_start_without_the_grammar_is_asked_the_same(world: World) -> None:
    keys = [(row["id"], row["turn"]) for row in world.predictions("free")]
    assert keys == [(row["id"], row["turn"]) for row in world.predictions("untrained_free")]


def test_what_stands_is_not_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.metrics()

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(evaluate, "_answers", refuse)
    world.root.delete("eval", "metrics.json")
    evaluate.run(world.recipe)
    assert world.metrics() == before
    world.root.delete("eval", world.name(), "manifest.json")
    evaluate.run(world.recipe)  # every pass stands, so only the figures are made again
    assert world.metrics() == before
    world.root.delete("eval", world.name(), "manifest.json")
    world.root.delete("eval", world.name(), "blank.parquet")
    with pytest.raises(AssertionError, match="asked again"):
        evaluate.run(world.recipe)


def test_a_model_of_another_codebook_is_refused(world: World) -> None:
    standing = world.root.manifest("model")
    assert standing is not None
    other = standing.model_copy(update={"inputs": {"codebook": "f" * 64}})
    world.root.write(other.model_dump_json().encode(), "model", "manifest.json")
    try:
        codebook = world.root.manifest("codebook")
        assert codebook is not None
        both = f"model was made with codebook {'f' * 16}, codebook/ is {codebook.digest[:16]}"
        with pytest.raises(OtherInputsError, match=both):
            evaluate.run(world.recipe)
    finally:
        world.root.write(standing.model_dump_json().encode(), "model", "manifest.json")
