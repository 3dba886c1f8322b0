"""A training that is asked to stop leaves a last checkpoint: its driver got SIGTERM, or a machine is taken away."""

from __future__ import annotations

from enum import Enum
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist


class Stop(Enum):
    NOT = 0
    MACHINE = 1  # one of the workers' machines goes soon: a checkpoint now, and on with what stays
    RUN = 2  # the driver was told to end: a checkpoint, and the workers end


class Listener:
    """A worker's ear for what asks its run to stop; all workers hear the same, after the same step."""

    def __init__(self, bell: Any) -> None:
        self.bell, self.device = bell, ray.train.torch.get_device()
        self.warned = False  # of a machine that goes

    def ask(self) -> Stop:
        """Whether to stop after this step; a machine's going is said once. Every worker calls it after every step."""
        first = dist.get_rank() == 0
        rung = torch.tensor(int(first and ray.get(self.bell.heard.remote())), device=self.device)
        dist.broadcast(rung, 0)
        going = ray.train.get_preemption_info() is not None
        if rung.item():
            return Stop.RUN
        if going and not self.warned:
            self.warned = True
            return Stop.MACHINE
        return Stop.NOT
