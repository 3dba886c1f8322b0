"""The `ingest` stage on 2 cores beside a bare loop of PIL and pyarrow on 2 processes, over photographs in JPEG.

The bare loop reads the same files from a list, checks the header, decodes them whole, hashes them and writes the same
Parquet. See `_stage` for the method.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceptio.data.images import encode_jpeg
from schemas.tables import IMAGES
from tests.benchmarks._stage import Make, compare, photographs, recipe_at, result
from workflows import ingest
from workflows.listing import listed
from workflows.store import open_root

SIZE, SHARDS, ROWS, BAR = (480, 640), 24, 300, 0.9


def load_bare() -> Make:
    """The bare loop of one process."""

    def make(read: Path, write: Path) -> None:
        rows: list[dict[str, Any]] = []
        for uri in pq.read_table(read, columns=["uri"])["uri"].to_pylist():
            data = Path(uri).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                assert image.format == "JPEG" and min(width, height) >= 16 and image.getexif().get(0x0112, 1) == 1
                image.convert("RGB").load()
            fields = {"turns": [], "masks": [], "boxes": [], "recorded_depth": None, "height": height, "width": width}
            rows.append({"id": hashlib.sha256(data).hexdigest()[:16], "uri": uri, "image": data} | fields)
        pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES), write, compression="zstd")

    return make


def run() -> dict[str, Any]:
    """The benchmark's result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        for number, rgb_HW3 in enumerate(photographs(SHARDS * ROWS, SIZE)):
            (folder / "files" / f"{number:04d}.jpg").write_bytes(encode_jpeg(rgb_HW3, 90))
        source = {"name": "data", "format": "folder", "path": str(folder / "files")}
        recipe = recipe_at(folder, source, ingest__rows_per_shard=ROWS)
        listed(recipe, open_root(recipe.root), recipe.sources[0])  # the bare loop reads it too
        rows = compare(folder, "listing", "images", ingest.run, recipe, load_bare, ROWS)
    return result("ingest", f"ingest, JPEGs of {SIZE[1]} x {SIZE[0]}, of a bare PIL loop's rows/s", BAR, rows)
