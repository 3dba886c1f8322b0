"""Micro-batches of made-up samples for a tiny model: some with masks and a depth block, some with words alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from perceptio.data.collator import Batch, collate, count_image_tokens, load_item
from perceptio.data.maps import pack_map
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import render
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.segmentation.sam2_image import preprocess
from schemas.training import LossWeights, MixtureEntry

Parts = tuple[PerceptioForConditionalGeneration, Any]

WEIGHTS = LossWeights(
    text=1,
    marker=1,
    token=1,
    count=0.1,
    reconstruction=1,
    mask_bce=2,
    mask_dice=0.5,
    temperature=1.25,
    gradient=0.5,
    mask_points=64,
)
ENTRIES = [
    MixtureEntry(source="referring", weight=1, segmentation=True, depth=True),
    MixtureEntry(source="plain", weight=1, segmentation=False, depth=False),
    MixtureEntry(source="masks", weight=1, segmentation=True, depth=False),
    MixtureEntry(source="maps", weight=1, segmentation=False, depth=True),
]
BOTH, WORDS, MASKS, DEPTH = range(len(ENTRIES))  # which spatial parts a sample has


def sample(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file, "PNG")
    masks = np.zeros((2, 48, 64), dtype=np.bool_)
    masks[0, 5:20, 8 : 30 + number], masks[1, 30:40, 40:60] = True, True
    turn = {"form": "", "answer": "Sure.", "expression": "", "choices": []}
    return {
        "id": f"{number:016x}",
        "image": file.getvalue(),
        "width": 64,
        "height": 48,
        "turns": [
            turn | {"kind": "referring", "prompt": "Please segment both lamps.", "objects": [1, 0]},
            turn | {"kind": "count", "prompt": "How many lamps?", "answer": "2", "objects": []},
        ],
        "masks": masks_to_rle(masks),
        "codes": rng.integers(0, 8, 4).tolist(),
        "depth_target": pack_map(rng.integers(0, 65536, (16, 16), dtype=np.uint16)),
    }


def without_images(parts: Parts, batch: Batch) -> Batch:
    """The batch as one of words alone: where images stood, its prompts have the word "a"."""
    model, processor = parts
    (word,) = processor.tokenizer.encode("a", add_special_tokens=False)
    ids_BT = batch.input_ids_BT.masked_fill(batch.input_ids_BT == model.config.image_token_id, word)
    return dataclasses.replace(batch, input_ids_BT=ids_BT, pixel_values=batch.pixel_values[:0])


def batch_of(parts: Parts, numbers: Sequence[tuple[int, int]], **options: Any) -> Batch:
    """A batch of (number, entry) samples."""
    model, processor = parts
    items = []
    for number, entry in numbers:
        row = sample(number)
        kinds = ("referring",) if ENTRIES[entry].segmentation else ("count",)
        dialogue = render(
            row,
            ENTRIES[entry].model_copy(update={"kinds": kinds}),
            model.config.vocabulary,
            processor.tokenizer,
            key=(0, number),
            max_objects=2,
            image_tokens=count_image_tokens(processor, 48, 64),
            depth_tokens=model.config.depth_tokens,
            **options,
        )
        items.append(load_item(row, dialogue, source=entry, key=(0, number)))
    return collate(items, processor=processor, sam2_pixels=preprocess, sam2_size=64, max_length=512)
