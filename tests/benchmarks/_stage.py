"""A data stage on two actors beside a bare loop on two processes: the same shards, method and machine.

Both sides take shards from a queue, two at a time, and write one Parquet file for each. The rate is taken from the
files' times: rows of all shards but the first of either worker, over the seconds from the second file to the last. So
start-up (Ray, imports, loading a model) is out of it on both sides, and all that happens between two shards is in it.
The sides take turns; the value is the median of the rounds' ratios. On a machine that does other work, too, it says
little: the load average before each round is among the rows.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import skimage
from PIL import Image

from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import REJECTS
from workflows import ingest
from workflows.commits import Table
from workflows.store import open_root

RECIPE = Path(ingest.__file__).parent / "recipes" / "rooms.yaml"
WORKERS = 2
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")

Make = Callable[[Path, Path], None]  # one shard: the file read, the file written


def recipe_at(root: Path, source: dict[str, Any], **settings: Any) -> Recipe:
    """The rooms recipe on one source, two actors of one thread a stage, with dotted settings such as depth__teacher."""
    mixture = [{"source": source["name"], "weight": 1, "segmentation": False, "depth": True}]
    lines = [f"sources={[source]}", f"train.mixture={mixture}", "max_reject_share=0"]
    for stage in ("ingest", "depth", "tokenize", "assemble"):
        lines.append(f"{stage}.pool={{min_actors: {WORKERS}, max_actors: {WORKERS}}}")
    lines += [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return load_recipe(RECIPE, root=str(root), overrides=lines)


def photographs(count: int, size: tuple[int, int]) -> Iterable[np.ndarray]:
    """Real photographs (H, W, 3), no two alike: cuts of those that scikit-image ships."""
    rng = np.random.default_rng(0)
    folder = Path(skimage.__file__).parent / "data"
    whole = [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]
    for number in range(count):
        picture = whole[number % len(whole)]
        share = rng.uniform(0.6, 1.0)
        width, height = (int(side * share) for side in picture.size)
        x, y = (int(rng.integers(0, side - cut + 1)) for side, cut in zip(picture.size, (width, height), strict=True))
        cut_HW3 = np.array(picture.resize(size[::-1], box=(x, y, x + width, y + height)))
        cut_HW3[:8, :8] = (37 * number % 256, number // 256 * 40 % 256, 128)  # two cuts may be the same
        yield cut_HW3


def put(root: Path, name: str, shards: Iterable[pa.Table], inputs: dict[str, str] | None = None) -> Manifest:
    """A finished table of source `data`, shard by shard."""
    table = Table(open_root(str(root)), name, "data")
    for number, rows in enumerate(shards):
        table.commit(number, "bench", rows, REJECTS.empty_table(), rows.num_rows, inputs={})
    fields: dict[str, Any] = {"attempt": "bench", "recipe": "bench", "code": "bench", "inputs": inputs or {}}
    return table.finish(table.committed(), **fields)


def compare(
    root: Path, over: str, made: str, run: Callable[[], None], loader: Callable[[], Make], rows: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a round: rows/s and seconds of start-up of the stage and of the bare loop, and their ratio.

    run is the stage on `root`, which makes the table `made`; loader gives, in a process of its own, the function that
    makes one of its files from one of the files of the table `over`.
    """
    found = []
    for number in range(rounds):
        for folder in (made, "rejects"):
            shutil.rmtree(root / folder, ignore_errors=True)
        load, began = os.getloadavg()[0], time.time()
        run()
        engine = _rate([path.stat().st_mtime for path in (root / made / "data" / "_commits").glob("0*.json")], rows)
        first = min(path.stat().st_mtime for path in (root / made / "data").glob("part-*"))
        bare, waited = _bare(sorted((root / over / "data").glob("part-*")), root / "bare", loader, rows)
        found.append(
            {
                "round": number,
                "load_before": load,
                "rows_per_s": engine,
                "bare_rows_per_s": bare,
                "ratio": engine / bare,
                "seconds_to_first_shard": first - began,
                "bare_seconds_to_first_shard": waited,
            }
        )
    return found


def result(name: str, what: str, bar: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A benchmark's result: the median ratio of its rounds."""
    value = statistics.median(row["ratio"] for row in rows)
    fields = {"value": value, "unit": "x", "bar": bar, "higher_is_better": True, "holds": value >= bar}
    return {"name": name, "what": what, **fields, "rows": rows}


def stop_ray() -> None:
    """Ends the Ray that the stages started."""
    ray.shutdown()


def _rate(times: list[float], rows: int) -> float:
    ordered = sorted(times)
    return rows * (len(ordered) - WORKERS) / (ordered[-1] - ordered[WORKERS - 1])


def _bare(files: list[Path], folder: Path, loader: Callable[[], Make], rows: int) -> tuple[float, float]:
    """Rows/s of the bare loop, and seconds until its first file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    for path in files:
        queue.put(path)
    for _ in range(WORKERS):
        queue.put(None)
    barrier = context.Barrier(WORKERS)
    workers = [context.Process(target=_work, args=(queue, barrier, folder, loader)) for _ in range(WORKERS)]
    began = time.time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    times = [path.stat().st_mtime for path in folder.glob("part-*")]
    assert len(times) == len(files)
    return _rate(times, rows), min(times) - began


def _work(queue: Any, barrier: Any, folder: Path, loader: Callable[[], Make]) -> None:
    make = loader()
    barrier.wait()
    while (path := queue.get()) is not None:
        make(path, folder / path.name)
