"""The pre-flight on real Ray Train and DeepSpeed: it finds the heaviest micro-batches, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from trainings import prepared, run_of, series

from perceptio.processor import PerceptioProcessor
from perceptio.train.feed import Feed, Samples
from schemas.recipe import Recipe
from tests.tiny import tiny_parts
from workflows import train
from workflows.store import StageError, open_root
from workflows.train_engine import build
from workflows.train_preflight import described, read_preflight

# dropout, so that a random number drawn too many would show; stage 3, which leaves its marks on a model
LORA = {"model__language": "lora", "model__lora": {"rank": 2, "alpha": 4, "dropout": 0.1}, "train__zero_stage": 3}
SIZES = {"train__steps": 4, "train__checkpoint_every": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_parts(folder)
    return folder


def test_it_takes_a_step_on_the_heaviest_and_the_run_is_what_it_would_have_been(
    tmp_path: Path, parts: Path, local_ray: str
) -> None:
    plain = prepared(tmp_path / "plain", parts, **SIZES, **LORA)
    train.run(plain)
    assert read_preflight(open_root(plain.root), str(run_of(plain))) is None
    recipe = prepared(tmp_path / "flown", parts, **SIZES, **LORA, train__preflight=True)
    train.run(recipe)
    assert len(series(plain)) == 4
    assert series(recipe) == series(plain)
    found = read_preflight(open_root(recipe.root), str(run_of(recipe)))
    assert found is not None
    assert (found["workers"], found["looked_at"]) == (2, 4)
    most = {name: max(one[name] for one in found["heaviest"]) for name in ("tokens", "tiles", "objects")}
    assert most == _most_of_all(recipe)
    assert len(found["memory"]) == 2
    for held in found["memory"]:
        assert 10**8 < held["peak"] < held["total"] == psutil.virtual_memory().total
    assert f"{most['tokens']:,} tokens, {most['tiles']} tiles, {most['objects']} objects" in described(found)


def test_a_dialogue_that_is_too_long_is_found_before_the_first_step(
    tmp_path: Path, parts: Path, local_ray: str
) -> None:
    recipe = prepared(tmp_path, parts, **SIZES, train__preflight=True, model__max_length=24, train__max_failures=0)
    with pytest.raises(StageError, match=r"pre-flight: sample [0-9a-f]{16} has \d+ tokens, expected at most 24"):
        train.run(recipe)
    assert series(recipe) == []


def _most_of_all(recipe: Recipe) -> dict[str, int]:
    """The most of each measure in any micro-batch of the run, all of them decoded and collated."""
    objective, processor = build(recipe, open_root(recipe.root))
    assert isinstance(processor, PerceptioProcessor)
    feed = Feed(Samples.open(recipe, processor, world=2), objective.model.segmenter.sam2.config.image_size)
    sizes: list[dict[str, Any]] = []
    for step in range(recipe.train.steps):
        for rank in range(2):
            for batch in feed.batches(step, rank=rank, world=2, micro_batch=recipe.train.micro_batch):
                objects, tiles = len(batch.seg_sample_M), len(batch.pixel_values)
                sizes.append({"tokens": batch.input_ids_BT.numel(), "tiles": tiles, "objects": objects})
    assert len({tuple(size.values()) for size in sizes}) > 1, "all micro-batches are alike: nothing to be found"
    return {name: max(size[name] for size in sizes) for name in sizes[0]}
