"""The sample that a codebook is learnt from: which rows of which depth shards, and one worker's share of them.

Shape legend: R rows, H, W a map's height and width, S the codebook's image side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.data.maps import unpack_map
from perceptio.depth.codebook_training import STEPS16, Share
from schemas.manifest import Manifest, ShardCommit
from workflows.commits import Table
from workflows.store import Root

HELD_OUT_EVERY = 10  # one row of the sample in ten is measured on and never trained on
THREADS = 2  # PNG decoding lets other threads run


@dataclass(frozen=True)
class Part:
    """The first `rows` rows of a depth shard, as a part of the sample."""

    source: str
    shard: int
    content: str  # the shard's content digest, so that it stays known which rows these were
    first: int  # number of its first row in the sample
    rows: int

    def stated(self) -> dict[str, Any]:
        """What the codebook's manifest says of it."""
        return {"source": self.source, "shard": self.shard, "content": self.content, "rows": self.rows}


def sample(tables: Mapping[str, Manifest], rows: int, seed: int) -> list[Part]:
    """The first `rows` rows of all sources' shards in an order drawn from `seed`; all there are if they are fewer.

    Whole shards but the last: a sample of rows from everywhere would read every shard of a large table.
    """
    parts: list[Part] = []
    taken = 0
    for name, commit in _drawn(tables, seed):
        if taken == rows:
            break
        parts.append(Part(name, commit.shard, commit.content, taken, min(commit.kept, rows - taken)))
        taken += parts[-1].rows
    return parts


def sampled_shards(images: Mapping[str, Manifest], rows: int, seed: int, rejects: float) -> dict[str, set[int]]:
    """Every source's shards that `sample` may draw on, told from the images alone: their depth is all it needs.

    rejects: the share of the images that `depth` may refuse.
    """
    shards: dict[str, set[int]] = {name: set() for name in images}
    expected = 0.0
    for name, commit in _drawn(images, seed):
        if expected >= rows:
            break
        shards[name].add(commit.shard)
        expected += commit.kept * (1 - rejects)
    return shards


def _drawn(tables: Mapping[str, Manifest], seed: int) -> list[tuple[str, ShardCommit]]:
    """All shards with rows, in an order drawn from `seed` that shards added later leave as it is."""
    shards = [(name, commit) for name in tables for commit in tables[name].shards if commit.kept]
    return sorted(shards, key=lambda each: hashlib.sha256(f"{seed}/{each[0]}/{each[1].shard}".encode()).digest())


def load_share(root: Root, parts: list[Part], size: int, rank: int, world: int) -> Share:
    """One worker's share of the sample, at the codebook's size: every `world`-th row of either kind.

    In memory: the share, and one shard of the depth table at a time.
    """
    rows = sum(part.rows for part in parts)
    held_out = rows // HELD_OUT_EVERY
    train_RSS, held_out_RSS = (
        torch.empty((len(range(rank, count, world)), size, size), dtype=torch.uint16)
        for count in (rows - held_out, held_out)
    )
    names = [""] * len(held_out_RSS)
    with ThreadPoolExecutor(THREADS) as pool:
        for part in parts:
            table = Table(root, "depth", part.source).read_shard(part.shard, columns=["id", "inv_depth"])
            places = list(_places(part, rank, world))
            maps = pool.map(partial(_small, table["inv_depth"], size), (row for row, _, _ in places))
            for (row, is_held_out, place), map_SS in zip(places, maps, strict=True):
                (held_out_RSS if is_held_out else train_RSS)[place] = map_SS
                if is_held_out:
                    names[place] = f"{part.source}/{table['id'][row].as_py()}"
    return Share(train_RSS, held_out_RSS, tuple(names))


def _places(part: Part, rank: int, world: int) -> Iterator[tuple[int, bool, int]]:
    """(row in the shard, held out, place in the worker's tensor) of the rows that are this worker's."""
    for row in range(part.rows):
        turn, place = divmod(part.first + row, HELD_OUT_EVERY)
        is_held_out = place == HELD_OUT_EVERY - 1
        number = turn if is_held_out else turn * (HELD_OUT_EVERY - 1) + place  # within its own kind
        if number % world == rank:
            yield row, is_held_out, number // world


def _small(column: pa.ChunkedArray, size: int, row: int) -> Tensor:
    """A stored map at the codebook's size, in 16 bits."""
    map_HW = torch.from_numpy(unpack_map(column[row].as_py()).astype(np.float32))
    map_SS = F.interpolate(map_HW[None, None], (size, size), mode="bilinear", antialias=True)[0, 0]
    return map_SS.round().clamp(0, STEPS16).to(torch.uint16)
