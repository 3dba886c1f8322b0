"""Depth tokens: each inverse-depth map becomes N codes of the codebook, and a small map for the losses.

    perceptio tokenize --recipe rooms

Reads   ROOT/depth/SOURCE, ROOT/codebook
Writes  ROOT/codes/SOURCE, ROOT/rejects/tokenize/SOURCE
Needs   a codebook made from maps of the same teacher and convention; CPUs or accelerators

Shape legend: B batch, H, W image height and width, S the codebook's image side, N tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from perceptio.data.images import decode_depth16, encode_depth16
from perceptio.depth.codec import DepthCodec
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.tables import CODES, Reason
from workflows.commits import Table
from workflows.folders import local_copy, require
from workflows.runtime import ahead, device, settings_digest
from workflows.shards import Job, ShardResult, Work, by_id, run_shards, shards_of
from workflows.store import OtherInputsError, open_root

STEPS = 65535  # inv_depth 1.0 in 16 bits

Row = dict[str, Any]


class CodecWorker:
    """Encodes a shard's maps, always in fp32, and decodes them again to measure what was lost."""

    def __init__(self, root: str, batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.batch_size = batch_size
        folder = local_copy(open_root(root), "codebook", stage="codebook")
        self.codec = DepthCodec.from_pretrained(folder, device=device())

    def process(self, work: Work) -> ShardResult:
        """One row of codes per map."""
        return by_id(work, ["id", "inv_depth"], self._codes)

    def _codes(self, table: pa.Table) -> ShardResult:
        maps = table.to_pylist()
        batches = [maps[i : i + self.batch_size] for i in range(0, len(maps), self.batch_size)]
        decoded = ahead(lambda batch: [decode_depth16(row["inv_depth"]) for row in batch], batches)
        rows: list[Row] = []
        for batch, values in zip(batches, decoded, strict=True):
            rows += self._rows([row["id"] for row in batch], values)
        return ShardResult(pa.Table.from_pylist(rows, schema=CODES), len(maps))

    def _rows(self, ids: list[str], values: list[npt.NDArray[np.uint16]]) -> list[Row]:
        small = [self.codec.resize(torch.from_numpy(v.astype(np.float32) / STEPS).unsqueeze(0)) for v in values]
        targets_BSS = torch.cat(small)
        codes_BN = self.codec.encode(targets_BSS)
        errors_B = (self.codec.decode(codes_BN) - targets_BSS).abs().mean((1, 2))
        pixels_BSS = (targets_BSS * STEPS).round().cpu().numpy().astype(np.uint16)
        columns = zip(ids, codes_BN.tolist(), pixels_BSS, errors_B.tolist(), strict=True)
        return [
            {"id": key, "codes": codes, "depth_target": encode_depth16(target_SS), "reconstruction_mae": error}
            for key, codes, target_SS, error in columns
        ]


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the codes table of every source; raises OtherInputsError for a codebook of other depth.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root, section = open_root(recipe.root), recipe.tokenize
    codebook = require(root, "codebook", stage="codebook")
    jobs = []
    for name in (source.name for source in recipe.sources):
        depth = Table(root, "depth", name).require()
        require_kin(codebook, depth)
        inputs = {"settings": settings_digest(section, section.pool), "codebook": codebook.digest}
        table, over = Table(root, "codes", name), Table(root, "depth", name)
        jobs.append(Job(table, over, shards_of(depth=depth), inputs, depth.licences, expected=depth.kept))
    arguments = {"root": recipe.root, "batch_size": section.batch_size, "threads": section.pool.threads}
    run_shards(recipe, jobs, CodecWorker, arguments, pool=section.pool, retry=retry)


def require_kin(codebook: Manifest, depth: Manifest) -> None:
    """Raises OtherInputsError, naming both sides, where a codebook was made for other depth than the table's."""
    for key, made_for in (
        ("teacher", codebook.inputs.get("teacher")),
        ("convention", codebook.extra.get("convention")),
    ):
        found = depth.inputs.get(key)
        if made_for != found:
            raise OtherInputsError(
                f"the codebook was made for {key} '{made_for}', but depth/{depth.source} has '{found}':"
                " its codes would mean nothing; run `codebook` for this depth, or `depth` with that teacher"
            )
