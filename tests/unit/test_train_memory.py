"""What a training holds before any activation, beside DeepSpeed's own estimates and an engine's own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.memory import Parameters, count, model_states
from schemas.recipe_file import load_recipe
from tests.tiny import tiny_parts
from workflows import plan
from workflows.plan_train import plan_training

ROOMS = Path(plan.__file__).parent / "recipes" / "rooms.yaml"
WHOLE = Parameters(all=8_000_000_000, trained=8_000_000_000, largest=500_000_000)
LORA = Parameters(all=8_000_000_000, trained=200_000_000, largest=500_000_000)


@pytest.mark.parametrize("world", [1, 8, 64])
def test_all_trained_in_bf16_at_stage_2_is_what_deepspeed_says(world: int) -> None:
    _, expected = estimate_zero2_model_states_mem_needs(WHOLE.all, world, 1, cpu_offload=False)
    assert model_states(WHOLE, world=world, stage=2, precision="bf16").on_device == pytest.approx(expected)


def test_at_stage_3_the_sums_of_gradients_in_fp32_come_on_top() -> None:
    _, expected, _ = estimate_zero3_model_states_mem_needs(
        WHOLE.all, WHOLE.largest, 8, 1, cpu_offload=False, cpu_offload_params=False
    )
    found = model_states(WHOLE, world=8, stage=3, precision="bf16")
    assert found.on_device == pytest.approx(expected + 2 * WHOLE.all / 8)


def test_frozen_weights_cost_themselves_alone() -> None:
    found = model_states(LORA, world=4, stage=2, precision="bf16")
    assert found == (16 * 10**9, 6 * LORA.trained // 4, 12 * LORA.trained // 4, 0)
    assert model_states(LORA, world=4, stage=1, precision="bf16").gradients == 6 * LORA.trained
    assert model_states(LORA, world=4, stage=2, precision="bf16_autocast").weights == 32 * 10**9


def test_what_is_offloaded_is_not_on_the_device() -> None:
    kept = model_states(LORA, world=4, stage=3, precision="bf16")
    moved = model_states(LORA, world=4, stage=3, precision="bf16", offload="optimizer")
    assert moved.weights == kept.weights
    assert moved.offloaded == kept.gradients + kept.optimizer
    gone = model_states(LORA, world=4, stage=3, precision="bf16", offload="all")
    assert gone.on_device == 4 * LORA.largest
    assert gone.on_device + gone.offloaded == kept.on_device


def test_a_model_without_a_weight_in_memory_is_counted_like_the_model(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)
    real, _ = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    shape = PerceptioForConditionalGeneration.of_shape(parts["base"], parts["sam2"], codes=real.config.depth_codes)
    assert {weight.device for weight in shape.parameters()} == {torch.device("meta")}
    assert count(shape) == count(real)
    assert count(shape).all == sum(weight.numel() for weight in real.parameters())


def test_a_plan_says_what_each_worker_holds(tmp_path: Path) -> None:
    rooms = load_recipe(ROOMS)
    planned = plan_training(rooms)
    assert planned.parameters > planned.trained > 4_000_000
    assert (planned.workers, planned.zero_stage) == (2, 2)
    assert planned.weights == 4 * planned.parameters, "`auto` has fp32 weights wherever it runs"
    assert planned.optimizer == 12 * planned.trained // 2
    nowhere = load_recipe(ROOMS, overrides=[f"model.base={tmp_path / 'nowhere'}"])
    with pytest.raises(OSError, match="nowhere"):
        plan_training(nowhere)
