"""A data stage on two actors beside a bare loop on two processes: the same shards, method and machine.

Both sides take shards from a queue, two at a time, and write one Parquet file for each. They are started one after the
other; once each has made its first files they take turns, a few seconds each, while the other side's processes are all
stopped (SIGSTOP): the driver, Ray's own and the actors, or the bare loop's. So whatever else the machine does, or how
fast its clock runs, meets both alike. A side's rate is the slope of its finished shards over its own running time, so
start-up (Ray, imports, loading a model) is out of it and is told apart, and all that happens between two shards is in.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
NICENESS = 15  # Ray's for its workers; the bare loop has the same, so that other work on the machine meets both alike
TURN_S = 3.0
LEAST = 8  # shards of either side that a slope is made of
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")

Make = Callable[[Path, Path], None]  # one shard: the file read, the file written
Stage = Callable[[Recipe], None]
Times = list[float]


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


class Side:
    """The processes of one side, with all that they start, the files that they finish, and when they were running."""

    def __init__(self, processes: list[Any], files: Callable[[], Iterable[Path]], wanted: int) -> None:
        self.processes, self.files, self.wanted = processes, files, wanted
        self.turns: list[tuple[float, float]] = []
        self.began = time.time()
        for process in processes:
            process.start()

    def times(self) -> Times:
        """When each finished file was written, in order."""
        return sorted(path.stat().st_mtime for path in self.files())

    def wait_for(self, count: int) -> None:
        """Waits for so many finished files."""
        while len(self.times()) < count:
            if any(process.exitcode not in (None, 0) for process in self.processes):
                raise RuntimeError(f"a side ended with exit codes {[p.exitcode for p in self.processes]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops every process; what they have begun waits."""
        self.each(psutil.Process.suspend)

    def take_turn(self) -> None:
        """Runs for TURN_S."""
        began = time.time()
        self.each(psutil.Process.resume)
        while time.time() < began + TURN_S and len(self.times()) < self.wanted:
            time.sleep(0.05)
        self.each(psutil.Process.suspend)
        self.turns.append((began, time.time()))

    def end(self) -> None:
        """Lets the side finish what is left, and its processes end."""
        self.each(psutil.Process.resume)
        for process in self.processes:
            process.join()
            assert process.exitcode == 0

    def rate(self, rows: int) -> float:
        """Rows/s: the slope of finished files, each of so many rows, over the time of the side's own turns."""
        found = [(self._ran(at), at) for at in self.times() if self.turns[0][0] < at <= self.turns[-1][1]]
        assert len(found) >= LEAST, f"{len(found)} shards were finished in turns, expected {LEAST}: give more of them"
        ran = [seconds for seconds, _ in found]
        return rows * statistics.linear_regression(ran, range(len(ran))).slope

    def _ran(self, moment: float) -> float:
        return sum(min(moment, end) - began for began, end in self.turns if began < moment)

    def each(self, do: Callable[[psutil.Process], None]) -> None:
        """Does it to every process of the side."""
        for process in self.processes:
            try:
                tree = psutil.Process(process.pid)
                for one in (tree, *tree.children(recursive=True)):
                    do(one)
            except psutil.NoSuchProcess:
                continue  # it ended


def compare(
    root: Path,
    over: str,
    made: str,
    stage: Callable[[Recipe], None],
    recipe: Recipe,
    loader: Callable[[], Make],
    rows: int,
) -> list[dict[str, Any]]:
    """One row a side: rows/s, and seconds from its start to its first file.

    stage makes the table `made` under `root`, of the recipe; loader gives, in a process of its own, the function that
    makes one of its files from one of the files of the table `over`. Both are functions of modules, to be sent there.
    """
    load, context = os.getloadavg()[0], multiprocessing.get_context("spawn")
    files = sorted((root / over / "data").glob("part-*"))
    queue: Any = context.Queue()
    for path in [*files, *[None] * WORKERS]:
        queue.put(path)
    (root / "bare").mkdir()
    workers = [context.Process(target=_work, args=(queue, root / "bare", loader)) for _ in range(WORKERS)]
    bare = Side(workers, lambda: (root / "bare").glob("part-*"), len(files))
    with _ended(bare):
        bare.wait_for(WORKERS)
        bare.stop()
        driver = context.Process(target=_drive, args=(stage, recipe.model_dump_json()))
        engine = Side([driver], lambda: (root / made / "data" / "_commits").glob("0*.json"), len(files))
        with _ended(engine):
            engine.wait_for(WORKERS)
            engine.stop()
            while all(len(side.times()) < side.wanted for side in (engine, bare)):
                for side in (engine, bare):
                    side.take_turn()
            measured = {"stage": engine.rate(rows), "bare loop": bare.rate(rows)}
            engine.end()
        bare.end()
    assert len(bare.times()) == len(engine.times()) == len(files)
    sides = {"stage": engine, "bare loop": bare}
    return [
        {
            "side": name,
            "rows_per_s": measured[name],
            "seconds_to_first_shard": side.times()[0] - side.began,
            "turns": len(side.turns),
            "load_before": load,
        }
        for name, side in sides.items()
    ]


def result(name: str, what: str, bar: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A benchmark's result: the stage's rate over the bare loop's."""
    rate = {row["side"]: row["rows_per_s"] for row in rows}
    value = rate["stage"] / rate["bare loop"]
    fields = {"value": value, "unit": "x", "bar": bar, "higher_is_better": True, "holds": value >= bar}
    return {"name": name, "what": what, **fields, "rows": rows}


@contextmanager
def _ended(side: Side) -> Iterator[None]:
    """No process of the side is left, stopped or not, when something fails."""
    try:
        yield
    finally:
        if any(process.is_alive() for process in side.processes):
            side.each(psutil.Process.kill)


def _drive(stage: Stage, recipe: str) -> None:
    stage(Recipe.model_validate_json(recipe))
    ray.shutdown()


def _work(queue: Any, folder: Path, loader: Callable[[], Make]) -> None:
    os.nice(NICENESS)
    make = loader()
    while (path := queue.get()) is not None:
        make(path, folder / path.name)
