"""Rooms on disk in the layout of COCO and RefCOCO, for every other reader of such files.

    out/images/000000000007.png      the picture
    out/depth/000000000007.png       depth in millimetres, 16-bit grey
    out/points/000000000007_4.png    the picture with four lettered points drawn in, where a question asks for them
    out/instances.json               COCO: images, annotations (RLE, bbox, area), categories
    out/refs(unc).json               RefCOCO's refs; JSON, because nothing pickled is written or read here
    out/questions.jsonl              every question, one a line

Shape legend: H, W image height and width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as rle

from perceptio.rooms.furniture import KINDS
from perceptio.rooms.questions import ask
from perceptio.rooms.room import Question, Room

Record = dict[str, Any]


def write_coco(rooms: Iterable[Room], out: Path, split: str = "train") -> int:
    """Writes the rooms below `out` and returns how many; one room is in memory at a time.

    An image's id is its room's index. `split` is written on every ref ("train", "val", "testA", "testB"). Raises
    FileExistsError if `out` already holds rooms, ValueError if two rooms have one index or a depth beyond 65.535 m.
    """
    if (out / "instances.json").exists():
        raise FileExistsError(f"{out / 'instances.json'} exists already: give an empty folder, or remove the old one")
    for folder in ("images", "depth", "points"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    images: dict[int, Record] = {}
    annotations: list[Record] = []
    refs: list[Record] = []
    sent_ids = itertools.count(1)
    with (out / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for room in rooms:
            if room.index in images:
                raise ValueError(f"two rooms have the index {room.index}: it is the image's id, so it must be unique")
            questions = ask(room)
            images[room.index] = _image(room, out)
            first = len(annotations) + 1
            annotations += _annotations(room, first)
            refs += _refs(room, questions, first, split, len(refs) + 1, sent_ids)
            lines.writelines(json.dumps(_question(room, q, i, out)) + "\n" for i, q in enumerate(questions))
    categories = [{"id": i, "name": kind, "supercategory": "furniture"} for i, kind in enumerate(KINDS, start=1)]
    info = {"description": "Rooms rendered by Perceptio: exact masks, depth and referring expressions"}
    instances = {"info": info, "images": [*images.values()], "annotations": annotations, "categories": categories}
    (out / "refs(unc).json").write_text(json.dumps(refs), encoding="utf-8")
    (out / "instances.json").write_text(json.dumps(instances), encoding="utf-8")  # last: its presence means complete
    return len(images)


def _name(room: Room) -> str:
    return f"{room.index:012d}"


def _image(room: Room, out: Path) -> Record:
    height, width = room.depth_HW.shape
    millimetres_HW = np.rint(room.depth_HW * 1000)
    if millimetres_HW.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"room {room.index} is {room.depth_HW.max():.1f} m deep; a 16-bit file holds up to 65.5 m")
    name = f"{_name(room)}.png"
    Image.fromarray(room.rgb_HW3).save(out / "images" / name)
    Image.fromarray(millimetres_HW.astype(np.uint16)).save(out / "depth" / name)
    return {"id": room.index, "file_name": name, "width": width, "height": height, "room_seed": room.seed}


def _annotations(room: Room, first: int) -> list[Record]:
    """One per object, in the order of `room.objects`, with ids that count up from `first`."""
    return [
        {
            "id": first + o.index,
            "image_id": room.index,
            "category_id": KINDS.index(o.kind) + 1,
            "segmentation": (code := _rle(room.instance_HW == o.index)),
            "area": int(rle.area(code)),
            "bbox": [float(v) for v in rle.toBbox(code)],
            "iscrowd": 0,
            "attributes": {"color": o.color, "size": o.size},
        }
        for o in room.objects
    ]


def _rle(mask_HW: npt.NDArray[np.bool_]) -> Record:
    code = rle.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def _refs(
    room: Room, questions: tuple[Question, ...], first: int, split: str, ref_id: int, sent_ids: Iterator[int]
) -> list[Record]:
    """One ref per object that is referred to alone, with all its sentences; their ids count up from `ref_id`."""
    said: dict[int, list[str]] = {}
    for q in questions:
        if q.kind == "referring" and len(q.objects) == 1 and q.expression not in said.setdefault(q.objects[0], []):
            said[q.objects[0]].append(q.expression)
    refs = []
    for number, (target, texts) in enumerate(said.items()):
        sentences = [{"raw": t, "sent": t, "tokens": t.split(), "sent_id": next(sent_ids)} for t in texts]
        ref = {
            "ref_id": ref_id + number,
            "ann_id": first + target,
            "image_id": room.index,
            "category_id": KINDS.index(room.objects[target].kind) + 1,
            "file_name": f"{_name(room)}.png",
            "split": split,
            "sentences": sentences,
            "sent_ids": [s["sent_id"] for s in sentences],
        }
        refs.append(ref)
    return refs


def _question(room: Room, q: Question, number: int, out: Path) -> Record:
    image = f"images/{_name(room)}.png"
    if q.image_HW3 is not None:
        image = f"points/{_name(room)}_{len(q.points_xy)}.png"
        Image.fromarray(q.image_HW3).save(out / image)
    return {
        "question_id": f"{_name(room)}_{number}",
        "image_id": room.index,
        "image": image,
        "category": q.kind,
        "form": q.form,
        "text": q.prompt,
        "answer": q.answer,
        "expression": q.expression,
        "objects": list(q.objects),
        "choices": list(q.choices),
        "points_xy": [list(point) for point in q.points_xy],
    }
