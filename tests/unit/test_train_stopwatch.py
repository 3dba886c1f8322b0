"""Seconds of a step's phases: on a CPU they are waited for, on a GPU read out of events that nothing waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from perceptio.train.stopwatch import Stopwatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_phases_add_up_and_what_is_between_is_left_out() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        watch.begin("forward")
        time.sleep(0.05)
        watch.begin("backward")
        time.sleep(0.1)
        watch.end()
        time.sleep(0.2)
    found = watch.seconds()
    assert list(found) == ["forward", "backward"]
    assert found["forward"] >= 0.1 and found["backward"] >= 0.2
    assert sum(found.values()) < 0.3 + 0.4, "the two pauses of 0.2 s are in no phase"


def test_a_phase_that_was_not_ended_is_left_out() -> None:
    watch = Stopwatch(CPU)
    watch.begin("forward")
    watch.begin("backward")
    assert list(watch.seconds()) == ["forward"]


def test_events_are_recorded_without_a_wait_and_read_once_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator here: the events are doubles, and only how they are used is shown."""
    said: list[Any] = []

    @dataclass
    class Event:
        enable_timing: bool
        at: float = 0.0

        def record(self, stream: str) -> None:
            self.at = 250.0 * len(said)
            said.append(stream)

        def elapsed_time(self, other: Event) -> float:
            said.append("read")
            return other.at - self.at

    def waited(*_: object) -> None:
        raise AssertionError("the step waits for the device where it only measures")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited)
    watch = Stopwatch(GPU)
    watch.begin("forward")
    watch.begin("backward")
    watch.end()
    assert said == ["stream of cuda:0"] * 3
    assert watch.seconds() == {"forward": 0.25, "backward": 0.25}, "milliseconds became seconds"
