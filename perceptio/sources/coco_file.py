"""COCO's `instances.json`: its images, and its annotations as boxes and run lengths.

Shape legend: N corners of a polygon.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from perceptio.data.masks import Rle
from perceptio.sources.files import place_of, read_whole, relative
from perceptio.sources.record import LONGEST_SIDE, RowError, SourceError, shown
from schemas.tables import Reason

Values = dict[str, Any]
FARTHEST = 1.0  # of the image's side: how far a polygon may reach out of the image; farther ones are a mistake
CORNERS = 3  # fewest of a polygon
LONGEST_OUTLINE = 2**22  # pixels of a polygon: the library's memory goes with it
LARGEST = 1e9  # of numbers; what is beyond is no place in an image


@dataclass(frozen=True)
class CocoFile:
    """Images, annotations and categories by id, as they stand in the file; only their ids are checked."""

    images: dict[int, Values]
    annotations: dict[int, Values]
    categories: dict[int, Values]


def read_json(path: str, field: str, most: int) -> Any:
    """The values of a JSON file. Raises SourceError for no file, one above `most` bytes, and one that is no JSON."""
    data = read_whole(place_of(path, field), field, most)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{field}: '{path}' is no JSON: {error!s:.200}: download it again") from error


def read_coco(path: str, field: str, most: int) -> CocoFile:
    """The file's three lists. Raises SourceError where one is missing, or an entry has no id or one that is taken."""
    values = read_json(path, field, most)
    lists = [_by_id(values, name, f"{field}: '{path}'") for name in ("images", "annotations", "categories")]
    return CocoFile(*lists)


def _by_id(values: Any, name: str, where: str) -> dict[int, Values]:
    entries = values.get(name) if isinstance(values, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"{where} has no list '{name}', expected COCO's instances: images, annotations, categories")
    found: dict[int, Values] = {}
    for number, entry in enumerate(entries):
        key = entry.get("id") if isinstance(entry, dict) else None
        if type(key) is not int or key in found:
            raise SourceError(f"{where}: {name}[{number}].id is {shown(key)}, expected a whole number of its own")
        found[key] = entry
    return found


def image_of(image: Values) -> tuple[str, int, int]:
    """File name, height and width of an image. Raises RowError for wrong ones."""
    where = f"image {image['id']}"
    name = relative(image.get("file_name"), f"{where}: file_name")
    sides = [_side(image.get(side), f"{where}: {side}") for side in ("height", "width")]
    return name, sides[0], sides[1]


def _side(value: object, where: str) -> int:
    if type(value) is not int or not 0 < value <= LONGEST_SIDE:
        raise RowError(Reason.BAD_RECORD, f"{where} is {shown(value)}, expected pixels from 1 to {LONGEST_SIDE}")
    return value


def box_of(annotation: Values) -> list[float]:
    """The box (x0, y0, x1, y1) of an annotation's x, y, width and height. Raises RowError for a wrong one."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        message = f"annotation {annotation['id']}: bbox is {shown(box)}, expected x, y, width and height"
        raise RowError(Reason.BAD_RECORD, message)
    x, y, width, height = box
    return [x, y, x + width, y + height]


def rle_of(annotation: Values, height: int, width: int) -> Rle:
    """The mask of an annotation: polygons, run lengths as numbers, or compressed ones. Raises RowError if it is wrong.

    Whether compressed run lengths fill the image is found where they are decoded.
    """
    segmentation = annotation.get("segmentation")
    try:
        if isinstance(segmentation, list):
            return _row(coco.merge(coco.frPyObjects(_polygons(segmentation, height, width), height, width)))
        if not isinstance(segmentation, dict) or "counts" not in segmentation:
            raise ValueError(f"{shown(segmentation)} is neither polygons nor run lengths")
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"its size is another than the image's [{height}, {width}]")
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return {"height": height, "width": width, "counts": counts}
        _check_runs(counts, height, width)
        return _row(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    except ValueError as error:
        raise RowError(Reason.BAD_MASK, f"annotation {annotation['id']}: segmentation: {error}") from error


def _row(code: Any) -> Rle:
    height, width = code["size"]
    return {"height": int(height), "width": int(width), "counts": code["counts"].decode("ascii")}


def _polygons(polygons: list[Any], height: int, width: int) -> list[list[float]]:
    """The polygons, checked: far coordinates would make the library fill the memory."""
    if not polygons:
        raise ValueError("there is no polygon")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 2 * CORNERS or len(polygon) % 2:
            raise ValueError(f"{shown(polygon)} is no polygon of {CORNERS} or more corners x, y")
        wrong = next((value for value in polygon if not _is_number(value)), None)
        if wrong is not None:
            raise ValueError(f"a corner is {shown(wrong)}, expected numbers")
        corners_N2 = np.asarray(polygon, np.float64).reshape(-1, 2)
        shares_N2 = corners_N2 / (width, height)
        if shares_N2.min() < -FARTHEST or shares_N2.max() > 1 + FARTHEST:
            raise ValueError(f"a corner is far outside the image of {width} x {height}")
        if np.abs(np.diff(corners_N2, axis=0)).sum() > LONGEST_OUTLINE:
            raise ValueError(f"a polygon's outline is longer than {LONGEST_OUTLINE} pixels")
    return polygons


def _check_runs(counts: Any, height: int, width: int) -> None:
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise ValueError("run lengths are no list of whole numbers from 0 on")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths cover {shown(sum(counts))} pixels, expected {height} x {width}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]  # not for NaN
