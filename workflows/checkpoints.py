"""The checkpoints of a training run, each in a folder of its own: ROOT/runs/RUN/step-STEP, or step-STEP-N of the run's
N-th attempt. They are written behind the training's back, and the last whole one is found again."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from perceptio.train.checkpoint import CheckpointError, Saved, Snapshot, verified
from workflows.folders import run_storage
from workflows.store import Root

FOLDER = re.compile(r"step-(\d{8})(?:-(\d+))?")

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Place:
    """A checkpoint's folder in its run: the steps that were taken before it, and which attempt's it is."""

    step: int
    attempt: int = 1

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}" + (f"-{self.attempt}" if self.attempt > 1 else "")


def places(root: Root, run: str) -> list[Place]:
    """A run's checkpoints, whole or not, the last one last."""
    found = (FOLDER.fullmatch(name) for name in root.folders("runs", run))
    return sorted(Place(int(match[1]), int(match[2] or 1)) for match in found if match)


@contextmanager
def opened(root: Root, run: str, place: Place) -> Iterator[Saved]:
    """A checkpoint's local files; raises CheckpointError where one is missing or damaged."""
    storage = run_storage(root).get("storage_filesystem")
    with Checkpoint(root.at("runs", run, place.name), filesystem=storage).as_directory() as folder:
        yield verified(Path(folder))


@contextmanager
def last_whole(
    root: Root, run: str, found: Sequence[Place], agreed: Callable[[bool], bool] = bool
) -> Iterator[Saved | None]:
    """The last of these checkpoints that is whole, None where none is; a torn or damaged one is named and passed over.

    `agreed` says whether all who open it found it whole.
    """
    for place in reversed(found):
        with ExitStack() as stack:
            try:
                saved, damage = stack.enter_context(opened(root, run, place)), None
            except CheckpointError as error:
                saved, damage = None, error
            if agreed(saved is not None):
                yield saved
                return
            log.warning("run %s: %s; the checkpoint before is used", run, damage or f"another worker's {place.name}")
    yield None


class Uploads:
    """Writes one worker's part of each checkpoint in a thread, while the training goes on from the copy in memory."""

    def __init__(self, root: Root, run: str, attempt: int) -> None:
        self.root, self.run, self.attempt = root, run, attempt
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.before: Future[Checkpoint] | None = None

    def save(self, engine: Any, state: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> None:
        """Takes a checkpoint after `step` steps; every worker calls it.

        Waits for the checkpoint before, so that memory holds one copy at most. What goes wrong in the thread ends the
        training.
        """
        if self.before is not None:
            self.before.result()
        name = Place(step, self.attempt).name
        written = self.before = self.pool.submit(self._write, Snapshot.take(engine, state), name)
        ray.train.report(
            {"step": step, **metrics},
            checkpoint=Checkpoint(self.root.at("runs", self.run)),  # what it is is said by the function
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=lambda *_: written.result(),
        )

    def _write(self, snapshot: Snapshot, name: str) -> Checkpoint:
        with tempfile.TemporaryDirectory(prefix="perceptio-checkpoint-") as temporary:
            folder = Path(temporary)
            snapshot.write(folder)
            paths = [path for path in folder.rglob("*") if path.is_file()]
            for path in sorted(paths, key=lambda path: path.parent == folder):  # the list of files last
                self.root.upload(path, "runs", self.run, name, path.relative_to(folder).as_posix())
        storage = run_storage(self.root).get("storage_filesystem")
        return Checkpoint(self.root.at("runs", self.run, name), filesystem=storage)
