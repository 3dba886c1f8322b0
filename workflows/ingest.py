"""Images in: every source becomes an `images` table of upright RGB files with their questions, masks and boxes.

    perceptio ingest --recipe rooms

Reads   rooms that it renders itself; folders of images, with an optional `records.jsonl` beside them
Writes  ROOT/images/SOURCE, ROOT/rejects/ingest/SOURCE
Needs   CPUs

A line of `records.jsonl` is {"image": path inside the folder, "turns": [...], "boxes": [...], "masks": [...]}, the
last three optional, as in schemas.tables; boxes and masks are in pixels of the upright image. Image ids are hashes of
the stored bytes. Files with the same bytes are found before the shards are cut: only files of equal size are read for
it. Whatever else turns out equal after decoding is refused within its shard, and found across shards by `verify`.

Shape legend: O objects, H, W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from perceptio.data.images import ImageError, ImageLimits, StoredImage, encode_depth16, encode_png, stored
from perceptio.data.masks import Rle, masks_to_rle, rle_to_mask
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Question, Room
from schemas.manifest import Licence
from schemas.recipe import FolderSource, Recipe, RoomsSource, section_digest
from schemas.tables import IMAGES, Reason
from workflows.commits import Table
from workflows.runtime import Job, Reject, ShardResult, ahead, run_shards, settings_digest
from workflows.store import StageError, open_root

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
RECORDS = "records.jsonl"
READERS = 2  # threads of one actor; reading and decoding release the interpreter

log = logging.getLogger(__name__)
Row = dict[str, Any]


class Point(BaseModel):
    """A lettered point drawn into the image, in pixels."""

    model_config = ConfigDict(extra="forbid")

    x: float
    y: float


class Turn(BaseModel):
    """One question of a record, as it is written in `records.jsonl`."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    prompt: str
    answer: str
    form: str = ""
    expression: str = ""
    objects: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()


class Record(BaseModel):
    """One line of `records.jsonl`."""

    model_config = ConfigDict(extra="forbid")

    image: str
    turns: tuple[Turn, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    masks: tuple[dict[str, Any], ...] = ()


class IngestWorker:
    """Renders a range of rooms, or reads a shard of listed files and stores them as they are or encoded anew."""

    def __init__(self, recipe: str) -> None:
        settings = Recipe.model_validate_json(recipe)
        self.settings = settings.ingest
        self.limits = ImageLimits(self.settings.min_side, self.settings.max_pixels)
        self.sources = {source.name: source for source in settings.sources}

    def process(self, source: str, shard: int, payload: str) -> ShardResult:
        """One row or one reject per listed file or record; one row per room, and per lettered-points question."""
        spec, items = self.sources[source], json.loads(payload)
        if isinstance(spec, RoomsSource):
            return _result([row for index in range(*items) for row in _room_rows(spec, index)])
        fs, folder = fsspec.core.url_to_fs(spec.path)

        def read(item: Row) -> Row | Reject:
            return self._row(fs, posixpath.join(folder, item["path"]), item)

        return _result(list(ahead(read, items, threads=READERS, depth=4 * READERS)))

    def _row(self, fs: Any, uri: str, item: Row) -> Row | Reject:
        if item.get("problem"):
            return Reject(Reason(item["reason"]), item["problem"], uri=uri)
        try:
            record = Record.model_validate_json(item["record"]) if item.get("record") else Record(image=item["path"])
            image = stored(
                fs.cat_file(uri), self.limits, max_side=self.settings.max_side, jpeg_quality=self.settings.jpeg_quality
            )
            return _folder_row(uri, image, record)
        except FileNotFoundError:
            return Reject(Reason.MISSING_FILE, "listed, but gone when it was read", uri=uri)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return Reject(Reason.BAD_RECORD, f"{RECORDS}: {problems}", uri=uri)
        except ImageError as error:
            return Reject(error.reason, str(error), uri=uri)


def run(recipe: Recipe) -> None:
    """Fills the images table of every source; raises StageError where that cannot be done."""
    root, rows = open_root(recipe.root), recipe.ingest.rows_per_shard
    settings = settings_digest(recipe.ingest, recipe.ingest.pool)
    jobs = []
    for source in recipe.sources:
        inputs = {"settings": settings, "source": section_digest(source, exclude={"path"})}
        if isinstance(source, RoomsSource):
            payloads, licence = _room_ranges(source, rows), ("perceptio.rooms", "Apache-2.0")
        else:
            payloads, inputs["listing"] = _listed(source, rows)
            licence = (source.path, "unknown")
        licences = [Licence(part=f"data: {source.name}", source=licence[0], licence=licence[1])]
        jobs.append(Job(Table(root, "images", source.name), payloads, inputs, licences))
    run_shards(recipe, jobs, IngestWorker, {"recipe": recipe.model_dump_json()}, pool=recipe.ingest.pool)


def _room_ranges(source: RoomsSource, rows_per_shard: int) -> list[str]:
    starts = range(0, source.count, rows_per_shard)
    return [json.dumps([start, min(start + rows_per_shard, source.count)]) for start in starts]


def _room_rows(source: RoomsSource, index: int) -> Iterator[Row | Reject]:
    """The room with its wanted questions, unless it has none of them, and a picture per points question."""
    uri = f"rooms://seed/{source.seed}/index/{index}?size={source.size}"
    try:
        room = render_room(source.seed, index, source.size)
    except RuntimeError as error:
        yield Reject(Reason.BAD_RECORD, str(error), uri=uri)
        return
    wanted = [question for question in ask(room) if question.kind in source.questions]
    plain = [question for question in wanted if question.image_HW3 is None]
    if plain or not source.questions:
        yield _room_row(source, room, uri, room.rgb_HW3, plain)
    for question in wanted:
        if question.image_HW3 is not None:
            yield _room_row(source, room, f"{uri}&form={question.form}", question.image_HW3, [question])


def _room_row(source: RoomsSource, room: Room, uri: str, rgb_HW3: Any, questions: Sequence[Question]) -> Row:
    masks_OHW = room.instance_HW[None] == np.arange(len(room.objects))[:, None, None]
    data = encode_png(rgb_HW3)
    millimetres_HW = np.rint(np.clip(room.depth_HW * 1000, 1, 65535)).astype(np.uint16)
    return {
        "id": image_id(data),
        "uri": uri,
        "image": data,
        "width": source.size,
        "height": source.size,
        "turns": [
            {
                "kind": question.kind,
                "form": question.form,
                "prompt": question.prompt,
                "answer": question.answer,
                "expression": question.expression,
                "objects": list(question.objects),
                "choices": list(question.choices),
                "points": [{"x": float(x), "y": float(y)} for x, y in question.points_xy],
            }
            for question in questions
        ],
        "masks": masks_to_rle(masks_OHW) if source.exact_masks else [],
        "boxes": [_box_around(mask_HW) for mask_HW in masks_OHW],
        "recorded_depth": encode_depth16(millimetres_HW),
    }


def _box_around(mask_HW: Any) -> Row:
    y, x = np.nonzero(mask_HW)
    return _box_row((float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)))


def _box_row(box: Sequence[float]) -> Row:
    return dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))


def image_id(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of an image's stored bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def _listed(source: FolderSource, rows_per_shard: int) -> tuple[list[str], str]:
    """The shards' payloads, and a digest of the listing: files by path, then records without a file by line."""
    fs, folder = fsspec.core.url_to_fs(source.path)
    if not fs.isdir(folder):
        raise StageError(f"source '{source.name}': path '{source.path}' is no folder: mend sources.path in the recipe")
    found = {posixpath.relpath(path, folder): info for path, info in fs.find(folder, detail=True).items()}
    sizes = {path: info["size"] for path, info in sorted(found.items()) if path.lower().endswith(SUFFIXES)}
    if len(found) > len(sizes) + (RECORDS in found):
        log.info("%s: %d files are no images by their suffix, not read", source.name, len(found) - len(sizes))
    items: dict[str, Row] = {path: {"path": path} for path in sizes}
    raw = fs.cat_file(posixpath.join(folder, RECORDS)) if RECORDS in found else b""
    strays = [stray for line in raw.splitlines() if line.strip() and (stray := _attach(line, items))]
    for path, other in _same_bytes(fs, folder, sizes):
        items[path].update(reason=Reason.DUPLICATE_ID, problem=f"the same bytes as {other}: keep one of them")
    rows = [*items.values(), *strays]
    if not rows:
        raise StageError(f"source '{source.name}': no image ({', '.join(SUFFIXES)}) under '{source.path}'")
    digest = hashlib.sha256(json.dumps(sorted(sizes.items())).encode() + raw).hexdigest()
    return [json.dumps(rows[i : i + rows_per_shard]) for i in range(0, len(rows), rows_per_shard)], digest


def _attach(line: bytes, items: dict[str, Row]) -> Row | None:
    """Lays a record beside its file; where that cannot be done, a row that says why."""

    def stray(reason: Reason, problem: str, path: str = "") -> Row:
        return {"path": path, "reason": reason, "problem": f"{RECORDS}: {problem}"}

    try:
        text = line.decode("utf-8")
        path = json.loads(text)["image"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        return stray(Reason.BAD_RECORD, f"no JSON object with an 'image': {error!r} in {line[:80]!r}")
    path = posixpath.normpath(str(path))
    if path.startswith(("..", "/")):
        return stray(Reason.BAD_RECORD, f"image '{path}' is outside the folder: paths are relative and stay inside")
    if path not in items:
        return stray(Reason.MISSING_FILE, f"image '{path}' is not in the folder", path)
    if "record" in items[path]:
        return stray(Reason.DUPLICATE_ID, f"image '{path}' has two lines: put all its turns into one", path)
    items[path]["record"] = text
    return None


def _same_bytes(fs: Any, folder: str, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Each file that has the bytes of an earlier one, and that one; only files of equal size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        by_size[size].append(path)
    for size, paths in by_size.items():
        first: dict[str, str] = {}
        for path in paths if size and len(paths) > 1 else ():
            other = first.setdefault(hashlib.sha256(fs.cat_file(posixpath.join(folder, path))).hexdigest(), path)
            if other != path:
                yield path, other


def _folder_row(uri: str, image: StoredImage, record: Record) -> Row | Reject:
    key = image_id(image.data)

    def refuse(reason: Reason, message: str) -> Reject:
        return Reject(reason, f"{RECORDS}: {message}", id=key, uri=uri)

    count = max(len(record.boxes), len(record.masks))
    if record.boxes and record.masks and len(record.boxes) != len(record.masks):
        return refuse(Reason.BAD_RECORD, f"{len(record.boxes)} boxes but {len(record.masks)} masks: one per object")
    for turn in record.turns:
        if any(not 0 <= i < count for i in turn.objects):
            return refuse(Reason.BAD_RECORD, f"turn '{turn.prompt}' names objects {turn.objects} of {count}")
    boxes = [[value * image.scale for value in box] for box in record.boxes]
    for box, (x0, y0, x1, y1) in zip(record.boxes, boxes, strict=True):
        if not (0 <= x0 < x1 <= image.width + 0.5 and 0 <= y0 < y1 <= image.height + 0.5):
            return refuse(Reason.MASK_OUTSIDE_IMAGE, f"box {box} is empty or outside the upright image")
    try:
        masks = [_fitted(mask, image) for mask in record.masks]
    except (ValueError, KeyError) as error:
        return refuse(Reason.BAD_MASK, str(error))
    return {
        "id": key,
        "uri": uri,
        "image": image.data,
        "width": image.width,
        "height": image.height,
        "turns": [turn.model_dump(mode="json") for turn in record.turns],
        "masks": masks,
        "boxes": [_box_row(box) for box in boxes],
        "recorded_depth": None,
    }


def _fitted(mask: Rle, image: StoredImage) -> Rle:
    """The mask at the stored image's size. Raises ValueError for a mask of another image's size."""
    mask_HW = rle_to_mask(mask)
    expected = (round(image.height / image.scale), round(image.width / image.scale))
    if any(abs(seen - side) > 1 / image.scale for seen, side in zip(mask_HW.shape, expected, strict=True)):
        raise ValueError(
            f"mask is {mask_HW.shape[0]} x {mask_HW.shape[1]}, the upright image {expected}: mend its size"
        )
    if mask_HW.shape != (image.height, image.width):
        size = (image.width, image.height)
        mask_HW = np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))
    return masks_to_rle(mask_HW[None])[0]


def _result(rows: Sequence[Row | Reject]) -> ShardResult:
    """The shard's table and rejects, an image that stands in it already refused."""
    kept: dict[str, Row] = {}
    rejects: list[Reject] = []
    for row in rows:
        if isinstance(row, Reject):
            rejects.append(row)
        elif row["id"] in kept:
            message = f"the same image as {kept[row['id']]['uri']}: keep one of them"
            rejects.append(Reject(Reason.DUPLICATE_ID, message, id=row["id"], uri=row["uri"]))
        else:
            kept[row["id"]] = row
    return ShardResult(pa.Table.from_pylist(list(kept.values()), schema=IMAGES), len(rows), rejects)
