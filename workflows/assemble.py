"""Training-ready samples: image, questions, masks, codes and depth target of one image in one row.

    perceptio assemble --recipe rooms

Reads   ROOT/images/SOURCE, ROOT/codes/SOURCE, ROOT/masks/SOURCE where it exists
Writes  ROOT/samples/SOURCE, ROOT/rejects/assemble/SOURCE
Needs   CPUs; the join stays inside a shard, so memory is bounded by one shard
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from schemas.recipe import Recipe
from schemas.tables import SAMPLES, Reason
from workflows.commits import Table
from workflows.runtime import Job, Reject, ShardResult, run_shards, settings_digest
from workflows.store import open_root

FROM_IMAGES = ["id", "uri", "image", "width", "height", "turns", "masks"]


class JoinWorker:
    """Joins a shard's tables on the id, in the order of the images."""

    def __init__(self, root: str, with_masks: list[str]) -> None:
        self.root, self.with_masks = open_root(root), with_masks

    def process(self, source: str, shard: int, payload: str) -> ShardResult:
        """One sample per image that every table has; a reject for each that was refused on the way."""
        images = Table(self.root, "images", source).read_shard(shard, FROM_IMAGES)
        ids = images["id"].to_pylist()
        parts = {"codes": Table(self.root, "codes", source).read_shard(shard, ["id", "codes", "depth_target"])}
        if source in self.with_masks:
            parts["masks"] = Table(self.root, "masks", source).read_shard(shard, ["id", "masks"])
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


def run(recipe: Recipe) -> None:
    """Fills the samples table of every source; raises StageError where a table before it is not finished."""
    root, section = open_root(recipe.root), recipe.assemble
    jobs, with_masks = [], []
    for name in (source.name for source in recipe.sources):
        manifests = {part: Table(root, part, name).require() for part in ("images", "codes")}
        masks = Table(root, "masks", name).manifest()
        if masks is not None:
            manifests["masks"] = masks
            with_masks.append(name)
        inputs = {part: manifest.digest for part, manifest in manifests.items()}
        inputs["settings"] = settings_digest(section, section.pool)
        licences = {licence for manifest in manifests.values() for licence in manifest.licences}
        payloads = [""] * len(manifests["images"].shards)
        ordered = sorted(licences, key=lambda licence: (licence.part, licence.source))
        jobs.append(Job(Table(root, "samples", name), payloads, inputs, ordered))
    arguments = {"root": recipe.root, "with_masks": with_masks}
    run_shards(recipe, jobs, JoinWorker, arguments, pool=section.pool, row_group_rows=recipe.assemble.row_group_rows)
