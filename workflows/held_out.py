"""What an evaluation reads: held-out pictures with their truth, and what blind guesses learn from training tables.

Shape legend: S the codebook's image side, N depth tokens, G side of the grid for mean masks, H, W image height, width.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from perceptio.data.maps import unpack_map
from perceptio.data.masks import rle_to_mask
from perceptio.metrics.masks import ciou, overlap, union_mask
from workflows.commits import Table
from workflows.store import Root, StageError

STEPS = 65535  # inv_depth 1.0 in 16 bits
GRID = 32  # side of the grid on which training masks are averaged, G
MASK_ROWS = 400  # training rows that the mean mask is made of
THRESHOLDS = 20  # shares of the grid tried for the mean mask

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A held-out image with its questions and everything that is true of it."""

    id: str
    scene: str  # one photograph or room; pictures of a scene with other points drawn in share it
    image: bytes
    size: tuple[int, int]  # height, width
    turns: tuple[Row, ...]
    masks: tuple[Row, ...]  # run lengths, one per object
    codes: tuple[int, ...]  # of the teacher's map
    depth_target: bytes  # packed map [S, S]
    inv_depth: bytes  # packed map [H, W], the teacher's
    recorded_depth: bytes | None  # 16-bit PNG [H, W], millimetres, 0 = unknown

    def true_mask(self, turn: int) -> Bools:
        """The pixels [H, W] of all objects that a turn names."""
        return union_mask([rle_to_mask(self.masks[i]) for i in self.turns[turn]["objects"]], self.size)


@dataclass(frozen=True)
class Blind:
    """What can be said without looking, learnt from training tables alone."""

    mean_map_SS: Floats
    top_codes_N: npt.NDArray[np.int64]  # the most frequent code of each place
    mean_mask_GG: Bools | None  # the mean training mask, cut where that scores best on training; None without masks
    answers: Mapping[str, Counter[str]]  # kind of question -> how often each answer was right

    def answer(self, turn: Mapping[str, Any]) -> str:
        """The choice that was right most often in training; without choices, the kind's most frequent answer."""
        counts = self.answers.get(turn["kind"], Counter())
        if turn["choices"]:
            return str(max(turn["choices"], key=lambda choice: counts[choice]))
        return counts.most_common(1)[0][0] if counts else ""


def inv_depth(packed: bytes) -> Floats:
    """Inverse depth [H, W] in [0, 1] of a stored map."""
    return unpack_map(packed).astype(np.float64) / STEPS


def resized(map_HW: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """A map at another (height, width): bilinear for numbers, nearest for booleans."""
    how = Image.Resampling.NEAREST if map_HW.dtype == np.bool_ else Image.Resampling.BILINEAR
    plain = map_HW if map_HW.dtype == np.bool_ else map_HW.astype(np.float32)
    return np.asarray(Image.fromarray(plain).resize(size[::-1], how))


def read_pictures(root: Root, source: str, limit: int) -> list[Picture]:
    """The pictures of the first `limit` scenes of a source, in the order of its shards.

    Raises StageError where a table is not finished, or a sample stands in no depth or images table.
    """
    found: list[Picture] = []
    scenes: set[str] = set()
    for shard in Table(root, "samples", source).committed():
        images = _by_id(Table(root, "images", source).read_shard(shard, ["id", "uri", "recorded_depth"]).to_pylist())
        depth = _by_id(Table(root, "depth", source).read_shard(shard, ["id", "inv_depth"]).to_pylist())
        for row in Table(root, "samples", source).read_shard(shard).to_pylist():
            if row["id"] not in images or row["id"] not in depth:
                raise StageError(f"samples/{source}: {row['id']} is not in images or depth: assemble the source again")
            picture = _picture(row, images[row["id"]], depth[row["id"]])
            if picture.scene not in scenes and len(scenes) == limit:
                return found
            scenes.add(picture.scene)
            found.append(picture)
    return found


def learn_blind(root: Root, sources: Sequence[str]) -> Blind:
    """The blind guesses that the samples of the training sources allow. Raises StageError where there are none."""
    total: Floats | None = None
    codes: list[list[int]] = []
    masks: list[Bools] = []
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in _samples(root, sources):
        map_SS = inv_depth(row["depth_target"])
        total = map_SS if total is None else total + map_SS
        codes.append(row["codes"])
        for turn in row["turns"]:
            answers[turn["kind"]][turn["answer"]] += 1
        named = [turn for turn in row["turns"] if turn["kind"] == "referring" and turn["objects"]]
        if named and row["masks"] and len(masks) < MASK_ROWS:
            shape = (row["height"], row["width"])
            masks.append(union_mask([rle_to_mask(row["masks"][i]) for i in named[0]["objects"]], shape))
    if total is None:
        raise StageError(f"evaluate: the samples of {list(sources)} hold no rows: nothing to make blind guesses from")
    codes_RN = np.asarray(codes, np.int64)
    top_codes_N = np.array([np.bincount(column).argmax() for column in codes_RN.T])
    return Blind(total / len(codes), top_codes_N, _mean_mask(masks) if masks else None, dict(answers))


def _samples(root: Root, sources: Sequence[str]) -> Iterator[Row]:
    columns = ["height", "width", "turns", "masks", "codes", "depth_target"]
    for source in sources:
        table = Table(root, "samples", source)
        for shard in table.committed():
            yield from table.read_shard(shard, columns).to_pylist()


def _mean_mask(masks: Sequence[Bools]) -> Bools:
    """The mean mask, cut at the share of the grid at which it scores the best cIoU on the masks themselves."""
    small = [resized(mask_HW.astype(np.float32), (GRID, GRID)) >= 0.5 for mask_HW in masks]
    mean_GG = np.mean(small, axis=0)
    cuts = np.quantile(mean_GG, np.linspace(0, 1, THRESHOLDS, endpoint=False))

    def score(cut: float) -> float:
        counts = [overlap(mean_GG >= cut, mask_GG) for mask_GG in small]
        return ciou(*zip(*counts, strict=True))

    return np.asarray(mean_GG >= max(cuts, key=score))


def _picture(sample: Row, image: Row, depth: Row) -> Picture:
    return Picture(
        id=sample["id"],
        scene=image["uri"].partition("&form=")[0],  # `ingest` names a room's picture with points so
        image=sample["image"],
        size=(sample["height"], sample["width"]),
        turns=tuple(sample["turns"]),
        masks=tuple(sample["masks"]),
        codes=tuple(sample["codes"]),
        depth_target=sample["depth_target"],
        inv_depth=depth["inv_depth"],
        recorded_depth=image["recorded_depth"],
    )


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    return {row["id"]: row for row in rows}
