"""A training's model and DeepSpeed engine on one worker: as the recipe has them, or as a checkpoint left them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor
from perceptio.train.checkpoint import Saved, load_checkpoint, read_weights, set_weights, to_universal
from perceptio.train.engine import start_engine
from perceptio.train.optim import deepspeed_config, optimizer_and_schedule
from perceptio.train.step import Objective
from perceptio.vlm.backbone import add_lora, set_trainable
from schemas.recipe import Recipe, TrainRecipe
from schemas.training import ModelRecipe
from workflows.store import Root
from workflows.untrained import untrained

log = logging.getLogger(__name__)


def build(recipe: Recipe, root: Root) -> tuple[Objective, PerceptioProcessor]:
    """The untrained model in its objective, with the recipe's parts set to train, and its processor."""
    torch.manual_seed(recipe.seed)
    part, train = recipe.model, recipe.train
    model, processor = untrained(recipe, root)
    set_parts(model, part)
    if train.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    packed_to = part.max_length if train.pack else None
    return Objective(model, train.losses, len(train.mixture), packed_to=packed_to), processor


def set_parts(model: PerceptioForConditionalGeneration, part: ModelRecipe) -> None:
    """Adds LoRA where the recipe has it, and sets what trains."""
    lora = part.lora
    if lora is not None and part.language == "lora":
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.targets)
    set_trainable(
        model,
        vision=part.train_vision,
        projector=part.train_projector,
        language=part.language,
        embeddings=part.train_embeddings,
    )
    model.segmenter.set_trainable(projector=part.train_mask_projector, decoder=part.train_mask_decoder)


def engine_of(
    objective: Objective, train: TrainRecipe, world: int, saved: Saved | None = None, step: int = 0
) -> tuple[Any, Any]:
    """DeepSpeed's engine and the schedule of its rates, as they were when the checkpoint was saved, before `step`."""
    another_stage = saved is not None and saved.zero_stage != train.zero_stage
    if saved is not None and another_stage:
        log.warning(
            "train.zero_stage is %d, the checkpoint of step %d was saved at stage %d: its weights go on, the optimizer"
            " starts anew",
            train.zero_stage,
            step,
            saved.zero_stage,
        )
        set_weights(objective.model, read_weights(saved))
    optimizer, schedule = optimizer_and_schedule(objective, train, step=step if another_stage else 0)
    universal = saved is not None and not another_stage and saved.world != world
    engine = start_engine(objective, optimizer, deepspeed_config(train, world, universal=universal), schedule)
    if saved is not None and universal:
        log.info("the checkpoint of step %d was saved by %d workers, %d go on from it", step, saved.world, world)
        with _universal(saved) as folder:
            load_checkpoint(engine, folder)
    elif saved is not None and not another_stage:
        load_checkpoint(engine, saved.folder)
    assert objective.model.codec is not None
    objective.model.codec.to(engine.device)
    return engine, schedule


@contextmanager
def _universal(saved: Saved) -> Iterator[Path]:
    """What `to_universal` writes, once on each machine, in a folder that nobody else may write to."""
    first = ray.train.get_context().get_local_rank() == 0
    with tempfile.TemporaryDirectory(prefix="perceptio-universal-") if first else nullcontext() as own:
        if own is not None:
            to_universal(saved, Path(own))
        machine, known = ray.get_runtime_context().get_node_id(), [("", "")] * dist.get_world_size()
        dist.all_gather_object(known, (machine, own or ""))
        yield next(Path(folder) for where, folder in known if where == machine and folder)
        dist.barrier()  # before it goes
