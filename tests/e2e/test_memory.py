"""Memory of the data stages does not grow with the table: ten times the rows, at most 1.3 times the peak.

The images are tiny, so that what grows with the number of rows shows, and not what an image weighs.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from tests.tiny import depth_teacher, random_codebook
from workflows import ingest
from workflows.commits import Table
from workflows.store import open_root

CHECKOUT = Path(__file__).parents[2]
FEW, MANY, LIMIT = 20_000, 200_000, 1.3
PER_FILE, PER_SHARD = 10_000, 2_000
DRIVER = """
import sys
from pathlib import Path
from perceptio.depth.teacher import DepthTeacher
from schemas.recipe import Recipe
from workflows import assemble, depth, ingest, tokenize_depth, verify
from workflows.folders import publish
from workflows.store import open_root

recipe, codebook = Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
for stage in (ingest, depth):
    print(stage.__name__, flush=True)
    stage.run(recipe)
inputs = {"teacher": DepthTeacher.from_pretrained(recipe.depth.teacher).digest}
fields = {"stage": "codebook", "attempt": "a", "recipe": recipe.digest, "code": "test", "inputs": inputs}
publish(open_root(recipe.root), codebook, "codebook", **fields, extra={"convention": depth.CONVENTION})
for stage in (tokenize_depth, assemble, verify):
    print(stage.__name__, flush=True)
    stage.run(recipe)
"""


def write_images(folder: Path, rows: int) -> None:
    """Parquet files of 16 x 16 pictures, no two alike."""
    folder.mkdir()
    for first in range(0, rows, PER_FILE):
        numbers = np.arange(first, first + PER_FILE)
        images = []
        for number in numbers:
            rgb = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(rgb).save(stream, "PNG", compress_level=1)
            images.append({"bytes": stream.getvalue(), "path": f"{number}.png"})
        table = pa.table({"image": images})
        pq.write_table(table, folder / f"{first:07}.parquet", row_group_size=PER_SHARD)


def recipe_at(place: Path, teacher: Path) -> Recipe:
    source = {"name": "tiny", "format": "parquet", "path": str(place / "files"), "columns": {"image": "image"}}
    entry = {"source": "tiny", "weight": 1, "segmentation": False, "depth": True}
    settings = {
        "sources": [source],
        "train.mixture": [entry],
        "ingest.rows_per_shard": PER_SHARD,
        "depth.teacher": str(teacher),
        "depth.batch_size": 64,
        "tokenize.batch_size": 64,
        "cluster.min_memory_gb": 4,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_recipe(
        Path(ingest.__file__).parent / "recipes" / "rooms.yaml", overrides=overrides, root=str(place / "root")
    )


def peaks_of(place: Path, rows: int, teacher: Path, codebook: Path) -> dict[str, int]:
    """The most bytes that the driver, and that any one actor, held of its own (USS), at any time in all stages."""
    place.mkdir()
    write_images(place / "files", rows)
    recipe = recipe_at(place, teacher)
    (place / "recipe.json").write_text(recipe.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", DRIVER, str(place / "recipe.json"), str(codebook)]
    peaks: Counter[str] = Counter()
    with (place / "log.txt").open("w") as log:
        driver = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while driver.poll() is None:
            for process in [driver, *driver.children(recursive=True)]:
                try:
                    name = "driver" if process.pid == driver.pid else process.cmdline()[0]
                    kind = "driver" if name == "driver" else "actor" if "Map(_" in name else ""
                    if kind:
                        peaks[kind] = max(peaks[kind], process.memory_full_info().uss)
                except (psutil.Error, IndexError):
                    continue  # it ended meanwhile
            try:
                driver.wait(0.5)
            except psutil.TimeoutExpired:
                continue
    assert driver.returncode == 0, (place / "log.txt").read_text()[-3000:]
    assert Table(open_root(recipe.root), "samples", "tiny").require().kept == rows
    return dict(peaks)


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_table(tmp_path: Path, record: Callable[..., None]) -> None:
    teacher, codebook = tmp_path / "teacher", tmp_path / "codebook"
    depth_teacher(teacher)
    random_codebook().save_pretrained(codebook)
    few = peaks_of(tmp_path / "few", FEW, teacher, codebook)
    many = peaks_of(tmp_path / "many", MANY, teacher, codebook)
    megabytes = {
        f"{kind}_{rows}_rows": round(peaks[kind] / 1e6) for rows, peaks in ((FEW, few), (MANY, many)) for kind in peaks
    }
    ratios = {kind: round(many[kind] / few[kind], 3) for kind in few}
    print(megabytes, ratios)
    record(megabytes=megabytes, ratios=ratios, limit=LIMIT)
    assert set(few) == {"driver", "actor"}
    assert all(ratio <= LIMIT for ratio in ratios.values()), ratios
