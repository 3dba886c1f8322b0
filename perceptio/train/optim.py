"""Optimizer, schedule and DeepSpeed configuration of a training run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from schemas.recipe import TrainRecipe

MASK_PREFIX = "segmenter."


def parameter_groups(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Trained parameters in up to four groups: language or mask parts, each with and without weight decay.

    Vectors (norms, biases) are not decayed. Raises ValueError where nothing is trained.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((MASK_PREFIX in name, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError("model: no parameter requires a gradient; the recipe's model section freezes every part")
    return [
        {
            "params": parameters,
            "lr": recipe.mask_learning_rate if masks else recipe.learning_rate,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
            "name": f"{'masks' if masks else 'language'}{'' if decayed else ', not decayed'}",
        }
        for (masks, decayed), parameters in sorted(groups.items())
    ]


def optimizer_and_schedule(model: nn.Module, recipe: TrainRecipe) -> tuple[AdamW, LRScheduler]:
    """AdamW with linear warm-up and cosine to 0 over the recipe's steps (lineage: Sa2VA)."""
    optimizer = AdamW(parameter_groups(model, recipe), betas=recipe.betas)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    return optimizer, schedule


def deepspeed_config(recipe: TrainRecipe, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` workers; the batch sizes follow from the global batch."""
    return {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": accumulation(recipe, world),
        "gradient_clipping": recipe.clip,
        "zero_optimization": {"stage": recipe.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": recipe.bf16},
        "zero_allow_untested_optimizer": True,  # torch's AdamW is what DeepSpeed itself uses on a CPU
        "steps_per_print": 2**31,  # the run has its own log
        "wall_clock_breakdown": False,
    }


def accumulation(recipe: TrainRecipe, world: int) -> int:
    """Micro-batches of one worker per global batch; raises ValueError where the sizes do not divide."""
    samples, rest = divmod(recipe.global_batch, world)
    if rest or samples % recipe.micro_batch:
        raise ValueError(
            f"global_batch {recipe.global_batch} on {world} workers is {recipe.global_batch / world:g} samples each,"
            f" not a multiple of micro_batch {recipe.micro_batch}: change one of the three"
        )
    return samples // recipe.micro_batch
