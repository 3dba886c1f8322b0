"""Images in: every source becomes an `images` table of upright RGB files with their questions, masks and boxes.

    perceptio ingest --recipe rooms

Reads   the recipe's sources, in the layouts of perceptio/sources; rooms that it renders itself
Writes  ROOT/listing/SOURCE, ROOT/images/SOURCE, ROOT/rejects/ingest/SOURCE
Needs   CPUs; the driver holds 40 bytes an image to find doubles, for at most DOUBLES_AT_ONCE images at a time

Image ids are hashes of the stored bytes. An image that stands twice in a source is kept once. One that also stands in a
held-out source is taken out of training, unless the recipe says `ingest.contamination: report`. The same image in two
training sources stays in both, since each asks its own questions of it; the manifest says how many are shared.

Shape legend: H, W image height and width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from perceptio.data.images import ImageError, ImageLimits, StoredImage, decode_depth16, encode_depth16, stored
from perceptio.data.masks import Rle, masks_to_rle, rle_to_mask
from perceptio.sources.record import Found, Item, Reader, Refused
from schemas.manifest import Licence
from schemas.recipe import Recipe, RoomsSource, Source
from schemas.tables import IMAGES, LISTING, Reason
from workflows.commits import Table, table_digest
from workflows.doubles import Doubles, doubles
from workflows.drop import DropWorker, payload
from workflows.forgotten import forgotten_ids
from workflows.listing import listed, reader
from workflows.pool import Run, begin, finish, work
from workflows.runtime import ahead, settings_digest
from workflows.shards import Job, Reject, ShardResult, Work, shards_of, stored_reject
from workflows.store import DamagedTableError, open_root

READERS = 4  # threads of one actor; reading and decoding release the interpreter
AT_ONCE = 4  # files that are handed to a thread at once
FORGOTTEN = "this image was taken out by `forget`"

log = logging.getLogger(__name__)
Row = dict[str, Any]
Reading = Callable[[], Iterator[Found | Refused]]


class IngestWorker:
    """Reads a shard of listed items and stores their images as they are or encoded anew."""

    def __init__(self, recipe: str, forgotten: Collection[str] = ()) -> None:
        settings = Recipe.model_validate_json(recipe)
        self.settings, self.forgotten = settings.ingest, frozenset(forgotten)
        self.limits = ImageLimits(self.settings.min_side, self.settings.max_pixels)
        self.readers = {source.name: reader(source) for source in settings.sources}

    def process(self, work: Work) -> ShardResult:
        """One row or one reject per row of the source; where some are tried again, only those are read again.

        What was kept stays as it is, whatever the source holds now: a row never changes under its id, so that later
        stages may take over what they made of it.
        """
        items = [Item(**{name: row[name] for name in LISTING.names if name != "id"}) for row in _listing(work)]
        previous = work.previous
        if previous is None or previous.inputs != work.inputs:
            return _result(enumerate(self._outcomes(self.readers[work.source], items)))
        kept = work.table.rows_of(previous)
        if any(item.rows == 0 and not item.reason for item in items):  # a mended tar may hold more rows than it did
            standing = {row["id"]: row for row in kept.to_pylist()}
            made_anew = self._outcomes(self.readers[work.source], items)
            return _result(enumerate(_standing(row, standing) for row in made_anew))
        refused = [stored_reject(row) for row in work.table.rejects_of(previous).to_pylist()]
        again = {reject.row for reject in refused if reject.reason in work.retry}
        made = self._only(self.readers[work.source], items, again)
        return _merged(kept, previous.read, refused, made)

    def _only(self, source: Reader, items: Sequence[Item], wanted: set[int]) -> dict[int, Row | Reject]:
        """The outcomes of some rows, by number; items without any of them are not read where that can be told."""
        made: dict[int, Row | Reject] = {}
        first = 0
        for item in items:
            if item.rows and wanted.isdisjoint(range(first, first + item.rows)):
                first += item.rows
                continue
            found = list(self._outcomes(source, [item]))
            made |= {first + i: outcome for i, outcome in enumerate(found) if first + i in wanted}
            first += len(found)
        return made

    def _outcomes(self, source: Reader, items: Sequence[Item]) -> Iterator[Row | Reject]:
        """What becomes of each row, in order; single files are read in parallel, large ones as a stream."""
        for is_file, group in itertools.groupby(items, key=lambda item: item.rows == 1 or bool(item.reason)):
            if is_file:
                found = (partial(_read, source, item) for item in group)
                yield from self._made(found)
            else:
                for item in group:
                    yield from self._made(partial(iter, [one]) for one in source.read(item))

    def _made(self, readings: Iterable[Reading]) -> Iterator[Row | Reject]:
        """The rows of what each reading gives, in order; some readings are handed to a thread at once."""

        def rows(part: Sequence[Reading]) -> list[Row | Reject]:
            return [self._row(one) for read in part for one in read()]

        yield from itertools.chain.from_iterable(ahead(rows, _parts(readings), threads=READERS, depth=READERS + 1))

    def _row(self, found: Found | Refused) -> Row | Reject:
        if isinstance(found, Refused):
            return Reject(found.reason, found.message, uri=found.uri)
        try:
            image = stored(
                found.data, self.limits, max_side=self.settings.max_side, jpeg_quality=self.settings.jpeg_quality
            )
        except ImageError as error:
            return Reject(error.reason, str(error), uri=found.uri)
        key = image_id(image.data)
        if key in self.forgotten:
            return Reject(Reason.FORGOTTEN, FORGOTTEN, key)
        return _image_row(key, image, found)


def run(recipe: Recipe, retry: Collection[Reason] = ()) -> None:
    """Fills the images table of every source; raises StageError where that cannot be done.

    Rows that were refused for a reason of `retry` are tried again.
    """
    root = open_root(recipe.root)
    inputs = {"settings": settings_digest(recipe.ingest, recipe.ingest.pool)}
    jobs = []
    for source in recipe.sources:
        listing = listed(recipe, root, source)
        tables = Table(root, "images", source.name), Table(root, "listing", source.name)
        jobs.append(Job(*tables, shards_of(listing=listing), inputs, [_licence(source)]))
    forgotten = forgotten_ids(root)
    arguments = {"recipe": recipe.model_dump_json(), "forgotten": sorted(forgotten)}
    runs = begin(recipe, jobs, retry)
    work(recipe, runs, IngestWorker, arguments, pool=recipe.ingest.pool)
    _without_forgotten(recipe, runs, forgotten_ids(root) - forgotten)
    finish(recipe, runs, _without_doubles(recipe, runs))


def _without_forgotten(recipe: Recipe, runs: Sequence[Run], ids: Collection[str]) -> None:
    """Takes out what `forget` was told while the actors worked: they knew only of requests before."""
    gone = dict.fromkeys(ids, (Reason.FORGOTTEN, FORGOTTEN))
    for run in runs if ids else ():
        held = {i: gone.keys() & run.job.table.ids_of(commit) for i, commit in run.commits.items()}
        run.revise({i: payload({key: gone[key] for key in found}) for i, found in held.items() if found})
    work(recipe, runs, DropWorker, {}, pool=recipe.ingest.pool)


def _without_doubles(recipe: Recipe, runs: Sequence[Run]) -> Mapping[str, Any]:
    """What the manifests say of doubles, after those that must go were taken out of their shards."""
    standing = [run.manifest.extra if run.manifest is not None else {} for run in runs]
    if all(extra.get("doubles_sought_in") == _state(recipe, runs) for extra in standing):
        return {key: standing[0][key] for key in ("doubles_sought_in", "shared")}
    held_out = {source.name for source in recipe.sources if source.held_out}
    found = _doubles(runs, held_out, recipe.ingest.contamination == "reject")
    for run in runs:
        run.revise(found.drops.get(run.job.table.source, {}))
    work(recipe, runs, DropWorker, {}, pool=recipe.ingest.pool)
    for (one, other), count in sorted(found.shared.items()):
        log.info("%d images of %s stand in %s as well", count, other, one)
    shared = [[one, other, count] for (one, other), count in sorted(found.shared.items())]
    return {"doubles_sought_in": _state(recipe, runs), "shared": shared}


def _doubles(runs: Sequence[Run], held_out: set[str], reject_contamination: bool) -> Doubles:
    """The doubles of all sources, also where another attempt takes them out, and old files away, at the same time."""
    while True:
        try:
            return doubles({run.job.table: run.commits for run in runs}, held_out, reject_contamination)
        except DamagedTableError:
            if not any(run.refresh() for run in runs):
                raise


def _state(recipe: Recipe, runs: Sequence[Run]) -> str:
    """Digest of all that decides which images are doubles: every source's rows, and which are held out."""
    tables = [(run.job.table.source, table_digest([run.commits[i] for i in sorted(run.commits)])) for run in runs]
    held_out = [source.name for source in recipe.sources if source.held_out]
    return hashlib.sha256(json.dumps([tables, held_out, recipe.ingest.contamination]).encode()).hexdigest()


def _licence(source: Source) -> Licence:
    if isinstance(source, RoomsSource):
        return Licence(part=f"data: {source.name}", source="perceptio.rooms", licence="Apache-2.0")
    return Licence(part=f"data: {source.name}", source=source.path, licence=source.licence)


def _parts(readings: Iterable[Reading]) -> Iterator[list[Reading]]:
    remaining = iter(readings)
    while part := list(itertools.islice(remaining, AT_ONCE)):
        yield part


def _listing(work: Work) -> list[Row]:
    rows: list[Row] = work.rows(LISTING.names).to_pylist()
    return rows


def _read(source: Reader, item: Item) -> Iterator[Found | Refused]:
    if item.reason:  # found while it was listed
        return iter([Refused(Reason(item.reason), item.message, item.uri)])
    return source.read(item)


def image_id(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of an image's stored bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def _image_row(key: str, image: StoredImage, found: Found) -> Row | Reject:
    record = found.record

    def refuse(reason: Reason, message: str) -> Reject:
        return Reject(reason, message, id=key, uri=found.uri)

    parts = {"boxes": record.boxes, "masks": record.masks, "clicks": record.clicks}
    counts = {name: len(part) for name, part in parts.items() if part}
    if len(set(counts.values())) > 1:
        told = " but ".join(f"{number} {name}" for name, number in counts.items())
        return refuse(Reason.BAD_RECORD, f"{told}: one of each per object, or none")
    count = max(counts.values(), default=0)
    for turn in record.turns:
        if any(not 0 <= i < count for i in turn.objects):
            return refuse(Reason.BAD_RECORD, f"turn '{turn.prompt}' names objects {turn.objects} of {count}")
    boxes = [[value * image.scale for value in box] for box in record.boxes]
    for box, (x0, y0, x1, y1) in zip(record.boxes, boxes, strict=True):
        inside = 0 <= x0 < min(x1, image.width) and 0 <= y0 < min(y1, image.height)
        if not (inside and x1 <= image.width + 0.5 and y1 <= image.height + 0.5):  # scaling rounds the image's sides
            return refuse(Reason.MASK_OUTSIDE_IMAGE, f"box {box} is empty or outside the upright image")
    clicks = [(x * image.scale, y * image.scale) for x, y in record.clicks]
    for click, (x, y) in zip(record.clicks, clicks, strict=True):
        if not (0 <= x < image.width and 0 <= y < image.height):
            return refuse(Reason.MASK_OUTSIDE_IMAGE, f"click {click} is outside the upright image")
    try:
        masks = [_fitted(mask, image) for mask in record.masks]
    except ValueError as error:
        return refuse(Reason.BAD_MASK, str(error))
    try:
        recorded_depth = _fitted_depth(found.recorded_depth, image)
    except ValueError as error:
        return refuse(Reason.BAD_RECORD, f"recorded depth: {error}")
    return {
        "id": key,
        "uri": found.uri,
        "image": image.data,
        "width": image.width,
        "height": image.height,
        "turns": [turn.model_dump(mode="json") for turn in record.turns],
        "masks": masks,
        "boxes": [dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)) for box in boxes],
        "clicks": [{"x": x, "y": y} for x, y in clicks],
        "recorded_depth": recorded_depth,
    }


def _fitted(mask: Rle, image: StoredImage) -> Rle:
    """The mask at the stored image's size. Raises ValueError for a mask of another image's size."""
    _require_size("mask", (mask["height"], mask["width"]), image)  # before memory is taken for it
    mask_HW = rle_to_mask(mask)
    if mask_HW.shape == (image.height, image.width):
        return mask
    size = (image.width, image.height)
    mask_HW = np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))
    return masks_to_rle(mask_HW[None])[0]


def _fitted_depth(depth: bytes | None, image: StoredImage) -> bytes | None:
    """The recorded depth at the stored image's size; nearest, since a mean of near and far is neither.

    Raises ValueError for anything but a 16-bit PNG of the image's size.
    """
    if depth is None:
        return None
    values_HW = decode_depth16(depth)
    _require_size("map", values_HW.shape, image)
    if values_HW.shape == (image.height, image.width):
        return depth
    size = (image.width, image.height)
    return encode_depth16(np.asarray(Image.fromarray(values_HW).resize(size, Image.Resampling.NEAREST)))


def _require_size(what: str, seen: tuple[int, ...], image: StoredImage) -> None:
    """Raises ValueError for another size than the upright original's."""
    expected = (round(image.height / image.scale), round(image.width / image.scale))
    if any(abs(side - wanted) > 1 / image.scale for side, wanted in zip(seen, expected, strict=True)):
        raise ValueError(f"{what} is {seen[0]} x {seen[1]}, the upright image {expected}: mend its size")


def _standing(row: Row | Reject, standing: Mapping[str, Row]) -> Row | Reject:
    return row if isinstance(row, Reject) else standing.get(row["id"], row)


def _merged(kept: pa.Table, read: int, refused: Sequence[Reject], made: Mapping[int, Row | Reject]) -> ShardResult:
    """All rows of a shard after some refused ones were tried again, in the order in which they are read."""
    numbers = sorted(set(range(read)) - {reject.row for reject in refused})
    outcomes: dict[int, Row | Reject] = dict(zip(numbers, kept.to_pylist(), strict=True))
    uris = {row["id"]: row["uri"] for row in kept.select(["id", "uri"]).to_pylist()}
    outcomes |= {reject.row: reject for reject in refused}
    outcomes |= {number: _double(row, uris) for number, row in made.items()}
    return _result(sorted(outcomes.items()))


def _double(row: Row | Reject, uris: Mapping[str, str]) -> Row | Reject:
    """A reject where an image of this id stands already, at the address in `uris`."""
    if isinstance(row, Reject) or row["id"] not in uris:
        return row
    message = f"the same image as {uris[row['id']]}: keep one of them"
    return Reject(Reason.DUPLICATE_ID, message, row["id"], row["uri"])


def _result(outcomes: Iterator[tuple[int, Row | Reject]] | Sequence[tuple[int, Row | Reject]]) -> ShardResult:
    """The shard's table and rejects, an image that stands in it already refused."""
    kept: list[Row] = []
    rejects: list[Reject] = []
    uris: dict[str, str] = {}
    for number, outcome in outcomes:
        row = _double(outcome, uris)
        if isinstance(row, Reject):
            rejects.append(replace(row, row=number))
        else:
            kept.append(row)
            uris[row["id"]] = row["uri"]
    return ShardResult(pa.Table.from_pylist(kept, schema=IMAGES), len(kept) + len(rejects), rejects)
