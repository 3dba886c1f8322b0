"""What a stage's page shows of its rows: histograms and pictures, from some shards of its tables.

Only SHARDS_READ shards of a source are read, evenly spaced, so that a page takes as long for 10^9 rows as for 10^5; of
what is heavy (images, maps) no more than one shard is held at a time.

Shape legend: H, W image height and width, S the codebook's image side, N depth tokens, K codes.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from perceptio.data.images import ImageLimits, decode
from perceptio.data.masks import rle_to_mask
from perceptio.depth.codec import DepthCodec
from perceptio.metrics.masks import union_mask
from schemas.manifest import Manifest, ShardCommit
from schemas.recipe import Recipe
from workflows.charts import Chart, Histogram, curves, histogram, usage
from workflows.codebook_pictures import choose
from workflows.codebook_worker import PICTURE
from workflows.commits import Table
from workflows.folders import local_copy
from workflows.held_out import inv_depth
from workflows.pictures import data_uri, depth_colours, tinted
from workflows.store import Root

SHARDS_READ = 16  # of each source
SHOWN = 12  # pictures of rows that are not chosen by how well they went
MAPS_READ = 64  # of a shard
SIDE = 256  # pixels of a picture's longer side
MAP_PIXELS = 4096  # of a map, for its histogram
BINS = 40
STORED = ImageLimits(min_side=1, max_pixels=2**31)

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Strip:
    """Pictures of one row, side by side: (name, figure, data URI)."""

    title: str
    pictures: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Shown:
    """What a page shows between its counts and its rejects."""

    said: str  # what the figures are of
    histograms: Sequence[Histogram] = ()
    curves: Sequence[Chart] = ()
    strips: Mapping[str, Sequence[Strip]] = field(default_factory=dict)  # heading -> strips


@dataclass(frozen=True)
class Part:
    """The rows of one shard that was read."""

    source: str
    shard: int
    rows: pa.Table


def thumbnail(rgb_HW3: Pixels, side: int = SIDE) -> str:
    """The picture, its longer side at most `side` pixels, inside a URI."""
    small = Image.fromarray(rgb_HW3)
    small.thumbnail((side, side))
    return data_uri(np.asarray(small))


def spaced(shards: Sequence[ShardCommit], count: int = SHARDS_READ) -> list[ShardCommit]:
    """At most `count` of the shards that hold rows, evenly spaced from the first to the last."""
    full = [commit for commit in shards if commit.kept]
    if len(full) <= count:
        return full
    return [full[int(i)] for i in np.linspace(0, len(full) - 1, count)]


def images(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """Sizes, questions, and some of the images."""
    parts = list(_parts(root, "images", manifests, ["id", "width", "height", "turns"]))
    rows = _joined(parts)
    sides = pc.max_element_wise(rows["width"], rows["height"]).to_numpy()
    turns = pc.list_value_length(rows["turns"]).to_numpy(zero_copy_only=False)
    strips = [Strip(row["id"], [_image(row)]) for row in _some(root, parts)]
    return Shown(
        _of(rows, manifests),
        [histogram("longer side, pixels", sides, BINS), histogram("questions an image", turns, BINS)],
        strips={"Some of the images": strips},
    )


def maps(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """How near and far the maps are, what the teacher's own numbers span, and some maps beside their images."""
    values, spans, strips = [], [], []
    parts = list(_parts(root, "depth", manifests, ["id", "inv_depth", "raw_min", "raw_max"], MAPS_READ))
    for row in _joined(parts).to_pylist():
        map_HW = inv_depth(row["inv_depth"])
        values.append(map_HW.ravel()[:: max(1, map_HW.size // MAP_PIXELS)])
        spans.append(row["raw_max"] - row["raw_min"])
    for row in _some(root, parts):
        map_HW = inv_depth(row["inv_depth"])
        drawn = ("inverse depth", f"mean {map_HW.mean():.2f}", thumbnail(depth_colours(map_HW)))
        strips.append(Strip(row["id"], [_image(row), drawn]))
    near = histogram("inverse depth of pixels: 0 far, 1 close", np.concatenate(values), BINS, (0, 1))
    span = histogram("largest minus smallest number of the teacher", np.array(spans), BINS)
    return Shown(
        _of(_joined(parts), manifests),
        [near, span],
        strips={"Some of the maps": strips},
    )


def drawn_masks(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """How sure the mask teacher is, and its surest and least sure masks."""
    parts = list(_parts(root, "masks", manifests, ["id", "masks", "predicted_iou", "stability", "recorded"]))
    rows = _joined(parts)
    made = rows.filter(pc.and_(pc.invert(rows["recorded"]), pc.greater(pc.list_value_length(rows["masks"]), 0)))
    said = _of(rows, manifests, f"; in {made.num_rows} of them the teacher drew masks, the others came with theirs")
    if made.num_rows == 0:
        return Shown(said)
    scores = {name: pc.list_flatten(made[name]).to_numpy() for name in ("predicted_iou", "stability")}
    least = [(-min(row["predicted_iou"]), row["id"]) for row in made.select(["id", "predicted_iou"]).to_pylist()]
    wanted = choose(least)
    found = _by_id(_with(root, parts, wanted, {"images": ["image"]}))
    strips = {
        f"{group.capitalize()} by predicted IoU": [_masked(found[key]) for key in wanted[group]]
        for group in ("best", "worst")
    }
    names = {"predicted_iou": "predicted IoU of drawn masks", "stability": "stability of drawn masks"}
    return Shown(said, [histogram(names[name], scores[name], BINS, (0, 1)) for name in names], strips=strips)


def learnt_codes(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """How often each code is used on held-out maps, how the codebook learnt, and its contact sheet."""
    extra = manifests[""].extra
    said = (
        f"Figures are of {extra['held_out_rows']:,} held-out maps: MAE {extra['mae']:.4f} in inverse depth (the mean"
        f" map has {extra['mean_map_mae']:.4f}), {extra['usage']:.0%} of the codes used, perplexity"
        f" {extra['perplexity']:.1f}."
    )
    history = extra["history"]
    steps = [point["step"] for point in history]
    shown = {"mae": "held-out MAE", "perplexity": "perplexity", "usage": "share of the codes in use"}
    lines = [curves(title, steps, [point[name] for point in history], {}) for name, title in shown.items()]
    sheet = (local_copy(root, "codebook", stage="codebook") / PICTURE).read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(sheet).decode()}"
    strip = Strip("", [("best, median and worst held-out maps: teacher, reconstruction, absolute error", "", uri)])
    return Shown(said, [usage("uses of each code", extra["code_counts"])], lines, {"Reconstructions": [strip]})


def codes(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """How often each code is used, what is lost, and the best, median and worst reconstructions."""
    codec = DepthCodec.from_pretrained(local_copy(root, "codebook", stage="codebook"))
    parts = list(_parts(root, "codes", manifests, ["id", "codes", "reconstruction_mae"]))
    rows = _joined(parts)
    counts_K = np.bincount(pc.list_flatten(rows["codes"]).to_numpy(), minlength=codec.codes)
    share_K = counts_K[counts_K > 0] / counts_K.sum()
    errors = rows["reconstruction_mae"].to_numpy()
    wanted = choose(list(zip(errors.tolist(), rows["id"].to_pylist(), strict=True)))
    found = _by_id(_with(root, parts, wanted, {"images": ["image"], "codes": ["depth_target"]}))
    said = (
        f"; {len(share_K)} of {codec.codes} codes are used, perplexity {np.exp(-(share_K * np.log(share_K)).sum()):.1f}"
    )
    drawn = {group: [_rebuilt(found[key], codec) for key in keys] for group, keys in wanted.items()}
    return Shown(
        _of(rows, manifests, said),
        [usage("uses of each code", counts_K.tolist()), histogram("reconstruction MAE in inverse depth", errors, BINS)],
        strips={f"{group.capitalize()} reconstructions": strips for group, strips in drawn.items()},
    )


def samples(recipe: Recipe, root: Root, manifests: Mapping[str, Manifest]) -> Shown:
    """Questions by kind, objects an image, and some samples as training sees them."""
    codec = DepthCodec.from_pretrained(local_copy(root, "codebook", stage="codebook"))
    parts = list(_parts(root, "samples", manifests, ["id", "turns", "masks", "codes"]))
    rows = _joined(parts)
    kinds = Counter(turn["kind"] for turns in rows["turns"].to_pylist() for turn in turns)
    objects = pc.list_value_length(rows["masks"]).to_numpy(zero_copy_only=False)
    strips = []
    for row in _some(root, parts):
        map_SS = codec.decode(torch.tensor([row["codes"]]))[0].numpy()
        asked = row["turns"][0]["prompt"] if row["turns"] else row["id"]
        pictures = [_image(row), *([_mask(row)] if row["masks"] else [])]
        pictures.append(("depth of its codes", "", thumbnail(depth_colours(map_SS))))
        strips.append(Strip(asked, pictures))
    told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) or "none"
    return Shown(
        _of(rows, manifests, f"; questions in them: {told}"),
        [histogram("objects with a mask in a sample", objects, BINS)],
        strips={"Some of the samples": strips},
    )


DRAW: Mapping[str, tuple[str, Callable[[Recipe, Root, Mapping[str, Manifest]], Shown]]] = {
    "ingest": ("images", images),
    "depth": ("depth", maps),
    "masks": ("masks", drawn_masks),
    "codebook": ("codebook", learnt_codes),
    "tokenize": ("codes", codes),
    "assemble": ("samples", samples),
}  # stage -> its table, and what is shown of it


def _parts(
    root: Root, table: str, manifests: Mapping[str, Manifest], columns: Sequence[str], most: int | None = None
) -> Iterator[Part]:
    """Some columns of the shards that are read; of each at most `most` rows, evenly spaced."""
    for source, manifest in manifests.items():
        for commit in spaced(manifest.shards):
            rows = Table(root, table, source).rows_of(commit, columns)
            yield Part(source, commit.shard, rows if most is None else _taken(rows, most))


def _joined(parts: Sequence[Part]) -> pa.Table:
    return pa.concat_tables([part.rows for part in parts])


def _of(rows: pa.Table, manifests: Mapping[str, Manifest], more: str = "") -> str:
    whole = sum(manifest.kept for manifest in manifests.values())
    return f"Histograms are of {rows.num_rows:,} of the {whole:,} kept rows, from shards evenly spaced{more}."


def _taken(rows: pa.Table, count: int) -> pa.Table:
    """At most `count` rows, evenly spaced."""
    return rows.take(pa.array(np.unique(np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).astype(int))))


def _some(root: Root, parts: Sequence[Part]) -> Iterator[Row]:
    """SHOWN rows with their images, from as many shards as there are."""
    share = -(-SHOWN // len(parts))
    ids = [key for part in parts for key in _taken(part.rows, share)["id"].to_pylist()]
    return _with(root, parts, {"some": ids[:SHOWN]}, {"images": ["image"]})


def _with(
    root: Root, parts: Sequence[Part], wanted: Mapping[str, Sequence[str]], more: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    """The rows of these ids, in the parts' order, with columns of other tables: table -> columns."""
    ids = pa.array([key for keys in wanted.values() for key in keys], pa.string())
    for part in parts:
        chosen = part.rows.filter(pc.is_in(part.rows["id"], ids))
        for table, columns in more.items() if chosen.num_rows else ():
            stored = Table(root, table, part.source).read_shard(part.shard, ["id", *columns])
            places = pc.index_in(chosen["id"], stored["id"])
            for column in columns:
                chosen = chosen.append_column(column, stored[column].take(places))
        yield from chosen.to_pylist()


def _by_id(rows: Iterator[Row]) -> dict[str, Row]:
    return {row["id"]: row for row in rows}


def _image(row: Row) -> tuple[str, str, str]:
    rgb_HW3 = decode(row["image"], STORED)
    return ("image", f"{rgb_HW3.shape[1]} x {rgb_HW3.shape[0]}", thumbnail(rgb_HW3))


def _mask(row: Row) -> tuple[str, str, str]:
    rgb_HW3 = decode(row["image"], STORED)
    union_HW = union_mask([rle_to_mask(rle) for rle in row["masks"]], rgb_HW3.shape[:2])
    return ("masks", f"{len(row['masks'])}", thumbnail(tinted(rgb_HW3, union_HW)))


def _masked(row: Row) -> Strip:
    least = f"least sure {min(row['predicted_iou']):.2f}, stability {min(row['stability']):.2f}"
    name, count, uri = _mask(row)
    return Strip(row["id"], [_image(row), (name, f"{count}; {least}", uri)])


def _rebuilt(row: Row, codec: DepthCodec) -> Strip:
    target_SS = inv_depth(row["depth_target"])
    found_SS = codec.decode(torch.tensor([row["codes"]]))[0].numpy()
    return Strip(
        row["id"],
        [
            _image(row),
            ("teacher", "", thumbnail(depth_colours(target_SS))),
            ("reconstruction", f"MAE {row['reconstruction_mae']:.4f}", thumbnail(depth_colours(found_SS))),
            ("absolute error x 4", "", thumbnail(depth_colours(4 * np.abs(found_SS - target_SS)))),
        ],
    )
