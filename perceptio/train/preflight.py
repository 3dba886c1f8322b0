"""The heaviest micro-batches of a run, found before it starts, and one step on each to see what it asks of memory.

Sizes are those of the run's own micro-batches: dialogues are rendered for every position, images are not decoded.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from perceptio.data.collator import PAD_MULTIPLE
from perceptio.data.packing import Packing
from perceptio.data.shards import UnreadableError
from perceptio.data.template import Dialogue
from perceptio.train.feed import Feed, Samples
from perceptio.train.optim import accumulation
from perceptio.train.step import train_step
from schemas.recipe import TrainRecipe


class Size(NamedTuple):
    """What a micro-batch asks of memory by."""

    tokens: int  # of its rows, padding among them
    tiles: int  # of its images
    objects: int  # masks


@dataclass(frozen=True)
class Heavy:
    """A micro-batch that no other of the run has more of one of Size's fields than."""

    most: str
    step: int  # counted from 0
    positions: tuple[int, ...]  # in the mixture
    size: Size


@dataclass(frozen=True)
class Memory:
    """Of one worker's device, in bytes: of an accelerator, or of a CPU's machine and this process on it."""

    peak: int
    total: int


def heaviest(
    samples: Samples, steps: Sequence[int], *, rank: int, world: int, micro_batch: int, packed_to: int | None
) -> list[Heavy]:
    """For each field of Size the micro-batch of `rank` with most of it, in those steps; the first of equals.

    Raises ValueError for a dialogue longer than the recipe's max_length, and UnreadableError for a damaged row group
    that the recipe does not skip: either would stop the run when it comes.
    """
    found: dict[str, Heavy] = {}
    for step in steps:
        positions = samples.mixture.positions_of(step, rank, world)
        drawn = [one for position in positions if (one := _drawn(samples, position)) is not None]
        if samples.recipe.train.bucket:
            drawn.sort(key=lambda one: (len(one[1].input_ids), one[0]))
        for first in range(0, len(drawn), micro_batch):
            batch = drawn[first : first + micro_batch]
            size = _size(samples, [dialogue for _, dialogue in batch], packed_to)
            for most in Size._fields:
                if most not in found or getattr(size, most) > getattr(found[most].size, most):
                    found[most] = Heavy(most, step, tuple(position for position, _ in batch), size)
    return list(found.values())


def agreed(own: Sequence[Heavy]) -> list[Heavy]:
    """The heaviest of all ranks, none twice; the same on each, which must all call this."""
    said: list[Sequence[Heavy]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(said, own)
    known: dict[tuple[int, ...], Heavy] = {}
    for most in Size._fields:
        of_all = [heavy for part in said for heavy in part if heavy.most == most]
        first = min(of_all, key=lambda heavy: (-getattr(heavy.size, most), heavy.positions))
        known.setdefault(first.positions, first)
    return list(known.values())


def for_rehearsal(recipe: TrainRecipe, world: int) -> TrainRecipe:
    """The recipe with at most two micro-batches a step, which hold as much as any number of them."""
    kept = min(2, accumulation(recipe, world))
    return recipe.model_copy(update={"global_batch": world * recipe.micro_batch * kept})


def rehearse(engine: Any, feed: Feed, heavy: Sequence[Heavy], sources: Sequence[str]) -> Memory:
    """This worker's peak in a step on each of the micro-batches; the engine and its model are spent by it.

    Raises MemoryError where one does not fit, naming it, on a device that says so; a CPU's machine rather kills.
    """
    device = torch.device(engine.device)
    for one in heavy:
        batch = feed.batch(one.positions)
        try:
            train_step(engine, [batch] * engine.gradient_accumulation_steps(), sources)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"pre-flight: {device} has not the memory for a micro-batch of step {one.step} with {one.size.tokens}"
                f" tokens, {one.size.tiles} tiles and {one.size.objects} objects, samples {list(batch.sample_ids)}"
                f" ({error}): lower train.micro_batch or model.max_length, set train.recompute or train.offload, or"
                " raise train.zero_stage"
            ) from error
    return memory(device)


def memory(device: torch.device) -> Memory:
    """The most that was held at once on the device since the process began, and what there is."""
    if device.type == "cuda":
        return Memory(torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the kernel counts it in KiB
    return Memory(peak, psutil.virtual_memory().total)


def _drawn(samples: Samples, position: int) -> tuple[int, Dialogue] | None:
    """None where its row group is skipped, for it cannot be read: the micro-batch is the less for it."""
    try:
        return position, samples.dialogue(position)
    except UnreadableError:
        if samples.recipe.train.unreadable == "stop":
            raise
        return None


def _size(samples: Samples, dialogues: Sequence[Dialogue], packed_to: int | None) -> Size:
    lengths, most = [len(dialogue.input_ids) for dialogue in dialogues], samples.recipe.model.max_length
    for dialogue, length in zip(dialogues, lengths, strict=True):
        if length > most:
            raise ValueError(
                f"pre-flight: sample {dialogue.sample_id} has {length} tokens, expected at most {most}: raise"
                " model.max_length, or lower the mixture entry's max_turns"
            )
    if packed_to is None:
        tokens = len(lengths) * -(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    else:
        packing = Packing.of(lengths, packed_to)
        ends = [start + length for start, length in zip(packing.start_B, lengths, strict=True)]
        tokens = (packing.row_B[-1] + 1) * max(ends)
    tiles = sum(dialogue.image_tokens for dialogue in dialogues) // int(samples.processor.image_seq_length)
    return Size(tokens, tiles, sum(len(dialogue.objects) for dialogue in dialogues))
