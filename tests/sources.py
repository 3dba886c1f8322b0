"""Rendered rooms as files of public data sets, and what a reader makes of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptio.rooms.furniture import KINDS
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Room
from perceptio.sources.record import Found, Item, Reader, Refused
from schemas.tables import Reason

SIDE = 64


@cache
def room(index: int) -> Room:
    """One small room; rendered once."""
    return render_room(5, index, SIDE)


def png(index: int) -> bytes:
    return encoded(room(index).rgb_HW3, "PNG")


def jpeg(index: int) -> bytes:
    return encoded(room(index).rgb_HW3, "JPEG")


def encoded(values: Any, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, form)
    return stream.getvalue()


def masks(index: int) -> list[Any]:
    """The visible pixels of a room's objects, each (H, W)."""
    return [room(index).instance_HW == o.index for o in room(index).objects]


def box(mask_HW: Any) -> list[float]:
    """x, y, width, height, as COCO has it."""
    y, x = np.nonzero(mask_HW)
    return [float(x.min()), float(y.min()), float(np.ptp(x) + 1), float(np.ptp(y) + 1)]


def polygons(mask_HW: Any) -> list[list[float]]:
    """A rectangle a row's run of pixels: polygons that cover exactly the mask."""
    found = []
    for y in range(mask_HW.shape[0]):
        edges = np.flatnonzero(np.diff(np.pad(mask_HW[y].astype(int), 1)))
        for x0, x1 in edges.reshape(-1, 2):
            found.append([float(v) for v in (x0, y, x1, y, x1, y + 1, x0, y + 1)])
    return found


def runs(mask_HW: Any) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, as COCO has crowds."""
    flat = mask_HW.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask_HW.shape), "counts": [0, *lengths] if flat[0] else lengths}


def file_name(index: int) -> str:
    return f"COCO_train2014_{index:012d}.jpg"


def instances(indices: Iterable[int]) -> dict[str, Any]:
    """COCO's instances of some rooms, as polygons. Ids: of an image its room, of an annotation 100 x room + object."""
    indices = list(indices)
    return {
        "info": {"description": "rooms"},
        "licenses": [],
        "images": [
            {"id": i, "file_name": file_name(i), "height": SIDE, "width": SIDE, "license": 1, "coco_url": "http://x/y"}
            for i in indices
        ],
        "annotations": [
            {
                "id": 100 * i + o.index,
                "image_id": i,
                "category_id": KINDS.index(o.kind) + 1,
                "segmentation": polygons(mask_HW),
                "area": float(mask_HW.sum()),
                "bbox": box(mask_HW),
                "iscrowd": 0,
            }
            for i in indices
            for o, mask_HW in zip(room(i).objects, masks(i), strict=True)
        ],
        "categories": [{"id": n, "name": kind, "supercategory": "furniture"} for n, kind in enumerate(KINDS, 1)],
    }


def references(indices: Iterable[int], split: str = "train") -> list[dict[str, Any]]:
    """RefCOCO's refs of some rooms, one a room and object that is referred to alone."""
    refs: list[dict[str, Any]] = []
    sent_id = 0
    for i in indices:
        said: dict[int, list[str]] = {}
        for question in ask(room(i)):
            if question.kind == "referring" and len(question.objects) == 1:
                said.setdefault(question.objects[0], []).append(question.expression)
        for target, texts in said.items():
            sentences = []
            for text in texts:
                sentences.append({"tokens": text.split(), "raw": text.title(), "sent_id": sent_id, "sent": text})
                sent_id += 1
            refs.append(
                {
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "file_name": file_name(i).replace(".jpg", f"_{100 * i + target}.jpg"),
                    "ann_id": 100 * i + target,
                    "ref_id": len(refs),
                    "image_id": i,
                    "split": split,
                    "sentences": sentences,
                    "category_id": KINDS.index(room(i).objects[target].kind) + 1,
                }
            )
    return refs


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_json(path: Path, values: Any) -> Path:
    return write(path, json.dumps(values).encode())


def results(reader: Reader) -> list[Found | Refused]:
    """What every item is read as, in order; each item gives as many results as it said."""
    made: list[Found | Refused] = []
    for item in reader.items():
        these = list(reader.read(item))
        assert not item.rows or len(these) == item.rows, item
        made += these
    return made


def good(reader: Reader) -> list[Found]:
    made = results(reader)
    assert all(isinstance(row, Found) for row in made), made
    return [row for row in made if isinstance(row, Found)]


def refusals(reader: Reader) -> list[tuple[Reason, str]]:
    return [(row.reason, row.message) for row in results(reader) if isinstance(row, Refused)]


def unique(items: Iterable[Item]) -> list[Item]:
    """The items, whose ids must differ."""
    listed = list(items)
    assert len({item.id for item in listed}) == len(listed)
    return listed
