"""Sources in a recipe: faults are named by the field as it is written, local paths are made absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.recipe import Recipe, RecipeError
from schemas.recipe_file import load_recipe

ROOMS = Path(__file__).parents[2] / "workflows" / "recipes" / "rooms.yaml"
PARQUET = {"format": "parquet", "name": "hub", "path": "hub", "columns": {"image": "image"}}


def load(folder: Path, *sources: dict[str, Any]) -> Recipe:
    mixture = [{"source": sources[0]["name"], "weight": 1, "segmentation": True, "depth": True}]
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": str(ROOMS), "sources": list(sources), "train": {"mixture": mixture}}))
    return load_recipe(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pth": "x"}, "unknown key 'sources.0.pth'; did you mean 'path'?"),
        ({"columns": {"image": "image", "qestion": "q"}}, "unknown key 'sources.0.columns.qestion'"),
        ({"columns": {}}, "'sources.0.columns.image' is missing"),
        ({"path": ""}, "'sources.0.path' = ''"),
        ({"format": "csv"}, "'sources.0': Input tag 'csv' found using 'format'"),
        ({"columns": {"image": "image", "question": "q"}}, "question and answer go together"),
    ],
)
def test_a_fault_is_named_by_its_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, PARQUET | change)
    assert message in str(error.value)


def test_local_paths_are_absolute_and_addresses_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load(
        tmp_path,
        {**PARQUET, "images": "~/photos"},
        {"format": "folder", "name": "far", "path": "s3://bucket/photos"},
        {"format": "webdataset", "name": "shards", "path": "../shards/s-{000..010}.tar"},
        {"format": "rgbd", "name": "depth", "path": ".", "depth_scale": 1000, "image_folder": "rgb"},
    )
    assert [source.model_dump()["path"] for source in recipe.sources] == [
        str(tmp_path / "hub"),
        "s3://bucket/photos",
        str(tmp_path.parent / "shards" / "s-{000..010}.tar"),
        str(tmp_path),
    ]
    assert recipe.sources[0].model_dump()["images"] == "/home/somebody/photos"
    assert recipe.sources[3].model_dump()["image_folder"] == "rgb"
