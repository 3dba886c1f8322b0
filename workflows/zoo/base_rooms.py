"""Rooms as the small base model is taught them: a cache on disk, and packs of questions about one image.

Shape legend: H, W image height and width; G cells of the model's image grid (row-major); T tokens of a pack; B packs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceptio.rooms.expressions import Sight, expressions, look
from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Question, Room

SIDE = 128  # pixels of an image
GRID = 8  # image tokens along a side
ROOMS_A_FILE = 250
MOST_BOXES = 24  # box questions kept of a room
SEEN_SHARE = 0.1  # of a cell that an object must fill to be its content
EMPTY = 0  # kind and colour of a cell without an object

Turn = tuple[str, str, str]  # kind, prompt, answer


@dataclass(frozen=True)
class TaughtRoom:
    """One room: its questions, and what each cell of the image grid shows."""

    image: bytes  # PNG
    turns: tuple[Turn, ...]  # all kinds but points and referring
    boxes: tuple[Turn, ...]
    points: tuple[tuple[bytes, Turn], ...]  # each with the image that has its points drawn in
    kind_G: npt.NDArray[np.int64]  # 1 + index in KINDS, or EMPTY
    color_G: npt.NDArray[np.int64]  # 1 + index in COLORS, or EMPTY
    place_G5: npt.NDArray[np.float32]  # box of the object (x0, y0, x1, y1) and mean inv_depth, all in [0, 1]


def cached_rooms(folder: Path, seed: int, count: int) -> Iterator[TaughtRoom]:
    """Rooms 0 to `count` of a seed, rendered into `folder` where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, ROOMS_A_FILE):
        path = folder / f"rooms-{seed}-{start:06d}.parquet"
        if not path.exists():
            rows = [_row(render_room(seed, index, SIDE)) for index in range(start, start + ROOMS_A_FILE)]
            unfinished = path.with_suffix(".part")
            pq.write_table(pa.Table.from_pylist(rows), unfinished)
            unfinished.rename(path)
        yield from (_taught(row) for row in pq.read_table(path).to_pylist()[: count - start])


def box_answer(box: tuple[int, ...] | npt.NDArray[np.int64]) -> str:
    """A box in pixels (first and last column and row) as InternVL writes it, in hundredths of the image's side."""
    return f"[[{', '.join(str(int(v) * 100 // SIDE) for v in box)}]]"


def all_boxes(sight: Sight, rng: np.random.Generator) -> list[Turn]:
    """A box question for each of up to MOST_BOXES expressions, every construction and object about equally often."""
    found = expressions(sight)
    weight = [1 / sum(o.form == e.form for o in found) / sum(o.target == e.target for o in found) for e in found]
    share = np.array(weight) / sum(weight)
    count = min(MOST_BOXES, len(found))
    chosen: list[int] = rng.choice(len(found), count, replace=False, p=share).tolist() if found else []
    return [("box", f"Where is {found[i].text}?", box_answer(sight.box_O4[found[i].target])) for i in chosen]


def png(rgb_HW3: npt.NDArray[np.uint8]) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_HW3).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _row(room: Room) -> dict[str, object]:
    sight, questions = look(room), ask(room)
    points = [q for q in questions if q.kind == "points" and q.image_HW3 is not None]
    turns = [q for q in questions if q.kind not in ("points", "referring", "box")]
    boxes = all_boxes(sight, np.random.default_rng([room.seed, room.index, SIDE]))
    boxes += [_turn(q) for q in questions if q.kind == "box"]
    kind_G, color_G, place_G5 = _cells(room, sight)
    return {
        "image": png(room.rgb_HW3),
        "turns": json.dumps([_turn(q) for q in turns]),
        "boxes": json.dumps(boxes),
        "points": json.dumps([_turn(q) for q in points]),
        "points_images": [png(q.image_HW3) for q in points if q.image_HW3 is not None],
        "kinds": kind_G.tolist(),
        "colors": color_G.tolist(),
        "places": place_G5.ravel().tolist(),
    }


def _turn(question: Question) -> Turn:
    return question.kind, question.prompt, question.answer


def _taught(row: dict[str, object]) -> TaughtRoom:
    turns, boxes, points = (
        tuple(tuple(t) for t in json.loads(str(row[name]))) for name in ("turns", "boxes", "points")
    )
    return TaughtRoom(
        row["image"],  # type: ignore[arg-type]
        turns,
        boxes,
        tuple(zip(row["points_images"], points, strict=True)),  # type: ignore[call-overload]
        np.array(row["kinds"], np.int64),
        np.array(row["colors"], np.int64),
        np.array(row["places"], np.float32).reshape(-1, 5),
    )


def _cells(room: Room, sight: Sight) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Kind, colour, box and inv_depth of the object that fills most of each cell, if any fills enough of it."""
    count, step = len(room.objects), SIDE // GRID
    instance_GP = room.instance_HW.reshape(GRID, step, GRID, step).swapaxes(1, 2).reshape(GRID * GRID, -1)
    inverse_GP = (1 / room.depth_HW).reshape(GRID, step, GRID, step).swapaxes(1, 2).reshape(GRID * GRID, -1)
    share_GO = np.stack([(instance_GP == i).mean(1) for i in range(count)], 1)
    object_G, seen_G = share_GO.argmax(1), share_GO.max(1) >= SEEN_SHARE
    kinds, colors = list(KINDS), list(COLORS)
    kind_O = np.array([1 + kinds.index(o.kind) for o in room.objects])
    color_O = np.array([1 + colors.index(o.color) for o in room.objects])
    box_G4 = (sight.box_O4[object_G] + [0, 0, 1, 1]) / SIDE
    low, high = float((1 / room.depth_HW).min()), float((1 / room.depth_HW).max())
    inv_depth_G = (inverse_GP.mean(1) - low) / max(high - low, 1e-6)
    place_G5 = np.concatenate([box_G4, inv_depth_G[:, None]], 1).astype(np.float32)
    return np.where(seen_G, kind_O[object_G], EMPTY), np.where(seen_G, color_O[object_G], EMPTY), place_G5
