"""What the reconstruction term costs: a training step of the rooms model with it and without it, in turns.

A step is forward, backward and AdamW on one worker's micro-batch of rooms, all with a mask and a depth block; the model
is made of the shipped parts and a codebook of the rooms recipe's size.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perceptio.data.collator import Batch, collate, count_image_tokens, load_item
from perceptio.data.images import encode_png
from perceptio.data.maps import pack_map
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import render
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.rooms.render import render_room
from perceptio.segmentation.sam2_image import preprocess
from perceptio.train.optim import parameter_groups
from perceptio.train.step import Objective, counts_by_source
from perceptio.vlm.backbone import set_trainable
from schemas.recipe_file import load_recipe
from tests.benchmarks._stage import RECIPE
from tests.benchmarks.tokenize import write_codebook
from workflows.runtime import shipped

SIZE, REPEATS, BAR = 128, 15, 0.1


def _batch(model: PerceptioForConditionalGeneration, processor: Any, recipe: Any) -> Batch:
    """One micro-batch of rooms with random codes."""
    items, rng = [], np.random.default_rng(0)
    assert model.codec is not None
    entry = recipe.train.mixture[0]
    for number in range(recipe.train.micro_batch):
        room = render_room(3, number, SIZE)
        turn = {"kind": "referring", "form": "", "prompt": "Please segment the red chair.", "answer": "Sure."}
        side = model.codec.size
        row = {
            "id": f"{number:016x}",
            "image": encode_png(room.rgb_HW3),
            "width": SIZE,
            "height": SIZE,
            "turns": [turn | {"expression": "", "objects": [0], "choices": []}],
            "masks": masks_to_rle((room.instance_HW == 0)[None]),
            "codes": rng.integers(0, model.codec.codes, model.codec.tokens).tolist(),
            "depth_target": pack_map(rng.integers(0, 65536, (side, side), dtype=np.uint16)),
        }
        dialogue = render(
            row,
            entry,
            model.config.vocabulary,
            processor.tokenizer,
            key=(0, number),
            max_objects=recipe.model.max_objects,
            image_tokens=count_image_tokens(processor, SIZE, SIZE),
            depth_tokens=model.config.depth_tokens,
        )
        items.append(load_item(row, dialogue, source=0, key=(0, number)))
    sam2_size = model.segmenter.sam2.config.image_size
    return collate(items, processor=processor, sam2_pixels=preprocess, sam2_size=sam2_size, max_length=512)


def run() -> dict[str, Any]:
    """The benchmark's result; who goes first changes with every turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE)
    with tempfile.TemporaryDirectory() as name:
        model, processor = PerceptioForConditionalGeneration.from_parts(
            shipped("base"),
            shipped("segmenter"),
            write_codebook(Path(name)),
            max_objects=recipe.model.max_objects,
            starts_as=recipe.model.starts_as,
            prompts_start_as_clicks=True,
        )
    set_trainable(model, vision=False, projector=True, language="full", embeddings=True)
    batch = _batch(model.train(), processor, recipe)
    counts_C = counts_by_source([batch], 1).sum(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.train))
    weights = {True: recipe.train.losses, False: recipe.train.losses.model_copy(update={"reconstruction": 0.0})}
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(REPEATS + 1):
        for with_it in (True, False) if turn % 2 else (False, True):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss, _ = Objective(model, weights[with_it], 1)(batch, counts_C)
            loss.backward()
            optimizer.step()
            taken[with_it].append(time.perf_counter() - began)
    rows = [
        {"with_it_s": a, "without_s": b, "share": (a - b) / a}
        for a, b in zip(taken[True][1:], taken[False][1:], strict=True)  # the first turn fills caches
    ]
    value = statistics.median(row["share"] for row in rows)
    return {
        "name": "reconstruction",
        "what": "the reconstruction term's share of a training step of the rooms model",
        "value": value,
        "unit": "of a step",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": rows,
    }
