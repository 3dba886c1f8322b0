"""Teacher depth: one 16-bit inverse-depth map per image, from a frozen monocular model or as the data set recorded it.

    perceptio depth --recipe rooms

Reads   ROOT/images/SOURCE
Writes  ROOT/depth/SOURCE, ROOT/rejects/depth/SOURCE
Needs   a depth model of transformers (a folder or hub id), CPUs or accelerators; nothing for `recorded`

Shape legend: H, W image height and width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from perceptio.data.images import ImageLimits, decode, decode_depth16, encode_depth16
from perceptio.depth.teacher import DepthError, DepthTeacher, TeacherMap, inv_depth_from_metric
from schemas.manifest import Licence
from schemas.recipe import Recipe
from schemas.tables import DEPTH, Reason
from workflows.commits import Table
from workflows.runtime import ahead, device, settings_digest, weights
from workflows.shards import Job, Reject, ShardResult, Work, by_id, run_shards, shards_of
from workflows.store import open_root

CONVENTION = "inv_depth in [0, 1], larger = closer, min-max scaled per image"
STORED = ImageLimits(min_side=1, max_pixels=2**31)  # what lies in the images table was checked by `ingest`

Row = dict[str, Any]


class TeacherWorker:
    """Runs the teacher over a shard's images, in batches that are always the same."""

    def __init__(self, teacher: str, dtype: str, batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)  # other thread counts round differently
        self.batch_size = batch_size
        self.teacher = DepthTeacher.from_pretrained(teacher, device=device(), dtype=getattr(torch, dtype))

    def process(self, work: Work) -> ShardResult:
        """One map or one reject per image; files are decoded, and maps encoded, while the model runs."""
        return by_id(work, ["id", "uri", "image"], self._maps)

    def _maps(self, table: pa.Table) -> ShardResult:
        images = table.to_pylist()
        batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]

        def maps() -> Iterator[tuple[list[Row], list[TeacherMap | DepthError]]]:
            pixels = ahead(lambda batch: [decode(row["image"], STORED) for row in batch], batches)
            for batch, rgb in zip(batches, pixels, strict=True):
                yield batch, self.teacher(rgb)

        return _result([row for rows in ahead(_rows, maps()) for row in rows])


class RecordedWorker:
    """Turns the data set's own metric depth into maps; unknown pixels count as beyond range."""

    def process(self, work: Work) -> ShardResult:
        """One map or one reject per image."""
        columns = ["id", "uri", "recorded_depth"]
        return by_id(work, columns, lambda table: _result([self._row(row) for row in table.to_pylist()]))

    def _row(self, row: Row) -> Row | Reject:
        if row["recorded_depth"] is None:
            message = "the record has no depth of its own: name a teacher in depth.teacher"
            return Reject(Reason.NO_RECORDED_DEPTH, message, row["id"], row["uri"])
        millimetres_HW = decode_depth16(row["recorded_depth"]).astype(np.float64)
        millimetres_HW[millimetres_HW == 0] = np.inf
        try:
            return _row(row, inv_depth_from_metric(millimetres_HW / 1000))
        except DepthError as error:
            return _row(row, error)


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the depth table of every source; raises StageError where that cannot be done.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, section = open_root(recipe.root), recipe.depth
    inputs = {"settings": settings_digest(section, section.pool), "convention": CONVENTION}
    licences: list[Licence] = []
    worker: type[TeacherWorker | RecordedWorker] = RecordedWorker
    arguments: Row = {}
    if section.teacher == "recorded":
        inputs["teacher"] = "recorded"
    else:
        source = weights(section.teacher, "teacher")
        teacher = DepthTeacher.from_pretrained(source)
        inputs["teacher"] = teacher.digest
        closed = "-nc" in teacher.licence.lower()
        licences = [
            Licence(
                part="teacher",
                source=section.teacher,
                licence=teacher.licence,
                digest=teacher.digest,
                non_commercial=closed,
            )
        ]
        worker = TeacherWorker
        arguments |= {"teacher": source, "dtype": section.dtype, "batch_size": section.batch_size}
        arguments["threads"] = section.pool.threads
    jobs = []
    for name in (source.name for source in recipe.sources):
        images = Table(root, "images", name).require()
        table, over = Table(root, "depth", name), Table(root, "images", name)
        job = Job(table, over, shards_of(images=images), inputs, [*images.licences, *licences], expected=images.kept)
        jobs.append(job)
    run_shards(recipe, jobs, worker, arguments, pool=section.pool, retry=retry)


def _rows(batch: tuple[list[Row], list[TeacherMap | DepthError]]) -> list[Row | Reject]:
    return [_row(row, found) for row, found in zip(*batch, strict=True)]


def _row(row: Row, found: TeacherMap | DepthError) -> Row | Reject:
    if isinstance(found, DepthError):
        return Reject(found.reason, str(found), row["id"], row["uri"])
    png = encode_depth16(found.inv_depth_HW)
    return {"id": row["id"], "inv_depth": png, "raw_min": found.raw_min, "raw_max": found.raw_max}


def _result(rows: list[Row | Reject]) -> ShardResult:
    kept = [row for row in rows if not isinstance(row, Reject)]
    rejects = [row for row in rows if isinstance(row, Reject)]
    return ShardResult(pa.Table.from_pylist(kept, schema=DEPTH), len(rows), rejects)
