"""What trains in the full-size recipes: the parts that the lineage trains, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.recipe_file import load_recipe
from tests.tables import published
from tests.tiny import tiny_parts
from workflows.cli import RECIPES
from workflows.store import open_root
from workflows.train_engine import build

TRAINED = (
    "model.language_model.layers.",  # of these the low-rank matrices alone
    "model.language_model.embed_tokens.",
    "lm_head.",
    "model.multi_modal_projector.",
    "segmenter.projector.",
    "segmenter.sam2.sam_mask_decoder.",
)
NO_LOSS = ("iou_prediction_head", "pred_obj_score_head")  # of the mask decoder: nothing that is learnt reaches them


@pytest.mark.parametrize("name", ["single_gpu", "cluster"])
def test_the_lineage_s_parts_train_and_the_rest_is_frozen(name: str, tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path / "parts", tied=False)
    small = [f"model.base={parts['base']}", f"model.sam2={parts['sam2']}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", root=str(tmp_path / "root"), overrides=small)
    root = open_root(recipe.root)
    published(root, parts["codebook"], "codebook", {})
    model = build(recipe, root)[0].model
    for key, weight in model.named_parameters():
        expected = key.startswith(TRAINED) and not any(part in key for part in NO_LOSS)
        if ".layers." in key and "language_model" in key:
            expected = ".lora_" in key
        assert weight.requires_grad == expected, key
    trained = [key for key, weight in model.named_parameters() if weight.requires_grad]
    assert [part for part in TRAINED if not any(key.startswith(part) for key in trained)] == []
    assert len([key for key in trained if ".lora_" in key]) == 2 * 14  # two matrices of 7 linear maps in 2 layers
    frozen = ("vision_tower", "image_encoder", "sam_prompt_encoder")
    assert all(any(part in key for key, _ in model.named_parameters()) for part in frozen)
