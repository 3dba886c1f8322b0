"""DeepSpeed's own settings in a recipe: what may be passed through, and what the recipe has fields of its own for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What the recipe says elsewhere, by the place in DeepSpeed's configuration.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch, workers and micro_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.learning_rate and its kin, betas and weight_decay",
    "scheduler": "train.warmup and steps",
    "fp16": "train.precision",
    "bf16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer.device": "train.offload",
    "zero_optimization.offload_param.device": "train.offload",
    "zero_allow_untested_optimizer": "the trainer, whose optimizer is torch's AdamW",
}
PASSED = (
    "zero_optimization", "bf16", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "activation_checkpointing", "aio", "compile", "comms_logger", "flops_profiler", "tensorboard",
    "csv_monitor", "wandb", "dump_state", "memory_breakdown", "wall_clock_breakdown", "steps_per_print",
    "seq_parallel_communication_data_type", "zero_force_ds_cpu_optimizer",
)  # fmt: skip


def require_passable(section: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that the recipe has a field for, and for one that DeepSpeed does not know."""
    for name in section:
        if name not in PASSED and name not in OWNED:
            raise ValueError(
                f"deepspeed.{name} is no setting that is passed through, expected one of {', '.join(PASSED)}"
            )
    for place, value in _places(section):
        owner = next((field for own, field in OWNED.items() if place == own or place.startswith(f"{own}.")), None)
        if owner is not None:
            raise ValueError(f"deepspeed.{place} is {value!r}, but that is for {owner} to say: set it there")


def _places(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _places(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
