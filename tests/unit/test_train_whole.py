"""Rank 0 asks the model between two steps: under every ZeRO stage it is whole, and training never knows of it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn

from perceptio.generate import Perceiver
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import Request
from perceptio.train.step import Objective, train_step
from perceptio.train.whole import whole
from perceptio.vlm.backbone import add_lora, set_trainable
from tests.batches import BOTH, ENTRIES, WEIGHTS, WORDS, batch_of
from tests.tiny import tiny_parts

STAGES, STEPS = (1, 2, 3), 3
SHARES = ([(0, BOTH), (1, WORDS)], [(2, WORDS), (3, BOTH)])  # of the two ranks


def work(rank: int, parts: dict[str, Path], out: Path) -> None:
    """One rank's trainings at each stage, with what is asked between steps and without."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2)
    for stage in STAGES:
        for asked in (False, True):
            save_file(trained(rank, stage, parts, asked=asked), out / f"{stage}-{asked}-{rank}.safetensors")
    dist.destroy_process_group()


def trained(rank: int, stage: int, parts: dict[str, Path], *, asked: bool) -> dict[str, torch.Tensor]:
    import deepspeed

    torch.manual_seed(0)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    add_lora(model, rank=4, alpha=8, dropout=0.3)
    set_trainable(model)
    batches = [batch_of((model, processor), SHARES[rank])]
    plain = copy.deepcopy(model)  # without DeepSpeed's hooks
    objective = Objective(model.train(), WEIGHTS, len(ENTRIES))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # cut small weights too
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    engine: Any
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        losses.append(train_step(engine, batches, [entry.source for entry in ENTRIES]).loss)
        if asked:
            before = state_of(model)
            with whole(engine, model):
                if rank == 0:
                    torch.rand(step + 1)  # as much as may be drawn inside
                    ask(model, plain, processor)
            assert state_of(model) == before
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        end = {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}
    return end | {"losses": torch.tensor(losses, dtype=torch.float64)}


def ask(model: PerceptioForConditionalGeneration, plain: PerceptioForConditionalGeneration, processor: Any) -> None:
    """What it answers as it stands is what a model without DeepSpeed answers with these weights."""
    plain.load_state_dict(model.state_dict())
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    requests = [Request(image, "Please segment the lamp.", "on", "on"), Request(image, "What is it?", "off", "off")]
    found, expected = (Perceiver(one, processor).perceive(requests, max_new_tokens=4) for one in (model, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.reply == other.reply
        assert np.array_equal(one.masks_MHW, other.masks_MHW) and np.array_equal(one.scores_M, other.scores_M)
    assert len(found[0].reply.codes) == 4 and found[0].reply.objects > 0


def state_of(model: PerceptioForConditionalGeneration) -> tuple[Any, ...]:
    """Random state, modes, hooks in their order, gradients, and what is held of each weight."""
    parts = list(model.modules())
    return (
        torch.get_rng_state().tolist(),
        [part.training for part in parts],
        [(list(part._forward_pre_hooks), list(part._forward_hooks)) for part in parts],
        [weight.grad is None for weight in model.parameters()],
        [weight.shape for weight in model.parameters()],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    spawn(work, (tiny_parts(folder / "parts"), folder), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_same_to_the_last_bit_where_rank_0_asks_between_steps(folder: Path, stage: int) -> None:
    for rank in range(2):
        plain, asked = (load_file(folder / f"{stage}-{asked}-{rank}.safetensors") for asked in (False, True))
        assert plain.keys() == asked.keys()
        assert all(torch.equal(value, asked[name]) for name, value in plain.items())
        assert len(set(plain["losses"].tolist())) == STEPS, "weights move"
