"""Masks of every object: the record's own where it has them, else pseudo-masks that SAM2 draws from boxes or clicks.

    perceptio masks --recipe rooms

Reads   ROOT/images/SOURCE
Writes  ROOT/masks/SOURCE, ROOT/rejects/masks/SOURCE
Needs   a folder of a SAM2 image model, CPUs or accelerators

An image is refused where a mask that a question is about is of low quality by SAM2's own two measures; of an image
without such questions every mask counts. The other masks are kept, their quality beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import torch

from perceptio.data.images import ImageLimits, decode
from perceptio.data.masks import masks_to_rle
from perceptio.segmentation.teacher import MaskTeacher, PseudoMask
from schemas.manifest import Licence
from schemas.recipe import Recipe
from schemas.tables import MASKS, Reason
from workflows.commits import Table
from workflows.pool import run_shards
from workflows.runtime import ahead, device, settings_digest, weights
from workflows.shards import Job, Reject, ShardResult, Work, by_id, shards_of
from workflows.store import open_root

STORED = ImageLimits(min_side=1, max_pixels=2**31)  # what lies in the images table was checked by `ingest`
COLUMNS = ["id", "uri", "image", "width", "height", "turns", "masks", "boxes", "clicks"]

Row = dict[str, Any]


class MaskWorker:
    """Passes recorded masks through, and prompts the teacher with the boxes, else the clicks, of the other images."""

    def __init__(self, teacher: str, min_predicted_iou: float, min_stability: float, threads: int) -> None:
        torch.set_num_threads(threads)  # other thread counts round differently
        self.teacher = MaskTeacher.from_pretrained(teacher, device=device())
        self.min_predicted_iou, self.min_stability = min_predicted_iou, min_stability

    def process(self, work: Work) -> ShardResult:
        """One row or one reject per image; files are decoded while the model runs."""
        return by_id(work, COLUMNS, self.drawn)

    def drawn(self, table: pa.Table) -> ShardResult:
        """One row or one reject per row of an images table."""
        images = table.to_pylist()
        without = [row for row in images if not row["masks"] and (row["boxes"] or row["clicks"])]
        drawn = dict(self._drawn(without))
        rows = [self._judged(row, drawn[row["id"]]) if row["id"] in drawn else _recorded(row) for row in images]
        kept = [row for row in rows if not isinstance(row, Reject)]
        rejects = [row for row in rows if isinstance(row, Reject)]
        return ShardResult(pa.Table.from_pylist(kept, schema=MASKS), len(rows), rejects)

    def _drawn(self, images: list[Row]) -> Iterator[tuple[str, list[PseudoMask]]]:
        pixels = ahead(lambda row: decode(row["image"], STORED), images)
        for row, rgb_HW3 in zip(images, pixels, strict=True):
            # `ingest` allows a box to end half a pixel outside, where scaling rounded the image's side
            boxes = [
                (box["x0"], box["y0"], min(box["x1"], row["width"]), min(box["y1"], row["height"]))
                for box in row["boxes"]
            ]
            clicks = [(click["x"], click["y"]) for click in row["clicks"]]
            yield row["id"], self.teacher(rgb_HW3, boxes, [] if boxes else clicks)  # a box says more

    def _judged(self, row: Row, masks: list[PseudoMask]) -> Row | Reject:
        named = {i for turn in row["turns"] for i in turn["objects"]} or set(range(len(masks)))
        for i in sorted(named):
            found = masks[i]
            if found.predicted_iou < self.min_predicted_iou or found.stability < self.min_stability:
                message = (
                    f"object {i}: predicted IoU {found.predicted_iou:.2f}, stability {found.stability:.2f}; masks needs"
                    f" min_predicted_iou {self.min_predicted_iou:g} and min_stability {self.min_stability:g}"
                )
                return Reject(Reason.LOW_MASK_QUALITY, message, row["id"], row["uri"])
        return {
            "id": row["id"],
            "masks": [masks_to_rle(mask.mask_HW[None])[0] for mask in masks],
            "predicted_iou": [mask.predicted_iou for mask in masks],
            "stability": [mask.stability for mask in masks],
            "recorded": False,
        }


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the masks table of every source; raises StageError where that cannot be done.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, section = open_root(recipe.root), recipe.masks
    source = weights(section.teacher, "segmenter")
    teacher = MaskTeacher.from_pretrained(source)
    inputs = {"settings": settings_digest(section, section.pool), "teacher": teacher.digest}
    licence = Licence(
        part="mask teacher",
        source=section.teacher,
        licence=teacher.licence,
        digest=teacher.digest,
        non_commercial="-nc" in teacher.licence.lower(),
    )
    jobs = []
    for name in (source.name for source in recipe.sources):
        images = Table(root, "images", name).require()
        table, over = Table(root, "masks", name), Table(root, "images", name)
        job = Job(table, over, shards_of(images=images), inputs, [*images.licences, licence], expected=images.kept)
        jobs.append(job)
    arguments = {
        "teacher": source,
        "min_predicted_iou": section.min_predicted_iou,
        "min_stability": section.min_stability,
        "threads": section.pool.threads,
    }
    run_shards(recipe, jobs, MaskWorker, arguments, pool=section.pool, retry=retry)


def _recorded(row: Row) -> Row:
    """The row of an image that came with masks, or that has no object at all."""
    ones = [1.0] * len(row["masks"])
    return {"id": row["id"], "masks": row["masks"], "predicted_iou": ones, "stability": ones, "recorded": True}
