"""Fixed samples generated while a run trains, on real Ray Train and DeepSpeed: they are shown, and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from trainings import lines_of, prepared, run_of, series

from schemas.recipe import Recipe
from tests.tiny import tiny_parts
from workflows import train
from workflows.sample_sheet import TILE
from workflows.store import open_root
from workflows.train_log import SAMPLES_FOLDER

SHOWN, EVERY, STEPS = 2, 2, 6
NAMES = ("codes_used", "perplexity")  # of generated blocks, and of the teacher's


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_parts(folder)
    return folder


def trained(folder: Path, parts: Path, **settings: Any) -> Recipe:
    """LoRA with much dropout: a draw too many would be seen."""
    settings |= {"model__language": "lora", "model__lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}
    sizes = {"train__steps": STEPS, "train__checkpoint_every": 3, "train__publish_dtype": "float32"}
    recipe = prepared(folder, parts, **settings, **sizes)
    train.run(recipe)
    return recipe


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.proof)])
def test_samples_are_shown_and_the_training_is_the_same_to_the_last_bit(
    tmp_path: Path, parts: Path, stage: int
) -> None:
    plain = trained(tmp_path / "plain", parts, train__zero_stage=stage)
    shown = trained(
        tmp_path / "shown", parts, train__zero_stage=stage, train__samples_every=EVERY, train__samples_shown=SHOWN
    )
    assert run_of(shown) == run_of(plain), "what is shown makes no other run"
    assert len(series(shown)) == STEPS and series(shown) == series(plain)
    weights = [load_file(Path(recipe.root) / "model" / "model.safetensors") for recipe in (plain, shown)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weight, weights[1][name]) for name, weight in weights[0].items())

    run, lines = run_of(shown), lines_of(shown)
    assert run is not None
    root = open_root(shown.root)
    names = [f"step-{step}.png" for step in range(EVERY, STEPS + 1, EVERY)]
    folder = Path(root.at("runs", run, SAMPLES_FOLDER))
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        picture = np.asarray(Image.open(folder / name))
        assert picture.shape[0] > SHOWN * TILE and picture.shape[1] > 5 * TILE, "of one: image, two maps, two masks"
    assert [line["step"] for line in lines if "generated" in line] == list(range(EVERY, STEPS + 1, EVERY))
    for line in lines[EVERY - 1 :: EVERY]:
        found = line["generated"]
        assert set(found) == {"well_formed", *(f"{of}{name}" for of in ("", "teacher_") for name in NAMES)}
        assert 0 <= found["well_formed"] <= 1
        for of in ("", "teacher_"):
            assert 1 / 8 <= found[f"{of}codes_used"] <= 1 and 1 <= found[f"{of}perplexity"] <= 8, "of 8 codes"
    teachers = {line["generated"]["teacher_perplexity"] for line in lines[EVERY - 1 :: EVERY]}
    assert len(teachers) == 1, "the samples are the same at every step"
    assert not Path(open_root(plain.root).at("runs", run, SAMPLES_FOLDER)).exists()
