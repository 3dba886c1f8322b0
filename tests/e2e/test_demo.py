"""The demo as a user runs it: time, memory, and what the issue of its figures asks for; minutes long, so a proof."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

CHECKOUT = Path(__file__).parents[2]
SECONDS, GIGABYTES = 720, 12
# better than the blind guess, by a paired 95 % interval that leaves out 0
SHOWN = ("reconstruction_mae", "generated_depth_mae", "referring_ciou", "referring_ciou_vs_untrained")
NAMED = (*SHOWN, "closest_point_accuracy", "well_formed_without_grammar")


class MemoryWatch(threading.Thread):
    """The most memory that a process and all below it held at once, in bytes; shared pages count once (PSS)."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.over = process, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(2):
            held = 0
            for part in [self.process, *self.process.children(recursive=True)]:
                try:
                    held += part.memory_full_info().pss
                except psutil.Error:
                    continue  # it ended meanwhile
            self.peak = max(self.peak, held)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_the_demo_is_quick_small_and_better_than_blind(tmp_path: Path, record: Callable[..., None]) -> None:
    began = time.monotonic()
    command = [str(Path(sys.executable).parent / "perceptio"), "demo", "--root", str(tmp_path / "demo")]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as demo:
        watch = MemoryWatch(psutil.Process(demo.pid))
        watch.start()
        output, _ = demo.communicate()
        watch.over.set()
        watch.join()
    seconds = time.monotonic() - began
    assert demo.returncode == 0, output
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    metrics = report["metrics"]
    record(
        wall_seconds=round(seconds),
        seconds=report["seconds"],
        peak_memory_gb=round(watch.peak / 1e9, 2),
        metrics={name: metrics[name] for name in NAMED},
    )
    last = [line.split()[0] for line in output.strip().splitlines()[-5:]]
    assert last == ["Made", "Quality", "Served", "Report", "Next"], output
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
    assert {"ingest", "depth", "codebook", "tokenize", "assemble", "train", "evaluate", "serve"} <= set(
        report["seconds"]
    )
    for name in SHOWN:
        worse, better = (metrics[name][f"difference_{side}"] for side in ("low", "high"))
        assert worse > 0 if metrics[name]["higher_is_better"] else better < 0, (name, metrics[name])
    assert watch.peak < GIGABYTES * 1e9
    assert seconds < SECONDS
