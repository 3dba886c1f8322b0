"""What a worker trains on: its micro-batches of each global batch, read ahead in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from perceptio.data.collator import Batch, Item, collate, count_image_tokens, load_item
from perceptio.data.mixture import Mixture, MixtureSource, WeightChange, weights_by_size
from perceptio.data.shards import SampleTable
from perceptio.data.template import Dialogue, render
from perceptio.processor import PerceptioProcessor
from perceptio.segmentation.sam2_image import preprocess
from schemas.recipe import Recipe, TrainRecipe

SIZED = ("id", "width", "height", "turns", "masks", "codes")  # columns that a dialogue depends on


def mixture_of(train: TrainRecipe, tables: Sequence[SampleTable], *, seed: int) -> Mixture:
    """The recipe's mixture over the tables of its entries.

    Raises ValueError where it ends before the recipe's steps do, each of its entries read `max_passes` times.
    """
    weights = [entry.weight for entry in train.mixture]
    if train.temperature is not None:
        sizes = [entry.repeats * len(table) for entry, table in zip(train.mixture, tables, strict=True)]
        weights = list(weights_by_size(sizes, train.temperature))
    mixture = Mixture(
        [
            MixtureSource(entry.called, weight or 0.0, table.rows_per_group, table.manifest.digest, entry.max_passes)
            for entry, table, weight in zip(train.mixture, tables, weights, strict=True)
        ],
        seed=seed,
        streams=train.streams,
        global_batch=train.global_batch,
        changes=[
            WeightChange(change.step, tuple(change.weights[entry.called] for entry in train.mixture))
            for change in train.schedule
        ],
    )
    if mixture.steps is not None and mixture.steps < train.steps:
        raise ValueError(
            f"train.steps is {train.steps}, but the mixture ends after {mixture.steps} global batches of"
            f" {train.global_batch}, when every source was read max_passes times: lower steps, or raise max_passes"
        )
    return mixture


@dataclass(frozen=True)
class Samples:
    """The sample at each position of a run's mixture; a pure function of (seed, tables, position)."""

    tables: Sequence[SampleTable]  # one per mixture entry
    mixture: Mixture
    recipe: Recipe
    processor: PerceptioProcessor

    @classmethod
    def open(
        cls, recipe: Recipe, processor: PerceptioProcessor, *, world: int = 1, columns: Sequence[str] | None = None
    ) -> Samples:
        """Those of the tables under the recipe's root, whose caches suit one of `world` workers.

        With `columns` of SIZED no more is read: enough for `dialogue`, not for `item`. Raises ShardError for a table
        that is not finished or not whole, ValueError as `mixture_of` does.
        """
        tables = [SampleTable.open(recipe.root, entry.source, columns=columns) for entry in recipe.train.mixture]
        mixture = mixture_of(recipe.train, tables, seed=recipe.seed)
        for table in tables:
            table.cached = mixture.row_groups_in_use(world)
        return cls(tables, mixture, recipe, processor)

    def item(self, position: int) -> Item:
        """The decoded sample at a position of the mixture."""
        source, row = self._row(position)
        key = (self.recipe.seed, position)
        return load_item(row, self._rendered(source, row, position), source=source, key=key)

    def dialogue(self, position: int) -> Dialogue:
        """What is said in the sample at a position, of which no image is decoded."""
        return self._rendered(*self._row(position), position)

    def close(self) -> None:
        """Stops reading ahead."""
        for table in self.tables:
            table.close()

    def _row(self, position: int) -> tuple[int, dict[str, Any]]:
        slot = self.mixture.at(position)
        return slot.source, self.tables[slot.source].row(slot.row_group, slot.row)

    def _rendered(self, source: int, row: Mapping[str, Any], position: int) -> Dialogue:
        train = self.recipe.train
        return render(
            row,
            train.mixture[source],
            self.processor.vocabulary,
            self.processor.tokenizer,
            key=(self.recipe.seed, position),
            max_objects=self.recipe.model.max_objects,
            image_tokens=count_image_tokens(self.processor, row["height"], row["width"]),
            depth_tokens=self.processor.depth_tokens,
            auto_share=train.auto_share,
            code_noise=train.code_noise,
            depth_after_text=self.recipe.model.depth_after_text,
            plain=train.losses.plain,
        )


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one rank."""

    samples: Samples
    sam2_size: int  # side of SAM2's input

    def batches(self, step: int, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of `rank` in global batch `step`."""
        positions = self.samples.mixture.positions_of(step, rank, world)
        return [self.batch(positions[first : first + micro_batch]) for first in range(0, len(positions), micro_batch)]

    def batch(self, positions: Sequence[int]) -> Batch:
        """The micro-batch of some positions of the mixture."""
        return collate(
            [self.samples.item(position) for position in positions],
            processor=self.samples.processor,
            sam2_pixels=preprocess,
            sam2_size=self.sam2_size,
            max_length=self.samples.recipe.model.max_length,
        )

    def ahead(self, first: int, last: int, *, rank: int, world: int, micro_batch: int) -> Iterator[list[Batch]]:
        """`batches` of steps [first, last), each made while the one before is trained on."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            waiting = [pool.submit(self.batches, first, rank=rank, world=world, micro_batch=micro_batch)]
            for step in range(first, last):
                ready = waiting.pop().result()
                if step + 1 < last:
                    waiting.append(pool.submit(self.batches, step + 1, rank=rank, world=world, micro_batch=micro_batch))
                yield ready
