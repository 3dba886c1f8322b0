"""Training-ready samples: image, questions, masks, codes and depth target of one image in one row.

    perceptio assemble --recipe rooms

Reads   ROOT/images/SOURCE, ROOT/codes/SOURCE, ROOT/masks/SOURCE where it exists
Writes  ROOT/samples/SOURCE, ROOT/rejects/assemble/SOURCE
Needs   CPUs; the join stays inside a shard, so memory is bounded by one shard
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa

from schemas.recipe import Recipe
from schemas.tables import SAMPLES, Reason
from workflows.commits import Table
from workflows.pool import run_shards
from workflows.runtime import settings_digest
from workflows.shards import Job, Reject, ShardResult, Work, by_id, shards_of
from workflows.store import open_root

FROM_IMAGES = ["id", "uri", "image", "width", "height", "turns", "masks"]
FROM_OTHERS = {"codes": ["id", "codes", "depth_target"], "masks": ["id", "masks"]}


class JoinWorker:
    """Joins a shard's tables on the id, in the order of the images."""

    def process(self, work: Work) -> ShardResult:
        """One sample per image that every table has; a reject for each that was refused on the way."""
        parts = {
            name: Table(work.table.root, name, work.source).read_shard(work.shard, columns, content=work.inputs[name])
            for name, columns in FROM_OTHERS.items()
            if name in work.inputs
        }
        return by_id(work, FROM_IMAGES, lambda images: self._joined(images, parts))

    def _joined(self, images: pa.Table, parts: dict[str, pa.Table]) -> ShardResult:
        ids = images["id"].to_pylist()
        places = {name: {key: i for i, key in enumerate(part["id"].to_pylist())} for name, part in parts.items()}
        missing = {key: [name for name in parts if key not in places[name]] for key in ids}
        kept = [i for i, key in enumerate(ids) if not missing[key]]
        chosen = pa.array(kept, pa.int64())
        columns: dict[str, Any] = {name: images[name].take(chosen) for name in images.column_names}
        for name, part in parts.items():
            rows = part.take(pa.array([places[name][ids[i]] for i in kept], pa.int64()))
            columns |= {column: rows[column] for column in rows.column_names}
        uris = images["uri"].to_pylist()
        rejects = [
            Reject(Reason.UPSTREAM_REJECT, f"refused before: not in {', '.join(missing[key])}", key, uri)
            for key, uri in zip(ids, uris, strict=True)
            if missing[key]
        ]
        table = pa.table([columns[name] for name in SAMPLES.names], schema=SAMPLES)
        return ShardResult(table, len(ids), rejects)


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the samples table of every source; raises StageError where a table before it is not finished.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, section = open_root(recipe.root), recipe.assemble
    jobs = []
    for name in (source.name for source in recipe.sources):
        manifests = {part: Table(root, part, name).require() for part in ("images", "codes")}
        masks = Table(root, "masks", name).manifest()
        if masks is not None:
            manifests["masks"] = masks
        settings = settings_digest(section, section.pool)
        inputs = {"settings": settings, "codebook": manifests["codes"].inputs["codebook"]}
        licences = {licence for manifest in manifests.values() for licence in manifest.licences}
        ordered = sorted(licences, key=lambda licence: (licence.part, licence.source))
        table, over = Table(root, "samples", name), Table(root, "images", name)
        jobs.append(Job(table, over, shards_of(**manifests), inputs, ordered, expected=manifests["images"].kept))
    rows = section.row_group_rows
    run_shards(recipe, jobs, JoinWorker, {}, pool=section.pool, row_group_rows=rows, retry=retry)
