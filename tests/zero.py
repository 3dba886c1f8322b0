"""One rank's training with DeepSpeed, in a process of its own: what ZeRO's stages are compared by."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.engine import start_engine
from perceptio.train.step import Objective, train_step
from perceptio.vlm.backbone import add_lora, set_trainable
from tests.batches import ENTRIES, WEIGHTS, batch_of, without_images

STEPS, RATE = 2, 1e-3


@dataclass(frozen=True)
class Micro:
    """A micro-batch: numbers of `tests.batches.sample`, and the place in ENTRIES of what each has."""

    samples: tuple[tuple[int, int], ...]
    images: bool = True


@dataclass(frozen=True)
class Run:
    """A training: its name, ZeRO's stage, and each rank's micro-batches of the global batch."""

    name: str
    stage: int
    shares: tuple[tuple[Micro, ...], ...]
    packed_to: int | None = None
    bf16: bool = False
    offload: bool = False  # the optimizer's state, and at stage 3 weights, to the CPU's memory
    spoilt: bool = False  # rank 0's pixels are no numbers in the first step
    lineage: bool = False  # LoRA, and what else trains by default; an untied Llama


def trained(rank: int, runs: Sequence[Run], parts: dict[bool, dict[str, Path]], out: Path) -> None:
    """Does this rank's part of every training, each from the same start; saves that start and what it then has."""
    torch.set_num_threads(1)
    world = len(runs[0].shares)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=world)
    for run in runs:
        _trained(run, run.shares[rank], parts[run.lineage], out / f"{run.name}-{rank}.safetensors")
    dist.destroy_process_group()


def _trained(run: Run, share: tuple[Micro, ...], parts: dict[str, Path], out: Path) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    if run.lineage:
        add_lora(model, rank=4, alpha=8, dropout=0.0)
        set_trainable(model)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:  # at its zeros the other half of a layer would have no gradient
                torch.nn.init.normal_(weight, std=0.05)
    else:
        set_trainable(model, vision=True, projector=True, language="full", embeddings=True)
    start = {f"start.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    batches = []
    for micro in share:
        batch = batch_of((model, processor), micro.samples)
        batches.append(batch if micro.images else without_images((model, processor), batch))
    objective = Objective(model.train(), WEIGHTS, len(ENTRIES), packed_to=run.packed_to)
    zero: dict[str, Any] = {"stage": run.stage, "stage3_param_persistence_threshold": 0}  # cut small weights too
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if run.offload and run.stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": len(share[0].samples),
        "gradient_accumulation_steps": len(share),
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.bf16},
        "data_types": {"grad_accum_dtype": "fp32"} if run.bf16 else {},
        "gradient_clipping": 1e6,  # a run always clips: where it does not, DeepSpeed does not look at the norm
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    # plain descent: Adam would hide a gradient that is wrong by a factor
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=RATE)
    engine = start_engine(objective, optimizer, config)
    sources = [entry.source for entry in ENTRIES]
    if run.spoilt:
        nan = float("nan") if dist.get_rank() == 0 else 1.0
        spoilt = [dataclasses.replace(batch, pixel_values=batch.pixel_values * nan) for batch in batches]
        skipped = train_step(engine, spoilt, sources).skipped
        assert set(skipped) == {f"{number:016x}" for micro in run.shares[0] for number, _ in micro.samples}, skipped
    reports = [train_step(engine, batches, sources) for _ in range(STEPS)]
    found = {
        "losses": torch.tensor([[report.loss, *report.terms.values()] for report in reports]),
        "gradient_norms": torch.tensor([report.gradient_norm for report in reports]),
    }
    names = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if run.bf16:
        end = {name: safe_get_full_fp32_param(p) for name, p in names}
        save_file(found | start | end, out)
        return
    with deepspeed.zero.GatheredParameters([p for _, p in names], enabled=run.stage == 3):
        end = {name: p.detach().clone().contiguous() for name, p in names}
        save_file(found | start | end, out)
