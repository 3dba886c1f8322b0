"""The shipped Perceptio is what its card says: whole, small, and better than blind on rooms it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.manifest import Manifest
from schemas.recipe import section_digest
from schemas.recipe_file import load_recipe
from workflows import serve
from workflows.cli import RECIPES
from workflows.runtime import shipped
from workflows.train import HOW
from workflows.zoo.perceptio import first_figures, readme

FOLDER = shipped(serve.SHIPPED)


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((FOLDER / "card.json").read_text())


def test_the_folder_is_whole_small_and_the_cards_own(card: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "rooms.yaml", root=str(tmp_path))
    manifest = serve.check_folder(serve.with_a_model(recipe))
    assert manifest.digest == card["model"]
    on_disk = {
        path.relative_to(FOLDER / "model").as_posix() for path in (FOLDER / "model").rglob("*") if path.is_file()
    }
    assert on_disk == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25e6
    assert not any(licence.non_commercial for licence in manifest.licences)


def test_a_recipe_without_a_fallback_or_with_a_model_keeps_its_root(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "rooms.yaml", root=str(tmp_path))
    alone = load_recipe(RECIPES / "rooms.yaml", root=str(tmp_path), overrides=["serve.fallback=none"])
    assert serve.with_a_model(alone) == alone
    (tmp_path / "model").mkdir()
    own = Manifest(stage="train", attempt="test", recipe="test", code="test", digest="own")
    (tmp_path / "model" / "manifest.json").write_text(own.model_dump_json())
    assert serve.with_a_model(recipe) == recipe


def test_it_was_trained_by_the_recipe_that_the_card_names(card: dict[str, Any]) -> None:
    recipe = load_recipe(RECIPES / f"{card['recipe']}.yaml")
    inputs = Manifest.model_validate_json((FOLDER / "model" / "manifest.json").read_text()).inputs
    assert inputs["train"] == section_digest(recipe.train, exclude=HOW)
    assert inputs["model"] == section_digest(recipe.model)


def test_the_cards_figures_come_out_again(card: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    found = first_figures(FOLDER / "model")
    for name, value in found.items():
        near = {"rel": 0.05} if name == "generated_depth_mae" else {"abs": 0.05}
        assert value == pytest.approx(card["first"][name], **near), f"{name}: render changed? make the card again"
    assert (FOLDER / "README.md").read_text() == readme(card)


def test_masks_and_words_beat_blind_guesses(card: dict[str, Any]) -> None:
    kinds = ("yes_no", "attribute", "count", "choice")
    for name in ("referring_ciou", "generated_depth_mae", *(f"{kind}_accuracy" for kind in kinds)):
        metric = card["metrics"][name]
        gain = metric["difference_low"] if metric["higher_is_better"] else -metric["difference_high"]
        assert gain > 0, name
