"""The log of a run: a line a step, of all attempts one time, and how fast the last steps went."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perceptio.train.flops import ModelFlops, Work
from perceptio.train.step import StepReport
from tests.mixtures import vqa_and_boxes
from workflows import train_log
from workflows.store import Root, open_root
from workflows.train_log import TrainLog, paces, read_metrics, timed, watched

TIMES = {"forward": 0.8, "backward": 0.9}
REPORT = StepReport(1.5, {"text": 0.5}, {"vqa": {"text": 0.5}}, 2.0, {"vqa": 6, "boxes": 2}, 900, "0" * 16, times=TIMES)
SKIPPED = StepReport(math.nan, {"text": math.nan}, {}, math.nan, {"vqa": 8}, 900, "0" * 16, ("a", "b"), times=TIMES)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return open_root(str(tmp_path))


def add(log: TrainLog, *steps: int, report: StepReport = REPORT) -> None:
    for step in steps:
        log.add(step, report, learning_rate=0.1, waited=0.001)
    log.write()


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint_and_its_time_goes_on(root: Root) -> None:
    first = TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes())
    first.began -= 100
    add(first, 1, 2, 3, 4)
    second = TrainLog(root, "run", 2, workers=2, mixture=vqa_and_boxes())
    assert second.seconds == pytest.approx(100, abs=5)
    second.began -= 50
    add(second, 3)
    lines = read_metrics(root, "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["seconds"] == second.seconds == pytest.approx(150, abs=5)


def test_a_skipped_step_is_in_the_log_and_the_log_is_json(root: Root) -> None:
    add(TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes()), 1, report=SKIPPED)
    text = Path(root.at("runs", "run", train_log.METRICS_NAME)).read_text()
    (line,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert line["skipped"] == ["a", "b"] and line["loss"] is None and line["gradient_norm"] is None


def test_paces_are_of_the_steps_behind_the_first() -> None:
    lines: list[dict[str, Any]] = [
        {"seconds": 10.0 + 2 * step, "waited": 0.5, "samples": {"vqa": 6, "boxes": 2}, "tokens": 900}
        | {"times": {"forward": 0.25 * step, "backward": 1.0}}
        for step in range(3)
    ]
    pace = {"samples_per_s": 4.0, "tokens_per_s": 450.0, "data_wait": 0.25}
    assert paces(lines) == pace | {"forward": 0.1875, "backward": 0.5}
    for line in lines:
        del line["times"]
    assert paces(lines) == pace, "lines of an older version have no times"
    assert paces(lines[:1]) == paces([]) == {}


def test_the_share_of_the_peak_is_of_the_time_since_the_step_before(root: Root) -> None:
    flops = ModelFlops(2.0, 0, 0, 0, 0, 0, 5.0)
    log = TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes(), flops=flops, peak_flops=1e3)
    for step, seconds in ((1, 4), (2, 8)):
        log.began -= seconds
        add(log, step, report=dataclasses.replace(REPORT, work=Work(tokens=900, depth_maps=40)))
    lines = read_metrics(root, "run")
    assert [line["flops"] for line in lines] == [2000, 2000]
    assert [line["mfu"] for line in lines] == pytest.approx([2000 / (2 * 1e3 * 4), 2000 / (2 * 1e3 * 8)], rel=0.05)
    assert paces(lines)["mfu"] == pytest.approx(lines[1]["mfu"], rel=1e-6)
    assert "work" not in lines[0], "what it was computed from is not repeated a line a step"
    add(TrainLog(root, "unknown", 0, workers=2, mixture=vqa_and_boxes()), 1)
    assert not {"mfu", "flops"} & set(read_metrics(root, "unknown")[0])


def test_an_items_time_is_what_it_was_waited_for() -> None:
    def slow() -> Iterator[str]:
        time.sleep(0.2)
        yield "late"
        yield "at once"

    (late, long), (at_once, short) = timed(slow())
    assert (late, at_once) == ("late", "at once")
    assert long >= 0.2 > short


def test_who_watches_is_told_of_pace_and_of_skipped_steps(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_log, "LOG_EVERY_S", 0.0)
    log = TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes())
    log.began -= 2
    add(log, 1)
    log.began -= 2
    add(log, 2, report=SKIPPED)
    with caplog.at_level(logging.INFO), watched(root, "run", 12):
        end = time.monotonic() + 30
        while "to go" not in caplog.text and time.monotonic() < end:
            time.sleep(0.1)
    assert "step 2 was skipped, its gradient not finite; samples a, b" in caplog.text
    said = r"2 of 12 steps, loss 1\.500 \(text 0\.5\); (3\.[89]\d?|4) samples/s, 4[3-5]\d tokens/s,"
    said += " forward (39|40)%, backward 4[345]%, .* 0:00:2[01] to go"
    assert re.search(said, caplog.text), caplog.text


def test_who_watches_is_told_once_of_each_row_group_that_is_left_out(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_log, "LOG_EVERY_S", 0.0)
    log = TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes())
    log.began -= 2
    for step, unread in enumerate(({}, {"a: row group 0": 2}, {"a: row group 0": 1, "b: row group 3": 1}), start=1):
        add(log, step, report=dataclasses.replace(REPORT, unread=unread))
    assert [line["unread"].get("a: row group 0", 0) for line in read_metrics(root, "run")] == [0, 2, 1]
    with caplog.at_level(logging.INFO), watched(root, "run", 12):
        end = time.monotonic() + 30
        while "to go" not in caplog.text and time.monotonic() < end:
            time.sleep(0.1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"train: from step {step} on samples are left out, unreadable: {where}"
        for step, where in ((2, "a: row group 0"), (3, "b: row group 3"))
    ]
