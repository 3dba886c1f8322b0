"""Teacher depth: one 16-bit inverse-depth map per image, from a frozen monocular model or as the data set recorded it.

    perceptio depth --recipe rooms

Reads   ROOT/images/SOURCE
Writes  ROOT/depth/SOURCE, ROOT/rejects/depth/SOURCE
Needs   a depth model of transformers (a folder or hub id), CPUs or accelerators; nothing for `recorded`

With `depth.maps: sample` only the shards that the codebook is learnt from, and held-out sources, get maps here:
`tokenize` makes the codes of all else straight from the images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from perceptio.data.maps import pack_map
from perceptio.depth.teacher import TeacherMap
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.tables import DEPTH, Reason
from workflows.codebook_sample import sampled_shards
from workflows.commits import Table
from workflows.pool import begin, finish, work
from workflows.shards import Job, Reject, ShardResult, Work, by_id, shards_of
from workflows.store import Root, open_root
from workflows.teacher_maps import CONVENTION as CONVENTION
from workflows.teacher_maps import MapSource, Teaching, mapped

Row = dict[str, Any]


class DepthWorker:
    """Makes the maps of a shard's images, in batches that are always the same."""

    def __init__(self, source: MapSource) -> None:
        self.maps = source.open()

    def process(self, work: Work) -> ShardResult:
        """One map or one reject per image."""
        return by_id(work, ["id", "uri", self.maps.column], self._maps)

    def _maps(self, table: pa.Table) -> ShardResult:
        ids = table["id"].to_pylist()
        rows: list[Row] = []
        rejects: list[Reject] = []
        for key, made in zip(ids, mapped(self.maps, table, _stored), strict=True):
            if isinstance(made, Reject):
                rejects.append(made)
            else:
                rows.append({"id": key, **made})
        return ShardResult(pa.Table.from_pylist(rows, schema=DEPTH), len(ids), rejects)


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the depth table of every source; raises StageError where that cannot be done.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, section = open_root(recipe.root), recipe.depth
    teaching = Teaching.of(recipe)
    images = {source.name: Table(root, "images", source.name).require() for source in recipe.sources}
    wanted = _wanted(recipe, root, images)
    jobs = []
    for name, manifest in images.items():
        table, over = Table(root, "depth", name), Table(root, "images", name)
        shards = {n: inputs for n, inputs in shards_of(images=manifest).items() if n in wanted[name]}
        licences = [*manifest.licences, *teaching.licences]
        expected = sum(commit.kept for commit in manifest.shards if commit.shard in shards)
        jobs.append(Job(table, over, shards, teaching.inputs, licences, expected=expected))
    runs = begin(recipe, jobs, retry)
    work(recipe, runs, DepthWorker, {"source": teaching.source}, pool=section.pool)
    finish(recipe, runs, {"maps": section.maps})


def _wanted(recipe: Recipe, root: Root, images: Mapping[str, Manifest]) -> dict[str, set[int]]:
    """The shards of each source whose maps are kept, those that stand already among them."""
    shards = {name: {commit.shard for commit in manifest.shards} for name, manifest in images.items()}
    if recipe.depth.maps == "all":
        return shards
    training = {source.name: images[source.name] for source in recipe.sources if not source.held_out}
    chosen = sampled_shards(training, recipe.codebook.sample_rows, recipe.seed, recipe.max_reject_share)
    return shards | {name: numbers | set(Table(root, "depth", name).committed()) for name, numbers in chosen.items()}


def _stored(found: TeacherMap) -> Row:
    return {"inv_depth": pack_map(found.inv_depth_HW), "raw_min": found.raw_min, "raw_max": found.raw_max}
