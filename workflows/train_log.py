"""The log of a training run: rank 0 writes metrics.jsonl, the driver reads it back as a progress line."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from perceptio.data.mixture import Mixture
from perceptio.train.flops import ModelFlops
from perceptio.train.step import StepReport
from workflows.store import Root
from workflows.train_board import Board, generated
from workflows.train_mlflow import Tracker
from workflows.train_preflight import described, read_preflight
from workflows.train_samples import Shown
from workflows.train_shares import counted, shares

METRICS_NAME, RECIPE_NAME, SAMPLES_FOLDER = "metrics.jsonl", "recipe.json", "samples"  # in ROOT/runs/RUN
LOG_EVERY_S = 15.0
PACE_STEPS = 20  # of which a pace is said
WRITING_SHARE = 0.05  # of the time at most goes into rewriting the file

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class TrainLog:
    """Appends one line a step to ROOT/runs/RUN/metrics.jsonl; a resumed run cuts what lies behind its checkpoint.

    With `flops` and `peak_flops`, those of one worker's device in a second, each line says the share of the peak that
    was used: `mfu`, of the time since the step before, with all that lies between them.
    """

    def __init__(
        self,
        root: Root,
        run: str,
        first_step: int,
        *,
        workers: int,
        mixture: Mixture,
        flops: ModelFlops | None = None,
        peak_flops: float | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.root, self.place, self.workers, self.mixture = root, ("runs", run, METRICS_NAME), workers, mixture
        self.lines = [line for line in read_metrics(root, run) if line["step"] <= first_step]
        self.samples = counted(self.lines)
        self.flops, self.peak_flops = flops, peak_flops
        self.board = Board(root, run, first_step)
        self.tracker = tracker
        if tracker is not None:
            tracker.begin(self.lines)
        self.before = self.seconds  # of the attempts that this one goes on from
        self.began, self.next_write = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Of all attempts up to the last step, without their starts."""
        return float(self.lines[-1]["seconds"]) if self.lines else 0.0

    def add(self, step: int, report: StepReport, *, learning_rate: float, waited: float) -> None:
        """Adds the report of `step` (counted from 1), before which its data was waited for so many seconds."""
        seconds = round(self.before + time.monotonic() - self.began, 3)
        line: dict[str, Any] = {"step": step, "workers": self.workers, "seconds": seconds, "waited": round(waited, 4)}
        line["learning_rate"] = learning_rate
        said = dataclasses.asdict(report)
        del said["work"]
        if self.flops is not None and self.peak_flops is not None:
            line["flops"] = self.flops.of(report.work)
            line["mfu"] = line["flops"] / (max(seconds - self.seconds, 1e-3) * self.workers * self.peak_flops)
        said["times"] = {phase: round(taken, 5) for phase, taken in report.times.items()}
        if report.skipped:  # JSON knows no NaN
            said |= {"loss": None, "terms": {}, "by_source": {}, "gradient_norm": None}
        self.samples.update(report.samples)
        self.lines.append(line | said | {"mixture": shares(self.mixture, step, self.samples)})
        self.board.add(self.lines[-1])
        if self.tracker is not None:
            self.tracker.add(self.lines[-1])
        if time.monotonic() >= self.next_write:
            self.write()

    def show(self, shown: Shown) -> None:
        """Adds what the model made of the fixed samples after the last step, and writes their picture."""
        line = self.lines[-1]
        line["generated"] = shown.figures
        file = io.BytesIO()
        shown.picture.save(file, "PNG")
        self.root.write(file.getvalue(), *self.place[:2], SAMPLES_FOLDER, f"step-{line['step']}.png")
        self.board.show(line["step"], shown)
        if self.tracker is not None:
            self.tracker.add_scalars(line["step"], generated(shown.figures))

    def write(self) -> None:
        """Writes the whole file, and TensorBoard's, and tells MLflow; how often depends on how long that takes."""
        started = time.monotonic()
        self.root.write("".join(json.dumps(line) + "\n" for line in self.lines).encode(), *self.place)
        self.board.write()
        if self.tracker is not None:
            self.tracker.write()
        self.next_write = time.monotonic() + max(1.0, (time.monotonic() - started) / WRITING_SHARE)

    def close(self) -> None:
        """Writes for the last time, behind the last step."""
        self.write()
        if self.tracker is not None:
            self.tracker.close()


def timed(items: Iterator[Item]) -> Iterator[tuple[Item, float]]:
    """Each item, and the seconds that it was waited for."""
    while True:
        began = time.monotonic()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.monotonic() - began


def paces(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Samples and tokens a second, and shares of the time, over some lines but the first; {} of fewer than two.

    Shares are of the wait for data and of each phase of a step on rank 0 (see `Stopwatch`); what they leave is sums
    over ranks, the log, checkpoints. `mfu`, the share of the devices' peak, is left out where a line has none. A
    skipped step counts: it was computed.
    """
    seconds = lines[-1]["seconds"] - lines[0]["seconds"] if len(lines) > 1 else 0.0
    if seconds <= 0:
        return {}
    samples = sum(sum(line["samples"].values()) for line in lines[1:])
    tokens, waited = (sum(line[name] for line in lines[1:]) for name in ("tokens", "waited"))
    found = {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds, "data_wait": waited / seconds}
    for phase in lines[-1].get("times", {}):  # lines of an older version have none
        found[phase] = sum(line.get("times", {}).get(phase, 0.0) for line in lines[1:]) / seconds
    if all("mfu" in line for line in lines[1:]):
        steps = itertools.pairwise(lines)
        found["mfu"] = sum(line["mfu"] * (line["seconds"] - before["seconds"]) for before, line in steps) / seconds
    return found


def read_metrics(root: Root, run: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, [] where there is none."""
    data = root.read("runs", run, METRICS_NAME) or b""
    return [json.loads(line) for line in data.decode().splitlines()]


@contextmanager
def watched(root: Root, run: str, steps: int) -> Iterator[None]:
    """Shows the run's progress while the block runs: a bar on a terminal, a log line now and then elsewhere."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(root, run, steps, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(root: Root, run: str, steps: int, done: threading.Event) -> None:
    console, said = Console(stderr=True), time.monotonic()
    columns = (
        TextColumn("train"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} steps, {task.fields[note]}"),
    )
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task, told, flown = bar.add_task("train", total=steps, note="starting"), 0, False
    unread = set[str]()
    if console.is_terminal:
        bar.start()
    try:
        while not done.wait(1.0):
            lines = read_metrics(root, run)
            if not flown and not told and (found := read_preflight(root, run)) is not None:
                log.info("pre-flight: %s", described(found))
                flown = True
            if not lines:
                continue
            for line in lines:
                if line.get("skipped") and line["step"] > told:
                    said_of = line["step"], ", ".join(line["skipped"])
                    log.warning("train: step %d was skipped, its gradient not finite; samples %s", *said_of)
                for where in line.get("unread", {}).keys() - unread:
                    unread.add(where)
                    log.warning("train: from step %d on samples are left out, unreadable: %s", line["step"], where)
            told = lines[-1]["step"]
            taken = [line for line in lines if line["loss"] is not None]
            if not taken:
                continue
            last = taken[-1] | {"step": told}
            terms = ", ".join(f"{name} {value:.3g}" for name, value in last["terms"].items())
            bar.update(task, completed=last["step"], note=f"loss {last['loss']:.3f}")
            if not console.is_terminal and time.monotonic() - said > LOG_EVERY_S:
                said = time.monotonic()
                log.info(
                    "train: %d of %d steps, loss %.3f (%s)%s",
                    last["step"],
                    steps,
                    last["loss"],
                    terms,
                    _pace(lines, steps),
                )
    finally:
        if console.is_terminal:
            bar.stop()


def _pace(lines: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Of the last steps, and how long those to come will take at it; "" where nothing is known yet."""
    last = lines[-PACE_STEPS:]
    found = paces(last)
    if not found:
        return ""
    each = (last[-1]["seconds"] - last[0]["seconds"]) / (len(last) - 1)
    left = timedelta(seconds=round(each * (steps - last[-1]["step"])))
    shares = [f"{phase} {found[phase]:.0%}" for phase in last[-1].get("times", {})]
    shares.append(f"data waited for {found['data_wait']:.1%} of the time")
    if "mfu" in found:
        shares.append(f"{found['mfu']:.1%} of the devices' peak used")
    return (
        f"; {found['samples_per_s']:.3g} samples/s, {found['tokens_per_s']:,.0f} tokens/s, {', '.join(shares)},"
        f" {left} to go"
    )
