"""The page about a training step: what each worker read there, and nothing that it did not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from schemas.recipe import Recipe
from tests.tables import fill, published, recipe_in
from tests.tiny import tiny_parts
from workflows import explain
from workflows.store import StageError, open_root
from workflows.train_log import METRICS_NAME, RECIPE_NAME

SIZES = {"train__steps": 6, "train__global_batch": 8, "train__micro_batch": 2, "train__streams": 4}
SIZES |= {"train__workers": 2, "train__allowed_workers": [1, 2, 4], "train__code_noise": 1.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("explain")
    parts = tiny_parts(folder / "parts")
    recipe = recipe_in(folder / "root", folder / "parts", **SIZES)
    root = open_root(recipe.root)
    fill(recipe, root, published(root, parts["codebook"], "codebook", {}))
    return recipe


def positions(page: str) -> list[list[int]]:
    """Of each worker."""
    workers = page.split("<h2>Worker ")[1:]
    return [[int(number) for number in re.findall(r'id="position-(\d+)"', worker)] for worker in workers]


def test_it_shows_every_sample_of_the_step_under_the_worker_that_had_it(recipe: Recipe) -> None:
    page = Path(explain.run(recipe, 2)).read_text()
    first, second = positions(page)
    assert sorted(first + second) == list(range(16, 24))
    assert {p % 4 // 2 for p in first} == {0} and {p % 4 // 2 for p in second} == {1}, "each has its own streams"
    assert positions(Path(explain.run(recipe, 2, workers=1)).read_text()) == [list(range(16, 24))]


def test_a_sample_is_shown_as_it_was_read(recipe: Recipe) -> None:
    page = Path(explain.run(recipe, 0)).read_text()
    assert page.count(">image<") == page.count("depth target<") == page.count("depth of its codes<") == 8
    assert page.count("read, with noise in its codes") == 8
    assert "&lt;|depth_start|&gt;" in page and "[SEG]" in page and "&lt;|im_end|&gt;" in page
    assert re.search(r"&lt;IMG_CONTEXT&gt; x \d+", page) and "&lt;IMG_CONTEXT&gt;&lt;IMG_CONTEXT&gt;" not in page
    assert '<span class="k marker">' in page and '<span class="k token">' in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_a_run_is_shown_by_its_own_recipe_and_what_its_step_found(recipe: Recipe) -> None:
    root = open_root(recipe.root)
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    root.write(other.model_dump_json().encode(), "runs", "mine", RECIPE_NAME)
    line: dict[str, Any] = {"step": 2, "loss": 1.25, "gradient_norm": 0.5, "terms": {"mask_bce": 0.125}}
    root.write((json.dumps(line) + "\n").encode(), "runs", "mine", METRICS_NAME)
    page = Path(explain.run(recipe, 1, "mine")).read_text()
    assert other.digest in page and recipe.digest not in page
    assert "<b>1.2500</b>" in page and "mask bce <b>0.1250</b>" in page
    assert "What the step found" not in Path(explain.run(recipe, 2, "mine")).read_text()


def test_what_is_not_there_is_refused(recipe: Recipe) -> None:
    with pytest.raises(StageError, match="step is 6, expected 0 to 5: the run has 6 steps"):
        explain.run(recipe, 6)
    with pytest.raises(StageError, match=r"runs/nobody/recipe.json does not exist: is there a run of that name"):
        explain.run(recipe, 0, "nobody")
