"""Tables of made-up samples, with manifests, as `assemble` would leave them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import MANIFEST_NAME, FileEntry, Manifest, ShardCommit
from schemas.tables import SAMPLES


def row(number: int) -> dict[str, Any]:
    """A row that no other number's is like."""
    return {
        "id": f"{number:016x}", "image": bytes([number % 256]) * 5000, "width": 4, "height": 3,
        "turns": [{"kind": "count", "form": "", "prompt": "How many?", "answer": str(number), "expression": "",
                   "objects": [0], "choices": ["1", "2"], "points": []}],
        "masks": [{"height": 3, "width": 4, "counts": "0<"}], "codes": [number % 7, 1], "depth_target": b"png",
    }  # fmt: skip


def commit(folder: Path, shard: int, first: int, rows: int, group: int) -> ShardCommit:
    """A shard of some rows; one of no rows has no file."""
    entry = None
    if rows:
        stream = io.BytesIO()
        table = pa.Table.from_pylist([row(first + i) for i in range(rows)], SAMPLES)
        how = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        pq.write_table(table, stream, row_group_size=group, **how)
        path = f"part-{shard:06d}-a.parquet"
        (folder / path).write_bytes(stream.getvalue())
        digest = hashlib.sha256(stream.getvalue()).hexdigest()
        entry = FileEntry(path=path, rows=rows, size=len(stream.getvalue()), sha256=digest)
    return ShardCommit(
        shard=shard, attempt="a", read=rows, kept=rows, rejected=0, reasons={}, content="", data=entry, rejects=None
    )


def spoil(root: Path, manifest: Manifest, shard: int, row_group: int) -> Path:
    """Changes a byte in the middle of a row group's images; the file that it did that to."""
    data = manifest.shards[shard].data
    assert data is not None
    file = root / "samples" / manifest.source / data.path
    column = pq.read_metadata(file).row_group(row_group).column(1)
    assert column.path_in_schema == "image"
    content = bytearray(file.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    return file


def write(root: Path, *shards: int, group: int = 4, source: str = "vqa", first: int = 0) -> Manifest:
    """The manifest of a table of some shards, each of so many rows; they are numbered from `first` on."""
    folder = root / "samples" / source
    folder.mkdir(parents=True)
    firsts = [first + sum(shards[:i]) for i in range(len(shards))]
    commits = tuple(commit(folder, i, firsts[i], rows, group) for i, rows in enumerate(shards))
    total = sum(shards)
    manifest = Manifest(
        stage="assemble",
        source=source,
        attempt="a",
        recipe="r",
        code="c",
        read=total,
        kept=total,
        shards=commits,
        digest="d",
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest
