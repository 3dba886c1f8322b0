"""Optimizer, schedule and DeepSpeed configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from schemas.recipe import TrainRecipe

# Part of a parameter's name -> what the group is called and which rate of the recipe it has; the first match counts.
GROUPS = (
    ("segmenter.projector.", "projector", "projector_learning_rate"),
    ("segmenter.", "masks", "mask_learning_rate"),
    ("embed_tokens.", "embeddings", "embedding_learning_rate"),
    ("lm_head.", "embeddings", "embedding_learning_rate"),
    ("", "language", "learning_rate"),
)


def parameter_groups(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Trained parameters by learning rate (GROUPS), each group with and without weight decay.

    Vectors (norms, biases) and embeddings are not decayed. Raises ValueError where nothing is trained.
    """
    groups: dict[tuple[str, str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, group, rate = next(known for known in GROUPS if known[0] in name)
            decayed = parameter.ndim > 1 and group != "embeddings"
            groups.setdefault((group, rate, decayed), []).append(parameter)
    if not groups:
        raise ValueError("model: no parameter requires a gradient; the recipe's model section freezes every part")
    return [
        {
            "params": parameters,
            "lr": getattr(recipe, rate),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
            "name": f"{group}{'' if decayed else ', not decayed'}",
        }
        for (group, rate, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def optimizer_and_schedule(model: nn.Module, recipe: TrainRecipe, *, step: int = 0) -> tuple[AdamW, LRScheduler]:
    """AdamW with linear warm-up and cosine to 0 over the recipe's steps (lineage: Sa2VA), its rates those of `step`."""
    optimizer = AdamW(parameter_groups(model, recipe), betas=recipe.betas)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warmup = round(recipe.warmup * recipe.steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps, last_epoch=step - 1)


def computes_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed at speed: on a CPU as oneDNN says, which needs AVX-512 or newer on an x86.

    A CPU with AVX2 alone emulates it: a step of the rooms recipe took ten times as long as in fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def settled_precision(recipe: TrainRecipe, device: torch.device) -> TrainRecipe:
    """The recipe with `precision: auto` settled, the same for all workers, which must all call this."""
    if recipe.precision != "auto":
        return recipe
    able = torch.tensor(int(computes_bf16(device)), device=device)
    dist.all_reduce(able, dist.ReduceOp.MIN)
    return recipe.model_copy(update={"precision": "bf16_autocast" if able.item() else "fp32"})


def deepspeed_config(recipe: TrainRecipe, world: int, *, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` workers; the batch sizes follow from the global batch.

    With `universal` the engine loads what `to_universal` wrote. Raises ValueError where `precision: auto` was not
    settled.
    """
    if recipe.precision == "auto":
        raise ValueError("precision is 'auto', expected one that settled_precision() chose")
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "overlap_comm": torch.cuda.is_available()}
    if recipe.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if recipe.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    own = {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": accumulation(recipe, world),
        "gradient_clipping": recipe.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"} if recipe.precision == "bf16" else {},  # else they add up in bf16
        "torch_autocast": {
            "enabled": recipe.precision == "bf16_autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # of modules whose gradients may travel in bf16: none
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW is what DeepSpeed itself uses on a CPU
        "steps_per_print": 2**31,  # the run has its own log
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW works on offloaded state too, and needs no compiler
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": universal},
    }
    return _merged(own, recipe.deepspeed)


def _merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both say something `more` counts, which says nothing that the recipe says."""
    found = dict(own)
    for name, value in more.items():
        inner = found.get(name)
        found[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def accumulation(recipe: TrainRecipe, world: int) -> int:
    """Micro-batches of one worker per global batch; raises ValueError where the sizes do not divide."""
    samples, rest = divmod(recipe.global_batch, world)
    if rest or samples % recipe.micro_batch:
        raise ValueError(
            f"global_batch {recipe.global_batch} on {world} workers is {recipe.global_batch / world:g} samples each,"
            f" not a multiple of micro_batch {recipe.micro_batch}: change one of the three"
        )
    return samples // recipe.micro_batch
