"""TensorBoard's event files of a training run: terms in all and by data set, rates, seconds, shares, pictures.

tensorboard --logdir ROOT/runs
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from workflows.store import Root
from workflows.train_samples import Shown

FOLDER = "tensorboard"  # in ROOT/runs/RUN


class Board:
    """Event files of one attempt; those of a resumed run take back what lies behind its checkpoint."""

    def __init__(self, root: Root, run: str, first_step: int) -> None:
        self.root, self.place = root, ("runs", run, FOLDER)
        self._folder = tempfile.TemporaryDirectory(prefix="perceptio-board-")
        self._writer = SummaryWriter(self._folder.name, purge_step=first_step + 1 if first_step else None)

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl."""
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["step"])

    def show(self, step: int, shown: Shown) -> None:
        """Adds the picture of fixed samples, and the figures of what was generated."""
        self._writer.add_image("samples", np.asarray(shown.picture), step, dataformats="HWC")
        for name, value in generated(shown.figures):
            self._writer.add_scalar(name, value, step)

    def write(self) -> None:
        """Copies what there is to the root."""
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            self.root.write(file.read_bytes(), *self.place, file.name)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("loss", "gradient_norm", "learning_rate", "waited", "tokens", "mfu"):
        if line.get(name) is not None:
            yield f"run/{name}", line[name]
    for phase, taken in line.get("times", {}).items():
        yield f"seconds/{phase}", taken
    for term, value in line["terms"].items():
        yield f"loss/{term}", value
    for source, terms in line["by_source"].items():
        for term, value in terms.items():
            yield f"{term}/{source}", value
    whole = sum(line["samples"].values())
    for source, count in line["samples"].items():
        yield f"share/{source}", count / whole
    for source, of in line.get("mixture", {}).items():
        yield f"share_so_far/{source}", of["share"]
        yield f"share_asked/{source}", of["asked"]
        yield f"passes/{source}", of["passes"]
    yield from generated(line.get("generated", {}))


def generated(figures: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Names and values of what fixed samples were generated as."""
    for name, value in figures.items():
        yield f"generated/{name}", value
