"""A checkpoint goes on with another number of workers, 2 -> 1 -> 2, as if it had never stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.checkpoint import Snapshot, load_checkpoint, read_weights, to_universal, verified
from perceptio.train.engine import start_engine
from perceptio.train.step import Objective, train_step
from perceptio.vlm.backbone import add_lora, set_trainable
from tests.batches import BOTH, DEPTH, ENTRIES, MASKS, WEIGHTS, WORDS, batch_of
from tests.tiny import tiny_parts

SAMPLES = ((0, BOTH), (1, WORDS), (2, MASKS), (3, DEPTH))  # of every global batch; a micro-batch is two
WORLDS, STEPS = (2, 1, 2), 2  # the workers of each part of the run, and its steps


@dataclass(frozen=True)
class Training:
    stage: int
    lora: bool

    @property
    def name(self) -> str:
        return f"stage-{self.stage}{'-lora' if self.lora else ''}"


TRAININGS = [Training(2, lora=False), Training(3, lora=True)]


def work(rank: int, world: int, part: int, parts: dict[str, Path], out: Path) -> None:
    """One rank's share of part `part` of every training, from the checkpoint that the part before left."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"file://{out / f'store-{world}-{part}'}", rank=rank, world_size=world)
    for training in TRAININGS:
        run(training, part, parts, out / training.name, steps=STEPS if out.name == "changing" else STEPS * len(WORLDS))
    dist.destroy_process_group()


def run(training: Training, part: int, parts: dict[str, Path], out: Path, *, steps: int) -> None:
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    before, after, universal = out / f"{part - 1}", out / f"{part}", out / f"{part - 1}-universal"
    torch.manual_seed(0)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    if training.lora:
        add_lora(model, rank=4, alpha=8, dropout=0.0)
        set_trainable(model)
    else:
        set_trainable(model, vision=True, projector=True, language="full", embeddings=True)
    share = SAMPLES[rank * 4 // world : (rank + 1) * 4 // world]
    batches = [batch_of((model, processor), share[first : first + 2]) for first in range(0, len(share), 2)]
    objective = Objective(model.train(), WEIGHTS, len(ENTRIES))
    weights = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": len(batches),
        "zero_optimization": {"stage": training.stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if part:
        config["checkpoint"] = {"load_universal": True}
        if rank == 0:
            to_universal(verified(before), universal)
        dist.barrier()
    engine = start_engine(objective, optimizer, config, schedule)
    if part:
        load_checkpoint(engine, universal)
    reports = [train_step(engine, batches, [entry.source for entry in ENTRIES]) for _ in range(steps)]
    Snapshot.take(engine, {"position": part}).write(after)
    dist.barrier()
    losses = torch.tensor([report.loss for report in reports])
    rates = torch.tensor(schedule.get_last_lr())
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=training.stage == 3):
        if rank == 0:
            end = {name: weight.detach().clone().contiguous() for name, weight in model.named_parameters()}
            save_file(end | {"losses": losses, "rates": rates}, out / f"{part}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers end with in one go (steady/), and what 2, 1 and 2 do in three (changing/)."""
    folder = tmp_path_factory.mktemp("worlds")
    parts = tiny_parts(folder / "parts")
    for name, worlds in (("steady", (2,)), ("changing", WORLDS)):
        for training in TRAININGS:
            (folder / name / training.name).mkdir(parents=True)
        for part, world in enumerate(worlds):
            spawn(work, (world, part, parts, folder / name), nprocs=world)
    return folder


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_a_changing_number_of_workers_trains_alike(folder: Path, training: Training) -> None:
    steady = load_file(folder / "steady" / training.name / "0.safetensors")
    parts = [load_file(folder / "changing" / training.name / f"{part}.safetensors") for part in range(len(WORLDS))]
    losses = torch.cat([part["losses"] for part in parts])
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, steady["losses"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts[-1]["rates"], steady["rates"])
    saved = read_weights(verified(folder / "changing" / training.name / f"{len(WORLDS) - 1}"))
    for name in steady.keys() - {"losses", "rates"}:
        torch.testing.assert_close(saved[name], parts[-1][name])
        assert torch.allclose(parts[-1][name], steady[name], atol=2e-4, rtol=1e-3), name
