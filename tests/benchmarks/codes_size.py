"""Bytes a row on disk of the codes table without its depth targets, for 100 codes of 128.

The codes are drawn evenly, which packs worst: real ones take less. Counted is the whole file less the chunks of the
`depth_target` column, so that footers and page headers are in it.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceptio.data.maps import pack_map
from schemas.tables import CODES
from tests.benchmarks._stage import put

ROWS, TOKENS, CODES_IN_ALL, SIDE, BAR = 10_000, 100, 128, 320, 200.0


def run() -> dict[str, Any]:
    """The benchmark's result."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    target = pack_map(np.rint(65535 * (0.5 * x + 0.5 * y)).astype(np.uint16))
    rows = [
        {
            "id": hashlib.sha256(str(number).encode()).hexdigest()[:16],
            "codes": rng.integers(0, CODES_IN_ALL, TOKENS).tolist(),
            "depth_target": target,
            "reconstruction_mae": float(rng.random()),
        }
        for number in range(ROWS)
    ]
    with tempfile.TemporaryDirectory() as name:
        put(Path(name), "codes", [pa.Table.from_pylist(rows, schema=CODES)])
        (path,) = (Path(name) / "codes" / "data").glob("part-*")
        sizes = _column_bytes(path)
        value = (path.stat().st_size - sizes["depth_target"]) / ROWS
    return {
        "name": "codes_size",
        "what": f"codes table a row on disk, {TOKENS} codes of {CODES_IN_ALL}, without depth targets",
        "value": value,
        "unit": "bytes",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": [{"column": column, "bytes_a_row": size / ROWS} for column, size in sizes.items()],
    }


def _column_bytes(path: Path) -> dict[str, int]:
    """Bytes of each column's chunks."""
    metadata = pq.read_metadata(path)
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes
