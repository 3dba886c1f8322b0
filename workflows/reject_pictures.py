"""Refused rows by reason, some of them with what they look like.

Counts are of all rows. For `ingest` a picture is read again from the source, by the reader that refused it; for every
later stage it stands in the images table. What cannot be drawn says why.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perceptio.data.images import ImageError, ImageLimits, decode
from perceptio.sources.record import Found, Item, Reader, Refused, SourceError
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.tables import LISTING, Reason
from workflows.commits import Table
from workflows.listing import reader
from workflows.stage_pictures import thumbnail
from workflows.store import Root

EXAMPLES = 6  # of each reason
SIDE = 168  # pixels of a picture's longer side

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A refused row."""

    source: str
    place: str  # its address and number
    message: str
    picture: str  # data URI, "" where there is none
    why_none: str  # "" where there is a picture


@dataclass(frozen=True)
class Refusals:
    """All rows that were refused for one reason."""

    reason: str
    count: int
    examples: Sequence[Example]


def refusals(recipe: Recipe, root: Root, table: str, manifests: Mapping[str, Manifest]) -> list[Refusals]:
    """The reasons, most frequent first, each with EXAMPLES of its rows: the first of each source's shards."""
    counts: Counter[str] = Counter()
    for manifest in manifests.values():
        for commit in manifest.shards:
            counts.update(commit.reasons)
    examples: defaultdict[str, list[Example]] = defaultdict(list)
    for source, manifest in manifests.items():
        for commit in manifest.shards:
            wanted = [reason for reason in commit.reasons if len(examples[reason]) < EXAMPLES]
            if wanted:
                rows = Table(root, table, source).rejects_of(commit).to_pylist()
                for reason in wanted:
                    chosen = [row for row in rows if row["reason"] == reason][: EXAMPLES - len(examples[reason])]
                    examples[reason] += _examples(recipe, root, table, source, commit.shard, chosen)
    return [Refusals(reason, count, examples[reason]) for reason, count in counts.most_common()]


def _examples(
    recipe: Recipe, root: Root, table: str, source: str, shard: int, rows: Sequence[Row]
) -> Iterator[Example]:
    limits = ImageLimits(1, recipe.ingest.max_pixels)
    read = _from_source if table == "images" else _from_images
    found = read(recipe, root, source, shard, rows)
    for row in rows:
        data, why = found.get(row["row"], (b"", "no picture of it is stored"))
        picture = ""
        if data:
            try:
                picture = thumbnail(decode(data, limits), SIDE)
            except ImageError as error:
                why = f"cannot be drawn: {error.reason.value.replace('_', ' ')}"
        place = f"{row['uri']}" if row["uri"] else f"id {row['id']}"
        yield Example(source, f"{place} (shard {shard}, row {row['row']})", row["message"], picture, why)


def _from_images(
    recipe: Recipe, root: Root, source: str, shard: int, rows: Sequence[Row]
) -> dict[int, tuple[bytes, str]]:
    """The images of refused rows, by the rows' numbers; those that stand no longer are left out."""
    table = Table(root, "images", source)
    if table.find(shard) is None:
        return {}
    stored = table.read_shard(shard, ["id", "image"])
    by_id = dict(zip(stored["id"].to_pylist(), stored["image"], strict=True))
    return {row["row"]: (by_id[row["id"]].as_py(), "") for row in rows if row["id"] in by_id}


def _from_source(
    recipe: Recipe, root: Root, source: str, shard: int, rows: Sequence[Row]
) -> dict[int, tuple[bytes, str]]:
    """What lies in the source for refused rows, by the rows' numbers, or why it cannot be had.

    A forgotten image is not shown again.
    """
    wanted = {row["row"] for row in rows if row["reason"] != Reason.FORGOTTEN}
    listed = Table(root, "listing", source).read_shard(shard).to_pylist()
    items = [Item(**{name: row[name] for name in LISTING.names if name != "id"}) for row in listed]
    settings = next(section for section in recipe.sources if section.name == source)
    try:
        return {number: _data(outcome) for number, outcome in _outcomes(reader(settings), items, wanted)}
    except (OSError, SourceError) as error:
        return dict.fromkeys(wanted, (b"", f"the source cannot be read now: {error}"))


def _outcomes(source: Reader, items: Iterable[Item], wanted: set[int]) -> Iterator[tuple[int, Found | Refused]]:
    """The wanted rows of a shard by number; items without any of them are not read where that can be told."""
    first = 0
    for item in items:
        if wanted and first > max(wanted):
            return
        if item.rows and wanted.isdisjoint(range(first, first + item.rows)):
            first += item.rows
            continue
        if item.reason:  # found while it was listed: there is nothing to read
            yield first, Refused(Reason(item.reason), item.message, item.uri)
            first += 1
            continue
        for outcome in source.read(item):
            if first in wanted:
                yield first, outcome
            first += 1


def _data(outcome: Found | Refused) -> tuple[bytes, str]:
    if isinstance(outcome, Refused):
        return b"", f"there is nothing to draw: {outcome.reason.value.replace('_', ' ')}"
    return outcome.data, ""
