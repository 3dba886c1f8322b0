"""DeepSpeed's engine around an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def start_engine(
    objective: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], schedule: LRScheduler | None = None
) -> Any:
    """The engine; torch.distributed must stand. DeepSpeed is imported here alone: it takes seconds, and prints.

    On a CPU DeepSpeed would first compile a collective of its inference, which no training calls: a minute of a first
    start, and a lock that a worker killed meanwhile leaves behind, for which the next one waits for ever. So not here.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, lr_scheduler=schedule, config=dict(config))
    return engine
