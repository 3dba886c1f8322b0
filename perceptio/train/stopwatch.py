"""Seconds of the phases of a training step, on a CPU and on an accelerator whose work is queued."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Adds up the seconds of named phases, which stand behind one another and may come again.

    On a CPU they are wall-clock time. On a GPU a phase is the time between two events on the current stream, so what
    its kernels took, and what the stream waited within it: for the host, where that queues kernels too slowly, and for
    the streams on which DeepSpeed communicates, where it waits for them. Time of a collective that runs beside kernels
    is in no phase of its own: gradients that ZeRO reduces during the backward pass are part of `backward` as far as
    they hold it up, and weights that ZeRO-3 gathers part of `forward` and `backward`. `forward` starts with the copy of
    the batch to the device.

    Recording an event waits for nothing. `seconds` reads them, which it may once the host has waited for the last of
    them, as it does where it copies a result from behind it; else it raises RuntimeError, as torch does.
    """

    device: torch.device
    _marks: list[tuple[str, Any]] = field(default_factory=list)  # phase, and where it begins

    def begin(self, phase: str) -> None:
        """Ends the phase before, if one runs, and begins this one."""
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        """Ends the phase that runs; what comes until the next begins is not timed."""
        self._marks.append(("", self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they first came; a phase that was not ended is left out."""
        found: dict[str, float] = defaultdict(float)
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                found[phase] += self._between(begun, ended)
        return dict(found)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        if self.device.type != "cuda":
            return float(ended - begun)
        return float(begun.elapsed_time(ended)) / 1000  # of milliseconds
