"""A training that meets a damaged row group: it stops and names it, or goes on without its samples and counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import lines_of, prepared, series

from perceptio.data.shards import SampleTable
from perceptio.train.feed import mixture_of
from schemas.recipe import Recipe
from tests.samples import spoil
from tests.tiny import tiny_parts
from workflows import train
from workflows.store import StageError

SCENES, STEPS, BATCH = 16, 4, 8
SOURCE = {"name": "training", "format": "rooms", "count": SCENES, "size": 64, "seed": 1, "exact_masks": True}
SOURCE |= {"questions": ["referring", "count"]}
SIZES = {"train__global_batch": BATCH, "train__steps": STEPS, "train__checkpoint_every": 1, "train__streams": 2}
SIZES |= {"train__workers": 2, "train__allowed_workers": [1, 2], "train__max_failures": 0, "train__micro_batch": 1}


def damaged(folder: Path, parts: Path) -> tuple[Recipe, list[int]]:
    """A recipe on SCENES row groups of one row, of which one that step 0 draws nothing of is damaged; draws by step."""
    recipe = prepared(folder, parts, row_group_rows=1, sources=[SOURCE], **SIZES)
    table = SampleTable.open(recipe.root, "training")
    mixture = mixture_of(recipe.train, [table], seed=recipe.seed)
    drawn = [[mixture.at(p).row_group for p in range(s * BATCH, s * BATCH + BATCH)] for s in range(STEPS)]
    (group, *_) = sorted(set(range(SCENES)) - set(drawn[0]))
    spoil(folder, table.manifest, 0, group)
    return recipe, [groups.count(group) for groups in drawn]


def skipping(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"unreadable": "skip"})})


def test_it_stops_by_name_and_told_to_skip_it_goes_on_as_if_it_had_from_the_start(tmp_path: Path) -> None:
    tiny_parts(tmp_path / "parts")
    recipe, draws = damaged(tmp_path / "stops", tmp_path / "parts")
    assert draws[0] == 0 and sum(draws) == 2
    with pytest.raises(StageError, match=r"part-000000-test\.parquet: row group \d+ of 1 rows cannot be read"):
        train.run(recipe)
    before = series(recipe)
    assert 1 <= len(before) < STEPS
    train.run(skipping(recipe))
    lines = lines_of(recipe)
    assert [sum(line["unread"].values()) for line in lines] == draws
    assert [line["samples"]["training"] for line in lines] == [BATCH - count for count in draws]
    assert {name for line in lines for name in line["unread"]} == {
        name for name in lines[draws.index(max(draws))]["unread"] if "part-000000-test.parquet: row group" in name
    }
    assert series(recipe)[: len(before)] == before
    other, _ = damaged(tmp_path / "skips", tmp_path / "parts")
    train.run(skipping(other))
    assert series(other) == series(recipe)
