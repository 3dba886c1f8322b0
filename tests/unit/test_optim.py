"""Precision: where bfloat16 is only emulated, nobody trains in it by default."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from perceptio.train import optim
from schemas.recipe import RecipeError, TrainRecipe
from schemas.recipe_file import load_recipe

ROOMS = Path(optim.__file__).parents[2] / "workflows" / "recipes" / "rooms.yaml"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recipe(precision: str) -> TrainRecipe:
    return load_recipe(ROOMS, overrides=[f"train.precision={precision}"]).train


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16_autocast"), (False, "fp32")])
def test_auto_is_what_the_device_computes(
    group: None, monkeypatch: pytest.MonkeyPatch, able: bool, precision: str
) -> None:
    monkeypatch.setattr(optim, "computes_bf16", lambda device: able)
    settled = optim.settled_precision(recipe("auto"), torch.device("cpu"))
    assert settled == recipe(precision)
    config = optim.deepspeed_config(settled, world=2)
    assert config["torch_autocast"]["enabled"] is able and not config["bf16"]["enabled"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_what_a_recipe_says_is_done(precision: str) -> None:
    assert optim.settled_precision(recipe(precision), torch.device("cpu")) == recipe(precision)
    config = optim.deepspeed_config(recipe(precision), world=2)
    assert config["bf16"]["enabled"] is (precision == "bf16")
    in_fp32 = config["data_types"].get("grad_accum_dtype") == "fp32"
    assert in_fp32 is (precision == "bf16"), "weights in fp32 have gradients in fp32 anyway"


def test_an_unsettled_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'auto', expected one that settled_precision"):
        optim.deepspeed_config(recipe("auto"), world=2)


def with_settings(**settings: Any) -> TrainRecipe:
    overrides = [f"train.{name}={json.dumps(value)}" for name, value in settings.items()]
    return load_recipe(ROOMS, overrides=["train.precision=fp32", *overrides]).train


def test_deepspeeds_own_settings_are_passed_through_beside_ours() -> None:
    wanted = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000},
        "comms_logger": {"enabled": True},
    }
    config = optim.deepspeed_config(with_settings(zero_stage=2, offload="optimizer", deepspeed=wanted), world=2)
    assert config["zero_optimization"] == {
        "stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}
    }  # fmt: skip
    assert config["comms_logger"] == {"enabled": True}
    assert config["gradient_clipping"] == with_settings().clip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"deepspeed": {"gradient_clipping": 2}},
            "deepspeed.gradient_clipping is 2, but that is for train.clip to say",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "deepspeed.zero_optimization.stage is 1, but that is for"),
        (
            {"deepspeed": {"optimizer": {"type": "Adam"}}},
            "deepspeed.optimizer.type is 'Adam', but that is for",
        ),
        ({"deepspeed": {"fp16": {}}}, "deepspeed.fp16 is {}, but that is for train.precision"),
        ({"deepspeed": {"zero_optimisation": {}}}, "deepspeed.zero_optimisation is no setting that is passed through"),
        ({"offload": "all"}, "offload is 'all' with zero_stage 2, expected 3"),
    ],
)
def test_what_a_recipe_has_a_field_for_is_said_there(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        with_settings(**settings)
    assert message in str(error.value)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads an x86's flags; the cases above need none")
def test_a_cpu_is_known_by_its_instructions() -> None:
    names = set(Path("/proc/cpuinfo").read_text().split())
    if {"avx512_bf16", "amx_bf16"} & names:
        assert optim.computes_bf16(torch.device("cpu"))
    elif "avx512f" not in names:
        assert not optim.computes_bf16(torch.device("cpu"))
