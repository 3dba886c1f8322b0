"""Tables that a training cannot use are refused before anything starts, each by name; small ones are used."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from perceptio.data.shards import SampleTable, ShardError
from perceptio.processor import PerceptioProcessor
from perceptio.train.feed import Feed, Samples
from schemas.manifest import MANIFEST_NAME
from schemas.recipe import Recipe, RecipeError
from schemas.tables import SCHEMA_VERSION
from tests.tables import SCENES, fill, published, recipe_in
from tests.tiny import tiny_parts
from workflows import runtime, train
from workflows.store import StageError, open_root

SIZES = {"train__steps": 6, "train__global_batch": 8, "train__micro_batch": 4, "train__streams": 4}
SIZES |= {"train__workers": 1, "train__allowed_workers": [1, 2, 4]}
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of the parts, and a root on which a training could start."""
    folder = tmp_path_factory.mktemp("whole")
    parts = tiny_parts(folder / "parts")
    recipe = recipe_in(folder / "root", folder / "parts", **SIZES)
    root = open_root(recipe.root)
    fill(recipe, root, published(root, parts["codebook"], "codebook", {}))
    return folder / "parts", folder / "root"


@pytest.fixture
def recipe(tmp_path: Path, whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe on a copy of that root; where Ray would be started the test ends with AssertionError."""

    def start(_: Recipe) -> None:
        raise AssertionError("the training starts")

    monkeypatch.setattr(runtime, "start", start)
    shutil.copytree(whole[1], tmp_path / "root")
    return recipe_in(tmp_path / "root", whole[0], **SIZES)


def samples_of(recipe: Recipe) -> Path:
    return Path(recipe.root) / "samples" / "training"


def change_manifest(recipe: Recipe, **fields: Any) -> None:
    file = samples_of(recipe) / MANIFEST_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_tables_are_fit_before_they_are_changed(recipe: Recipe) -> None:
    with pytest.raises(AssertionError, match="the training starts"):
        train.run(recipe)


@pytest.mark.parametrize(("weight", "seen"), [(-1, "-1"), (0, "0"), (float("nan"), "'NaN'")])
def test_a_weight_that_is_no_positive_number_is_refused_by_its_field(
    whole: tuple[Path, Path], weight: Any, seen: str
) -> None:
    entry = {"source": "training", "weight": weight, "segmentation": True, "depth": True}
    with pytest.raises(RecipeError, match=rf"'train\.mixture\.0\.weight' = {seen}: Input should be"):
        recipe_in(whole[1], whole[0], **SIZES, train__mixture=[entry])


def test_an_empty_source_is_refused_by_name(recipe: Recipe) -> None:
    change_manifest(recipe, shards=[], read=0, kept=0)
    with pytest.raises(StageError, match=r"train: row groups of source 'training': got \[\], expected at least one.*"):
        train.run(recipe)


def test_a_source_of_another_codebook_is_refused_with_both_digests(recipe: Recipe) -> None:
    change_manifest(recipe, inputs={"codebook": "0123456789abcdef" * 4})
    with pytest.raises(StageError, match="samples/training: its codes were made with codebook 0123456789abcdef"):
        train.run(recipe)


def test_a_source_of_another_schema_version_is_refused_with_both(recipe: Recipe) -> None:
    change_manifest(recipe, schema_version=SCHEMA_VERSION + 1)
    words = rf"samples/training/manifest.json cannot be .* schema version {SCHEMA_VERSION + 1};\s+this code reads \("
    with pytest.raises(StageError, match=f"(?s){words}"):
        train.run(recipe)
    with pytest.raises(ShardError, match=f"(?s){words}"):
        SampleTable.open(recipe.root, "training")


def test_a_missing_column_is_refused_by_file_and_name(recipe: Recipe) -> None:
    (file,) = samples_of(recipe).glob("part-*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["masks"]), file)
    with pytest.raises(StageError, match=rf"train: .*{file.name}: column 'masks' is missing, expected list<"):
        train.run(recipe)


def test_a_file_that_is_gone_is_refused_by_name(recipe: Recipe) -> None:
    (file,) = samples_of(recipe).glob("part-*.parquet")
    file.unlink()
    with pytest.raises(StageError, match=rf"train: .*{file.name} is missing, the manifest names it with 3 rows"):
        train.run(recipe)


def feed(recipe: Recipe, whole: tuple[Path, Path]) -> Feed:
    processor = PerceptioProcessor.from_pretrained(whole[0] / "base", codebook=whole[0] / "codebook")
    return Feed(Samples.open(recipe, processor), 64)


def test_fewer_rows_than_a_batch_fill_it_pass_after_pass(recipe: Recipe, whole: tuple[Path, Path]) -> None:
    assert recipe.train.global_batch > 2 * SCENES
    steps = [feed(recipe, whole).batches(step, rank=0, world=1, micro_batch=4) for step in range(3)]
    names = [[name for batch in batches for name in batch.sample_ids] for batches in steps]
    assert [len(drawn) for drawn in names] == [8, 8, 8]
    all_of_them = [name for drawn in names for name in drawn]
    assert set(Counter(all_of_them).values()) == {24 // SCENES}
    assert all(len(set(all_of_them[at : at + SCENES])) == SCENES for at in range(0, 24, SCENES)), "each row once a pass"


def test_a_sample_longer_than_the_model_reads_is_refused_by_name(recipe: Recipe, whole: tuple[Path, Path]) -> None:
    short = recipe.model_copy(update={"model": recipe.model.model_copy(update={"max_length": 40})})
    with pytest.raises(ValueError, match=r"sample \w{16}: \d+ tokens, expected at most 40: raise model.max_length, or"):
        feed(short, whole).batches(0, rank=0, world=1, micro_batch=4)
