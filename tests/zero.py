"""One rank's training with DeepSpeed, in a process of its own: what ZeRO's stages are compared by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.step import Objective, train_step
from perceptio.vlm.backbone import set_trainable
from tests.batches import ENTRIES, WEIGHTS, batch_of

STEPS, RATE = 2, 1e-2


def trained(
    rank: int, stages: Sequence[int], shares: Sequence[Sequence[Sequence[int]]], parts: dict[str, Path], out: Path
) -> None:
    """Trains on this rank's micro-batches with each stage in turn, from the same start, and saves what it then has.

    `shares` holds for each rank its micro-batches, of numbers of `tests.batches.sample`: even ones have masks and a
    depth block, odd ones words alone.
    """
    torch.set_num_threads(1)
    world = len(shares)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=world)
    for stage in stages:
        _trained(stage, shares[rank], parts, out / f"{rank}-{stage}.safetensors")
    dist.destroy_process_group()


def _trained(stage: int, share: Sequence[Sequence[int]], parts: dict[str, Path], out: Path) -> None:
    import deepspeed

    torch.manual_seed(0)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    set_trainable(model, vision=True, projector=True, language="full", embeddings=True)
    batches = [batch_of((model, processor), [(number, number % 2) for number in numbers]) for numbers in share]
    objective = Objective(model.train(), WEIGHTS, len(ENTRIES))
    config = {
        "train_micro_batch_size_per_gpu": len(share[0]),
        "gradient_accumulation_steps": len(share),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    # plain descent: Adam would hide a gradient that is wrong by a factor
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=RATE)
    engine: Any
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    reports = [train_step(engine, batches, [entry.source for entry in ENTRIES]) for _ in range(STEPS)]
    losses = torch.tensor([[report.loss, *report.terms.values()] for report in reports])
    names = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in names], enabled=stage == 3):
        save_file({"losses": losses} | {name: p.detach().clone().contiguous() for name, p in names}, out)
