"""Shows the samples of a training step, exactly as each worker had them: pictures, masks, depth, tokens and text.

    perceptio explain --recipe RECIPE --step N [--run NAME]

Reads   ROOT/runs/NAME/recipe.json (by default of the run that the recipe makes), samples/, codebook/
Writes  ROOT/reports/train/step-N.html (self-contained: no script, nothing loaded from elsewhere)
Needs   nothing but the tables that were trained on: what stands at a step is a function of the seed and their rows
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from perceptio.data.collator import Item
from perceptio.data.template import LossKind
from perceptio.depth.codec import DepthCodec
from perceptio.metrics.masks import union_mask
from perceptio.processor import PerceptioProcessor
from perceptio.train.feed import Samples
from schemas.recipe import Recipe
from workflows import runtime
from workflows.folders import local_copy
from workflows.page import render
from workflows.pictures import depth_colours, tinted
from workflows.stage_pictures import thumbnail
from workflows.store import Root, StageError, open_root
from workflows.train_log import RECIPE_NAME, read_metrics

KINDS = {kind: kind.name.lower() for kind in LossKind}


@dataclass(frozen=True)
class Piece:
    """Tokens of one kind of loss behind one another, as text; `read` is what was read where noise replaced codes."""

    kind: str
    text: str
    read: str = ""


@dataclass(frozen=True)
class Shown:
    """One sample of the step."""

    position: int
    source: str
    sample_id: str
    pass_number: int
    tokens: int
    pictures: list[tuple[str, str, str]]
    pieces: list[Piece]


def run(recipe: Recipe, step: int, name: str | None = None, workers: int | None = None) -> str:
    """The path or address of the page, after it was written; `step` counts from 0, `workers` are those of the run.

    Raises StageError for a run without a recipe and for a step that it does not have.
    """
    root = open_root(recipe.root)
    if name is not None:
        recipe = _of_run(root, name, recipe.root)
    steps, world = recipe.train.steps, workers or recipe.train.most_workers
    if not 0 <= step < steps:
        raise StageError(f"step is {step}, expected 0 to {steps - 1}: the run has {steps} steps")
    codebook = local_copy(root, "codebook", stage="codebook")
    processor = PerceptioProcessor.from_pretrained(runtime.weights(recipe.model.base, "base"), codebook=codebook)
    samples, codec = Samples.open(recipe, processor, world=world), DepthCodec.from_pretrained(codebook)
    ranks = [
        [_shown(samples, codec, position) for position in samples.mixture.positions_of(step, rank, world)]
        for rank in range(world)
    ]
    lines = read_metrics(root, name) if name is not None else []
    page = render(
        "explain.html.j2",
        recipe=recipe,
        step=step,
        run=name or "",
        ranks=ranks,
        micro_batch=recipe.train.micro_batch,
        line=next((line for line in lines if line["step"] == step + 1), None),
        mixture=samples.mixture.describe(),
        digest=samples.mixture.digest,
    )
    root.write(page.encode(), "reports", "train", f"step-{step}.html")
    return posixpath.join(root.uri, "reports", "train", f"step-{step}.html")


def _of_run(root: Root, name: str, uri: str) -> Recipe:
    text = root.read("runs", name, RECIPE_NAME)
    if text is None:
        raise StageError(f"{root.at('runs', name, RECIPE_NAME)} does not exist: is there a run of that name?")
    return Recipe.model_validate_json(text).model_copy(update={"root": uri})


def _shown(samples: Samples, codec: DepthCodec, position: int) -> Shown:
    slot, item = samples.mixture.at(position), samples.item(position)
    dialogue = item.dialogue
    return Shown(
        position=position,
        source=samples.recipe.train.mixture[slot.source].called,
        sample_id=dialogue.sample_id,
        pass_number=slot.pass_number,
        tokens=len(dialogue.input_ids),
        pictures=list(_pictures(item, codec)),
        pieces=list(_pieces(item, samples.processor)),
    )


def _pictures(item: Item, codec: DepthCodec) -> Iterator[tuple[str, str, str]]:
    height, width = item.rgb_HW3.shape[:2]
    yield "image", f"{width} x {height}", thumbnail(item.rgb_HW3)
    for number, mask_HW in enumerate(item.masks):
        drawn = tinted(item.rgb_HW3, union_mask([mask_HW], (height, width)))
        yield f"mask of [SEG] {number + 1}", f"{mask_HW.mean():.1%} of the image", thumbnail(drawn)
    if item.inv_depth_HW is not None:
        map_SS = codec.decode(torch.tensor([item.dialogue.codes]))[0].numpy()
        error = float(np.abs(map_SS - item.inv_depth_HW).mean()) if map_SS.shape == item.inv_depth_HW.shape else None
        yield "depth target", "", thumbnail(depth_colours(item.inv_depth_HW))
        yield "depth of its codes", "" if error is None else f"MAE {error:.4f}", thumbnail(depth_colours(map_SS))


def _pieces(item: Item, processor: PerceptioProcessor) -> Iterator[Piece]:
    """The dialogue's tokens in runs of one loss kind; slots of the image are counted, not spelled out."""
    dialogue, tokenizer = item.dialogue, processor.tokenizer
    slot = str(tokenizer.context_image_token)
    start = 0
    for end in range(1, len(dialogue.target_ids) + 1):
        if end < len(dialogue.target_ids) and dialogue.loss_kinds[end] == dialogue.loss_kinds[start]:
            continue
        wanted, read = (list(ids[start:end]) for ids in (dialogue.target_ids, dialogue.input_ids))
        text = tokenizer.decode(wanted, skip_special_tokens=False)
        text = text.replace(slot * dialogue.image_tokens, f"{slot} x {dialogue.image_tokens}")
        said = "" if read == wanted else tokenizer.decode(read, skip_special_tokens=False)
        yield Piece(KINDS[dialogue.loss_kinds[start]], text, said)
        start = end
