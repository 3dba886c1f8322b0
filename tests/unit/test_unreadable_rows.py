"""A damaged row group in a run: it stops, or its samples are left out, on whoever reads them, and counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from perceptio.data.collator import Batch
from perceptio.data.shards import UnreadableError
from perceptio.processor import PerceptioProcessor
from perceptio.train.feed import Feed, Samples
from perceptio.train.step import TERMS, counts_by_source
from schemas.recipe import Recipe
from tests.samples import spoil
from tests.tables import SCENES, fill, published, recipe_in
from tests.tiny import tiny_parts
from workflows.store import open_root

SIZES = {"train__steps": 6, "train__global_batch": 8, "train__micro_batch": 1, "train__streams": 4}
SIZES |= {"train__workers": 2, "train__allowed_workers": [1, 2, 4]}
DAMAGED = 1


@pytest.fixture(scope="module")
def feeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, PerceptioProcessor, Feed]:
    """A recipe on a table of SCENES row groups of a row, of which one is damaged; and a feed that read them before."""
    folder = tmp_path_factory.mktemp("unreadable")
    parts = tiny_parts(folder / "parts")
    recipe = recipe_in(folder / "root", folder / "parts", **SIZES)
    root = open_root(recipe.root)
    fill(recipe, root, published(root, parts["codebook"], "codebook", {}), row_group_rows=1)
    processor = PerceptioProcessor.from_pretrained(parts["base"], codebook=parts["codebook"])
    whole = Feed(Samples.open(recipe, processor), 64)
    for group in range(SCENES):
        whole.samples.reader.tables[0].row(group, 0)  # kept in its cache
    spoil(folder / "root", whole.samples.reader.tables[0].manifest, 0, DAMAGED)
    return recipe, processor, whole


def feed(recipe: Recipe, processor: PerceptioProcessor, policy: str, world: int = 1) -> Feed:
    train = recipe.train.model_copy(update={"unreadable": policy})
    return Feed(Samples.open(recipe.model_copy(update={"train": train}), processor, world=world), 64)


def global_batch(feed: Feed, step: int, world: int = 1) -> list[Batch]:
    return [b for rank in range(world) for b in feed.batches(step, rank=rank, world=world, micro_batch=1)]


def test_a_run_stops_at_the_row_group_by_name(feeds: tuple[Recipe, PerceptioProcessor, Feed]) -> None:
    recipe, processor, _ = feeds
    with pytest.raises(UnreadableError, match=rf"samples/training/part-000000-test.parquet: row group {DAMAGED} of 1"):
        for _ in feed(recipe, processor, "stop").ahead(0, 3, rank=0, world=1, micro_batch=1):
            pass


@pytest.mark.parametrize("world", [1, 2, 4])
def test_its_samples_alone_are_left_out_whoever_reads_them(
    feeds: tuple[Recipe, PerceptioProcessor, Feed], world: int
) -> None:
    recipe, processor, whole = feeds
    lost = 0
    for step in (2, 0, 1):  # one that goes on from step 2 leaves out the same
        skipping = feed(recipe, processor, "skip", world)
        found, expected = global_batch(skipping, step, world), global_batch(whole, step)
        assert len(found) == len(expected) == 8, "every rank has all its micro-batches"
        by_position = {batch.positions[0]: batch for batch in found}
        counts_QC = torch.zeros(1, len(TERMS))
        for batch in expected:
            (position,), mine = batch.positions, by_position[batch.positions[0]]
            if whole.samples.mixture.at(position).row_group == DAMAGED:
                lost += 1
                assert mine.sample_ids == ("",) and not mine.loss_kind_BT.any()
                ((source, where),) = mine.unread
                assert source == 0 and where.endswith(f"part-000000-test.parquet: row group {DAMAGED} of 1 rows")
            else:
                assert mine.sample_ids == batch.sample_ids and not mine.unread
                assert torch.equal(mine.input_ids_BT, batch.input_ids_BT)
                counts_QC += counts_by_source([batch], 1)
        assert torch.equal(counts_by_source(found, 1), counts_QC), "denominators are of what was read"
    assert lost == 3 * 8 / SCENES


def test_the_damaged_row_group_is_tried_once_and_not_for_each_of_its_rows(
    feeds: tuple[Recipe, PerceptioProcessor, Feed],
) -> None:
    recipe, processor, _ = feeds
    skipping = feed(recipe, processor, "skip")
    tries = Counter[int]()
    table = skipping.samples.reader.tables[0]
    read_once = table._read_once

    def counted(group: object) -> object:
        tries[table.row_groups.index(group)] += 1  # type: ignore[arg-type]
        return read_once(group)  # type: ignore[arg-type]

    table._read_once = counted  # type: ignore[method-assign, assignment]
    for step in range(6):
        global_batch(skipping, step)
    assert tries[0] == tries[2] == 1
    # it is read ahead, and once more when it is needed
    assert 3 <= tries[DAMAGED] <= 6
