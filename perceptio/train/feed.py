"""What a worker trains on: its micro-batches of each global batch, read ahead in a thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from perceptio.data.collator import Batch, Item, blank, collate, count_image_tokens, load_item
from perceptio.data.disk_cache import DiskCache
from perceptio.data.mixture import Mixture, MixtureSource, WeightChange, weights_by_size
from perceptio.data.reading import Reader
from perceptio.data.shards import SampleTable, UnreadableError
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

    reader: Reader  # of one table per mixture entry
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
        train = recipe.train
        cache = None if train.cache_dir is None else DiskCache(train.cache_dir, round(train.cache_gb * 1e9))
        tables = [SampleTable.open(recipe.root, entry.source, cache=cache, columns=columns) for entry in train.mixture]
        mixture = mixture_of(recipe.train, tables, seed=recipe.seed)
        return cls(Reader(mixture, tables, world=world), recipe, processor)

    @property
    def mixture(self) -> Mixture:
        return self.reader.mixture

    def item(self, position: int) -> Item:
        """The decoded sample at a position of the mixture."""
        slot, row = self.reader.row(position)
        key = (self.recipe.seed, position)
        return load_item(row, self._rendered(slot.source, row, position), source=slot.source, key=key)

    def dialogue(self, position: int) -> Dialogue:
        """What is said in the sample at a position, of which no image is decoded."""
        slot, row = self.reader.row(position)
        return self._rendered(slot.source, row, position)

    def close(self) -> None:
        """Stops reading ahead."""
        self.reader.close()

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
class Unread:
    """Stands where a sample cannot be read."""

    key: tuple[int, int]  # (seed, position)
    source: int  # index of its mixture entry
    where: str  # its row group


def micro_batches(
    drawn: Sequence[Item | Unread], micro_batch: int, *, by_length: bool = False
) -> list[Sequence[Item | Unread]]:
    """A rank's share of a global batch, cut into micro-batches, in the order of positions.

    `by_length` orders it by number of tokens first, so that samples of one length are padded together. It changes
    neither which samples a global batch has nor its loss, whose denominators are the global batch's.
    """

    def length(one: Item | Unread) -> tuple[int, int]:
        return len(one.dialogue.input_ids) if isinstance(one, Item) else 0, one.key[1]

    ordered = sorted(drawn, key=length) if by_length else drawn
    return [ordered[first : first + micro_batch] for first in range(0, len(ordered), micro_batch)]


@dataclass(frozen=True)
class Feed:
    """The micro-batches of one rank."""

    samples: Samples
    sam2_size: int  # side of SAM2's input

    def batches(self, step: int, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of `rank` in global batch `step`.

        Raises UnreadableError for a row group that cannot be read, unless the recipe skips such: then its samples are
        left out of their micro-batches, which name it.
        """
        samples = self.samples
        drawn: list[Item | Unread] = [
            self._drawn(position) for position in samples.mixture.positions_of(step, rank, world)
        ]
        return [
            self._collated(part) for part in micro_batches(drawn, micro_batch, by_length=samples.recipe.train.bucket)
        ]

    def batch(self, positions: Sequence[int]) -> Batch:
        """The micro-batch of some positions of the mixture."""
        return self._collated([self._drawn(position) for position in positions])

    def _drawn(self, position: int) -> Item | Unread:
        samples = self.samples
        try:
            return samples.item(position)
        except UnreadableError as error:
            if samples.recipe.train.unreadable == "stop":
                raise
            return Unread((samples.recipe.seed, position), samples.mixture.at(position).source, str(error.group))

    def _collated(self, drawn: Sequence[Item | Unread]) -> Batch:
        samples = self.samples
        items = [one for one in drawn if isinstance(one, Item)]
        batch = collate(
            items or [blank(samples.processor, key=drawn[0].key)],
            processor=samples.processor,
            sam2_pixels=preprocess,
            sam2_size=self.sam2_size,
            max_length=samples.recipe.model.max_length,
        )
        unread = tuple((one.source, one.where) for one in drawn if isinstance(one, Unread))
        return dataclasses.replace(batch, unread=unread)

    def ahead(self, first: int, last: int, *, rank: int, world: int, micro_batch: int) -> Iterator[list[Batch]]:
        """`batches` of steps [first, last), each made while the one before is trained on, of rows read before that.

        It ends the reading of these samples: what is still being read ahead then is left.
        """
        reader = self.samples.reader
        with closing(reader), ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            pool.submit(reader.begin, first, rank).result()
            waiting = [pool.submit(self.batches, first, rank=rank, world=world, micro_batch=micro_batch)]
            for step in range(first, last):
                ready = waiting.pop().result()
                if step + 1 < last:
                    waiting.append(pool.submit(self.batches, step + 1, rank=rank, world=world, micro_batch=micro_batch))
                yield ready
