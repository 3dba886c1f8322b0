"""Depth tokens: each inverse-depth map becomes N codes of the codebook, and a small map for the losses.

    perceptio tokenize --recipe rooms

Reads   ROOT/depth/SOURCE, ROOT/codebook; with `depth.maps: sample` ROOT/images/SOURCE of what is not held out
Writes  ROOT/codes/SOURCE, ROOT/rejects/tokenize/SOURCE
Needs   a codebook made from maps of the same teacher and convention; CPUs or accelerators; where no maps are stored,
        the teacher too

The codes are the same to the last bit whether a map was stored or not: it is brought to 16 bits either way.

Shape legend: B batch, H, W image height and width, S the codebook's image side, N tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from perceptio.data.maps import pack_map, unpack_map
from perceptio.depth.codec import DepthCodec
from perceptio.depth.teacher import TeacherMap
from schemas.manifest import Licence, Manifest
from schemas.recipe import Recipe
from schemas.tables import CODES, Reason
from workflows.commits import Table
from workflows.folders import local_copy, require
from workflows.pool import begin, finish, work
from workflows.runtime import ahead, device, settings_digest, threads_beside_a_model
from workflows.shards import Job, Reject, ShardResult, Work, by_id, shards_of
from workflows.store import OtherInputsError, Root, open_root
from workflows.teacher_maps import MapSource, Teaching, mapped

STEPS = 65535  # inv_depth 1.0 in 16 bits

Row = dict[str, Any]


class CodecWorker:
    """Encodes a shard's stored maps, always in fp32, and decodes them again to measure what was lost."""

    def __init__(self, root: str, batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.batch_size, self.threads, self.beside = batch_size, threads, threads_beside_a_model()
        folder = local_copy(open_root(root), "codebook", stage="codebook")
        self.codec = DepthCodec.from_pretrained(folder, device=device())

    def process(self, work: Work) -> ShardResult:
        """One row of codes per map."""
        return by_id(work, ["id", "inv_depth"], self._stored)

    def _stored(self, table: pa.Table) -> ShardResult:
        ids, packed = table["id"].to_pylist(), table["inv_depth"]
        parts = [range(i, min(i + self.batch_size, len(ids))) for i in range(0, len(ids), self.batch_size)]
        made = ahead(
            lambda part: self._targets([unpack_map(packed[i].as_py()) for i in part]), parts, threads=self.beside
        )
        targets = itertools.chain.from_iterable(made)
        return ShardResult(self._codes(zip(ids, targets, strict=True)), len(ids))

    def _target(self, inv_depth_HW: npt.NDArray[np.uint16]) -> Tensor:
        """The map at the codebook's size, (1, S, S); always from 16 bits, as maps are stored."""
        return self._targets([inv_depth_HW])[0]

    def _targets(self, maps: Sequence[npt.NDArray[np.uint16]]) -> list[Tensor]:
        """The same of many maps; those of one size that follow each other at once."""
        groups = [np.stack(list(group)) for _, group in itertools.groupby(maps, key=lambda map_HW: map_HW.shape)]
        small = [self.codec.resize(torch.from_numpy(group_BHW.astype(np.float32) / STEPS)) for group_BHW in groups]
        return [target_SS.unsqueeze(0) for group_BSS in small for target_SS in group_BSS]

    def _codes(self, targets: Iterable[tuple[str, Tensor]]) -> pa.Table:
        """The codes table of ids and their small maps, in fixed batches."""
        rows: list[Row] = []
        remaining = iter(targets)
        encoded = ahead(_rows, self._encoded(remaining), threads=self.beside)
        for batch in encoded:
            rows += batch
        return pa.Table.from_pylist(rows, schema=CODES)

    def _encoded(self, targets: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[list[str], Tensor, Tensor, Tensor]]:
        """Ids, codes, small maps and their errors, batch by batch."""
        while batch := list(itertools.islice(targets, self.batch_size)):
            torch.set_num_threads(self.threads)  # the teacher, where there is one, may use another number
            targets_BSS = torch.cat([target for _, target in batch])
            codes_BN = self.codec.encode(targets_BSS)
            errors_B = (self.codec.decode(codes_BN) - targets_BSS).abs().mean((1, 2))
            yield [key for key, _ in batch], targets_BSS.cpu(), codes_BN.cpu(), errors_B.cpu()


class ImageCodecWorker(CodecWorker):
    """Encodes a shard's images: teacher and codec in one actor, and no map is stored."""

    def __init__(self, root: str, batch_size: int, threads: int, source: MapSource) -> None:
        super().__init__(root, batch_size, threads)
        self.maps = source.open()

    def process(self, work: Work) -> ShardResult:
        """One row of codes, or one reject, per image."""
        return by_id(work, ["id", "uri", self.maps.column], self._from_images)

    def _from_images(self, table: pa.Table) -> ShardResult:
        rejects: list[Reject] = []

        def targets() -> Iterator[tuple[str, Tensor]]:
            ids = table["id"].to_pylist()
            for key, made in zip(ids, mapped(self.maps, table, self._small), strict=True):
                if isinstance(made, Reject):
                    rejects.append(made)
                else:
                    yield key, made

        return ShardResult(self._codes(targets()), table.num_rows, rejects)

    def _small(self, found: TeacherMap) -> Tensor:
        return self._target(found.inv_depth_HW)


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the codes table of every source; raises OtherInputsError for a codebook of other depth.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, pool = open_root(recipe.root), recipe.tokenize.pool
    codebook = require(root, "codebook", stage="codebook")
    inputs = {"settings": settings_digest(recipe.tokenize, pool), "codebook": codebook.digest}
    options = {"root": recipe.root, "batch_size": recipe.tokenize.batch_size, "threads": pool.threads}
    fused = [s.name for s in recipe.sources if recipe.depth.maps == "sample" and not s.held_out]
    stored = [s.name for s in recipe.sources if s.name not in fused]
    over_maps = begin(recipe, [_over_maps(root, name, codebook, inputs) for name in stored], retry)
    over_images = []
    if fused:
        teaching = Teaching.of(recipe)
        over_images = begin(recipe, [_over_images(root, name, codebook, inputs, teaching) for name in fused], retry)
        work(recipe, over_images, ImageCodecWorker, options | {"source": teaching.source}, pool=pool)
    work(recipe, over_maps, CodecWorker, options, pool=pool)
    finish(recipe, [*over_maps, *over_images])


def _over_maps(root: Root, source: str, codebook: Manifest, inputs: dict[str, str]) -> Job:
    depth = Table(root, "depth", source).require()
    require_kin(codebook, f"depth/{source}", depth.inputs)
    table, over = Table(root, "codes", source), Table(root, "depth", source)
    return Job(table, over, shards_of(depth=depth), inputs, depth.licences, expected=depth.kept)


def _over_images(root: Root, source: str, codebook: Manifest, inputs: dict[str, str], teaching: Teaching) -> Job:
    images = Table(root, "images", source).require()
    require_kin(codebook, "the recipe's depth", teaching.inputs)
    depends = inputs | {"teacher": teaching.inputs["teacher"], "teacher_settings": teaching.inputs["settings"]}
    licences: list[Licence] = [*images.licences, *teaching.licences]
    table, over = Table(root, "codes", source), Table(root, "images", source)
    return Job(table, over, shards_of(images=images), depends, licences, expected=images.kept)


def require_kin(codebook: Manifest, what: str, inputs: dict[str, str]) -> None:
    """Raises OtherInputsError, naming both sides, where a codebook was made for other depth than that of `inputs`."""
    for key, made_for in (
        ("teacher", codebook.inputs.get("teacher")),
        ("convention", codebook.extra.get("convention")),
    ):
        found = inputs.get(key)
        if made_for != found:
            raise OtherInputsError(
                f"the codebook was made for {key} '{made_for}', but {what} has '{found}': its codes would mean nothing;"
                " run `codebook` for this depth, or `depth` with that teacher"
            )


def _rows(batch: tuple[list[str], Tensor, Tensor, Tensor]) -> list[Row]:
    """The rows of a batch as they are stored."""
    ids, targets_BSS, codes_BN, errors_B = batch
    pixels_BSS = (targets_BSS * STEPS).round().numpy().astype(np.uint16)
    columns = zip(ids, codes_BN.tolist(), pixels_BSS, errors_B.tolist(), strict=True)
    return [
        {"id": key, "codes": codes, "depth_target": pack_map(target_SS), "reconstruction_mae": error}
        for key, codes, target_SS, error in columns
    ]
