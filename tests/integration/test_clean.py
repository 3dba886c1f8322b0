"""What lost attempts left is shown first, and what somebody may still need is left alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import in_this_process, recipe_of
from photographs import folder_of, png, source, table

from schemas.recipe import Recipe
from workflows import clean, ingest, verify


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[str]:
    """No Ray: what is tested here is what stands in the tables."""
    with in_this_process():
        yield ""


def test_clean_takes_the_scratch_of_what_ended(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None]
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(4)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    root, tomorrow = Path(recipe.root), time.time() + 25 * 3600
    scratch = [folder_of(root / name / "deep", {"a": b"x"}) for name in ("plan/one", "runs/codebook-one")]
    kept = folder_of(root / "runs" / "train-one", {"checkpoint": b"x"})
    ingest.run(recipe)
    assert clean.run(recipe) == []
    assert [s.path for s in clean.run(recipe, now=tomorrow)] == ["plan/one/deep/a"], "a killed training goes on"
    run_stages(recipe)
    assert [s.path for s in clean.run(recipe, yes=True, now=tomorrow)] == [
        "plan/one/deep/a",
        "runs/codebook-one/deep/a",
    ]
    assert not any(list(place.iterdir()) for place in scratch) and list(kept.iterdir())


def test_clean_shows_first_and_takes_only_what_nobody_needs(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    ingest.run(recipe)
    images, rejects = Path(recipe.root) / "images" / "photos", Path(recipe.root) / "rejects" / "ingest" / "photos"
    rejects.mkdir(parents=True, exist_ok=True)
    lost = [images / "part-000000-lost.parquet", rejects / "part-000001-lost.parquet"]
    draft, young = images / "_commits" / "000001.json~1234", images / "part-000001-x.parquet~12"
    foreign = images / "notes.txt"
    for path in (*lost, draft, young, foreign):
        path.write_bytes(b"left behind")
    yesterday = time.time() - 25 * 3600
    os.utime(draft, (yesterday, yesterday))
    found = clean.run(recipe)
    assert {stray.path for stray in found} == {path.relative_to(recipe.root).as_posix() for path in (*lost, draft)}
    assert all(path.exists() for path in (*lost, draft))
    assert clean.run(recipe, yes=True) == found
    assert not any(path.exists() for path in (*lost, draft)) and young.exists() and foreign.exists()
    for path in (foreign, young):
        path.unlink()
    verify.run(recipe)


def test_clean_leaves_alone_what_an_attempt_may_still_commit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    ingest.run(recipe)
    table(recipe, "images").reopen()
    working = Path(recipe.root) / "images" / "photos" / "part-000002-working.parquet"
    working.write_bytes(b"half")
    assert clean.run(recipe) == []
    assert [stray.path for stray in clean.run(recipe, now=time.time() + 25 * 3600)] == [
        "images/photos/part-000002-working.parquet"
    ]
