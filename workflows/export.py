"""Writes a plain model folder, as `from_pretrained` takes it, of the trained model or of any checkpoint of a run.

    perceptio export --recipe RECIPE --out DIR [--run NAME [--step N]] [--adapter]

Reads   ROOT/model; with --run a checkpoint under ROOT/runs/NAME (the last one by default), the run's recipe, codebook/
Writes  DIR: config, safetensors, tokenizer, processor, codebook/, perceptio.json; LoRA is merged into the weights, or
        with --adapter stands apart in DIR/adapter, as peft's `PeftModel.from_pretrained(model, "DIR/adapter")` takes it
Needs   memory for two copies of the weights in fp32. No part of a checkpoint is read before its checksums match
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.checkpoint import CheckpointError, read_weights, set_weights
from perceptio.vlm.backbone import add_lora, drop_lora, lora_places, merge_lora
from schemas.recipe import Recipe
from workflows.checkpoints import last_whole, opened, places
from workflows.folders import local_copy, require
from workflows.store import Root, StageError, open_root
from workflows.train_log import RECIPE_NAME
from workflows.untrained import untrained

ADAPTER = "adapter"

log = logging.getLogger(__name__)


def run(recipe: Recipe, out: Path, name: str | None = None, step: int | None = None, *, adapter: bool = False) -> Path:
    """`out`, after it was written.

    Raises StageError where `out` holds something, where run, checkpoint or recipe are missing, and for parts that are
    non-commercial where the recipe does not accept them.
    """
    if out.exists() and any(out.iterdir()):
        raise StageError(f"{out} is not empty, expected a new folder: name another, or delete it")
    root = open_root(recipe.root)
    if name is None:
        if adapter or step is not None:
            raise StageError("--adapter and --step are of a run's checkpoints: name it with --run")
        _refuse_closed(recipe, require(root, "model", stage="train").licences)
        shutil.copytree(local_copy(root, "model", stage="train"), out, dirs_exist_ok=True)
        return out
    text = root.read("runs", name, RECIPE_NAME)
    if text is None:
        raise StageError(f"{root.at('runs', name, RECIPE_NAME)} does not exist: is there a run of that name?")
    own = Recipe.model_validate_json(text).model_copy(update={"root": recipe.root})
    _refuse_closed(recipe, require(root, "codebook", stage="codebook").licences)
    if adapter and own.model.language != "lora":
        raise StageError(f"run {name} has model.language '{own.model.language}', expected 'lora' for an adapter")
    _write(own, root, out, *_checkpoint(root, own, name, step), name=name, adapter=adapter)
    return out


def _refuse_closed(recipe: Recipe, licences: Any) -> None:
    closed = [f"{part.part} ({part.source}: {part.licence})" for part in licences if part.non_commercial]
    if closed and not recipe.accept_non_commercial:
        raise StageError(
            f"{recipe.root}: non-commercial parts: {', '.join(closed)}. Set accept_non_commercial: true if your use"
            " allows it"
        )
    for part in closed:
        log.warning("not for commercial use: %s", part)


def _checkpoint(root: Root, recipe: Recipe, name: str, step: int | None) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of a run's checkpoint; of the last whole one where no step is named."""
    found = places(root, name)
    steps = sorted({place.step for place in found})
    if step is not None and step not in steps:
        raise StageError(f"run {name} has checkpoints of steps {steps}, none of {step}")
    if step is not None:
        try:
            with opened(root, name, [place for place in found if place.step == step][-1]) as saved:
                return step, read_weights(saved)
        except CheckpointError as error:
            raise StageError(f"run {name}: {error}") from error
    with last_whole(root, name, found) as last:
        if last is None:
            raise StageError(f"run {name} has no whole checkpoint; those of steps {steps} are torn or damaged")
        return int(last.state["position"]) // recipe.train.global_batch, read_weights(last)


def _write(
    recipe: Recipe, root: Root, out: Path, step: int, weights: dict[str, Tensor], *, name: str, adapter: bool
) -> None:
    model, processor = untrained(recipe, root)
    lora = recipe.model.lora
    if recipe.model.language == "lora" and lora is not None:
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.targets)
    try:
        set_weights(model, weights)
    except CheckpointError as error:
        raise StageError(f"run {name}, step {step}: {error}") from error
    if adapter:
        _save_adapter(model, recipe, out / ADAPTER)
    merge_lora(model) if not adapter else drop_lora(model)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    told = {"run": name, "step": step, "codebook_digest": model.config.codebook_digest}
    (out / "perceptio.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def _save_adapter(model: PerceptioForConditionalGeneration, recipe: Recipe, folder: Path) -> None:
    """The LoRA layers in peft's own layout."""
    lora = recipe.model.lora
    assert lora is not None
    folder.mkdir(parents=True)
    layers = {
        f"base_model.model.{key.replace('.default.', '.')}": weight.detach().contiguous()
        for key, weight in model.named_parameters()
        if ".lora_" in key
    }
    save_file(layers, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora_places(lora.targets)
    )
    config.save_pretrained(str(folder))
