"""How far a stage has come, for people and for logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from schemas.manifest import Manifest, ShardCommit

LOG_EVERY_S = 10.0

log = logging.getLogger(__name__)


class ShardProgress:
    """A bar on a terminal, a log line now and then elsewhere: rows/s, rejects, time left."""

    def __init__(self, stage: str, total: int, done: int) -> None:
        self.stage, self.total, self.rows, self.rejected = stage, total, 0, 0
        self.done = self.first = done
        self.began = self.said = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        console = Console(stderr=True)
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self.live = console.is_terminal
        self.task = self.bar.add_task(stage, total=self.total, completed=self.done, note="")

    def __enter__(self) -> ShardProgress:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.bar.stop()

    def add(self, commit: ShardCommit) -> None:
        self.done, self.rows, self.rejected = self.done + 1, self.rows + commit.read, self.rejected + commit.rejected
        seconds = max(time.monotonic() - self.began, 1e-9)
        left = seconds / (self.done - self.first) * (self.total - self.done)
        note = f"{self.rows / seconds:.1f} rows/s, {self.rejected} rejects"
        self.bar.update(self.task, completed=self.done, note=note)
        now = time.monotonic()
        if not self.live and (now - self.said > LOG_EVERY_S or self.done == self.total):
            self.said = now
            log.info(
                "%s: %d of %d shards, %s, %.0f s left",
                self.stage,
                self.done,
                self.total,
                note,
                left,
                extra={"stage": self.stage, "rows": self.rows, "rejected": self.rejected, "seconds_left": left},
            )


def summarise(manifests: Sequence[Manifest]) -> None:
    """Prints a table with a line per source: shards, rows, rejects, rows/s of one actor."""
    table = RichTable("table", "source", "shards", "read", "kept", "rejected", "rows/s an actor")
    for manifest in manifests:
        rate = manifest.extra.get("rows_done", 0) / manifest.seconds if manifest.seconds else 0.0
        counts = (len(manifest.shards), manifest.read, manifest.kept, manifest.rejected)
        table.add_row(manifest.stage, manifest.source, *(f"{n:,}" for n in counts), f"{rate:.1f}" if rate else "-")
    Console(stderr=True).print(table)
