"""The `tokenize` stage on 2 cores beside a bare loop over stored maps.

The bare loop reads the same maps, encodes them with the same codebook in the same batches and one thread a worker,
measures the same error and writes the same Parquet. See `_stage` for the method.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from perceptio.data.maps import pack_map, unpack_map
from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codec import DepthCodec
from perceptio.depth.teacher import inv_depth_from_metric
from perceptio.rooms.render import render_room
from schemas.tables import CODES, DEPTH
from tests.benchmarks._stage import Make, compare, put, recipe_at, result
from workflows import tokenize_depth
from workflows.folders import publish
from workflows.store import open_root
from workflows.teacher_maps import CONVENTION

SIZE, SHARDS, ROWS, BATCH, BAR = 256, 24, 500, 32, 0.9


def write_codebook(folder: Path) -> Path:
    """A codebook of the rooms recipe's size, its codes set by k-means on random maps."""
    torch.manual_seed(0)
    config = CodebookConfig(image_size=96, codes=64, dim=64, channels=(16, 32, 64, 96), residual_blocks=1)
    codebook = DepthCodebook(config)
    with torch.no_grad():
        codebook(torch.rand(16, 96, 96))
    codebook.save_pretrained(folder)
    return folder


def load_bare(folder: Path) -> Make:
    """The bare loop of one process."""
    torch.set_num_threads(1)
    codec = DepthCodec.from_pretrained(folder)

    def make(read: Path, write: Path) -> None:
        maps = pq.read_table(read, columns=["id", "inv_depth"]).to_pylist()
        rows: list[dict[str, Any]] = []
        for first in range(0, len(maps), BATCH):
            part = maps[first : first + BATCH]
            values = [torch.from_numpy(unpack_map(row["inv_depth"]).astype(np.float32) / 65535) for row in part]
            targets_BSS = codec.resize(torch.stack(values))
            codes_BN = codec.encode(targets_BSS)
            errors_B = (codec.decode(codes_BN) - targets_BSS).abs().mean((1, 2))
            pixels_BSS = (targets_BSS * 65535).round().numpy().astype(np.uint16)
            columns = zip(part, codes_BN.tolist(), pixels_BSS, errors_B.tolist(), strict=True)
            for row, codes, target_SS, error in columns:
                fields = {"codes": codes, "depth_target": pack_map(target_SS), "reconstruction_mae": error}
                rows.append({"id": row["id"]} | fields)
        pq.write_table(pa.Table.from_pylist(rows, schema=CODES), write, compression="zstd")

    return make


def map_rows(packed: list[bytes], first: int) -> pa.Table:
    """Rows of the depth table."""
    fixed = {"raw_min": 0.0, "raw_max": 1.0}
    rows = [{"id": f"{first + i:016x}", "inv_depth": data} | fixed for i, data in enumerate(packed)]
    return pa.Table.from_pylist(rows, schema=DEPTH)


def run() -> dict[str, Any]:
    """The benchmark's result."""
    maps = [inv_depth_from_metric(render_room(5, index, SIZE).depth_HW).inv_depth_HW for index in range(50)]
    packed = [pack_map(np.roll(maps[i % 50], i, axis=1)) for i in range(SHARDS * ROWS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kin = {"teacher": "bench", "convention": CONVENTION}
        put(folder, "depth", (map_rows(packed[i : i + ROWS], i) for i in range(0, len(packed), ROWS)), kin)
        fields: dict[str, Any] = {"stage": "codebook", "attempt": "bench", "recipe": "bench", "code": "bench"}
        fields |= {"inputs": {"teacher": "bench"}, "extra": {"convention": CONVENTION}}
        codebook = write_codebook(folder / "local")
        publish(open_root(str(folder)), codebook, "codebook", **fields)
        recipe = recipe_at(
            folder, {"name": "data", "format": "folder", "path": str(folder)}, tokenize__batch_size=BATCH
        )
        rows = compare(folder, "depth", "codes", tokenize_depth.run, recipe, partial(load_bare, codebook), ROWS)
    return result("tokenize", f"tokenize, maps of {SIZE} px, of a bare loop's rows/s", BAR, rows)
