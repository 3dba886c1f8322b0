"""What TensorBoard is given: every term, in all and by data set, at its step."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from perceptio.train.step import StepReport
from tests.mixtures import vqa_and_boxes
from workflows.store import open_root
from workflows.train_board import FOLDER
from workflows.train_log import SAMPLES_FOLDER, TrainLog, read_metrics
from workflows.train_samples import Shown

TERMS = {"text": 0.5, "mask_bce": 0.25}
REPORT = StepReport(
    1.5, TERMS, {"vqa": {"text": 0.5}}, 2.0, {"vqa": 6, "boxes": 2}, 900, "0" * 16, times={"forward": 0.25}
)
SKIPPED = StepReport(math.nan, {}, {}, math.nan, {"vqa": 8}, 900, "0" * 16, skipped=("a",))


def events(folder: Path) -> list[Event]:
    """Every event of the files in the order of their making: length, checksum, event, checksum, and so on."""
    found = []
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_every_term_is_there_at_its_step(tmp_path: Path) -> None:
    log = TrainLog(open_root(str(tmp_path)), "run", 0, workers=2, mixture=vqa_and_boxes())
    log.add(1, REPORT, learning_rate=0.1, waited=0.5)
    log.add(2, SKIPPED, learning_rate=0.1, waited=0.5)
    log.write()
    seen: dict[str, dict[int, float]] = defaultdict(dict)
    for event in events(tmp_path / "runs" / "run" / FOLDER):
        for value in event.summary.value:
            seen[value.tag][event.step] = value.simple_value
    assert seen["run/loss"] == {1: 1.5} and seen["run/gradient_norm"] == {1: 2.0}
    assert seen["loss/text"] == {1: 0.5} and seen["text/vqa"] == {1: 0.5} and seen["loss/mask_bce"] == {1: 0.25}
    assert seen["share/vqa"] == {1: 0.75, 2: 1.0} and seen["share/boxes"] == {1: 0.25}
    assert seen["share_so_far/vqa"] == {1: 0.75, 2: 0.875} and seen["share_asked/vqa"] == {1: 0.75, 2: 0.75}
    assert seen["passes/vqa"] == pytest.approx({1: 0.6, 2: 1.4}) and seen["passes/boxes"] == {1: 0.5, 2: 0.5}
    assert seen["seconds/forward"] == {1: 0.25}
    assert seen["run/learning_rate"] == pytest.approx({1: 0.1, 2: 0.1}) and seen["run/tokens"] == {1: 900, 2: 900}


def test_generated_samples_are_there_as_a_picture_and_figures(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    log = TrainLog(root, "run", 0, workers=2, mixture=vqa_and_boxes())
    log.add(1, REPORT, learning_rate=0.1, waited=0.5)
    log.show(Shown({"well_formed": 0.5}, Image.new("RGB", (30, 20), (0, 0, 255))))
    log.write()
    values = [value for e in events(tmp_path / "runs" / "run" / FOLDER) for value in e.summary.value if e.step == 1]
    (drawn,) = [value.image for value in values if value.HasField("image")]
    assert (drawn.width, drawn.height) == (30, 20)
    assert [value.simple_value for value in values if value.tag == "generated/well_formed"] == [0.5]
    assert read_metrics(root, "run")[0]["generated"] == {"well_formed": 0.5}
    with Image.open(tmp_path / "runs" / "run" / SAMPLES_FOLDER / "step-1.png") as picture:
        assert picture.getpixel((3, 3)) == (0, 0, 255)


def test_a_resumed_run_takes_back_what_lies_behind_its_checkpoint(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    for first in (0, 2):
        log = TrainLog(root, "run", first, workers=2, mixture=vqa_and_boxes())
        log.add(first + 1, REPORT, learning_rate=0.1, waited=0.0)
        log.write()
    starts = [e for e in events(tmp_path / "runs" / "run" / FOLDER) if e.HasField("session_log")]
    assert [event.step for event in starts] == [3], "TensorBoard forgets steps from there on"
