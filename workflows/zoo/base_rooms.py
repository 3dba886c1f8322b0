"""Rooms as the small base model is taught them: a cache on disk, and packs of questions about one image.

Shape legend: H, W image height and width; G cells of the model's image grid (row-major); T tokens of a pack; B packs.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
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
PATCHES = 16  # patches along a side
DEPTH_GRID = 6  # cells along a side of the depth question
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
    token_G7: npt.NDArray[np.float32]  # what each image token shows; see _cells
    patch_P7: npt.NDArray[np.float32]  # what each patch shows


def cached_rooms(folder: Path, seed: int, count: int) -> Iterator[TaughtRoom]:
    """Rooms 0 to `count` of a seed, rendered into `folder` by all cores where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, ROOMS_A_FILE)
    paths = [folder / f"rooms-{seed}-{start:06d}.parquet" for start in starts]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_render_file, paths, repeat(seed), starts))
    for start, path in zip(starts, paths, strict=True):
        yield from (_taught(row) for row in pq.read_table(path).to_pylist()[: count - start])


def _render_file(path: Path, seed: int, start: int) -> None:
    if path.exists():
        return
    rows = [_row(render_room(seed, index, SIDE)) for index in range(start, start + ROOMS_A_FILE)]
    unfinished = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows), unfinished)
    unfinished.rename(path)


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
    turns = [_turn(q) for q in questions if q.kind not in ("points", "referring", "box")] + [depth_turn(room)]
    boxes = all_boxes(sight, np.random.default_rng([room.seed, room.index, SIDE]))
    boxes += [_turn(q) for q in questions if q.kind == "box"]
    return {
        "image": png(room.rgb_HW3),
        "turns": json.dumps(turns),
        "boxes": json.dumps(boxes),
        "points": json.dumps([_turn(q) for q in points]),
        "points_images": [png(q.image_HW3) for q in points if q.image_HW3 is not None],
        "tokens": _cells(room, sight, GRID).ravel().tolist(),
        "patches": _cells(room, sight, PATCHES).ravel().tolist(),
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
        np.array(row["tokens"], np.float32).reshape(-1, 7),
        np.array(row["patches"], np.float32).reshape(-1, 7),
    )


def mirrored(cell_G7: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the cells show when the image is turned left to right."""
    side = math.isqrt(len(cell_G7))
    turned_G7 = cell_G7.reshape(side, side, 7)[:, ::-1].reshape(-1, 7).copy()
    turned_G7[:, [2, 4]] = np.where(turned_G7[:, :1] > EMPTY, 1 - turned_G7[:, [4, 2]], 0)
    return turned_G7


def depth_turn(room: Room) -> Turn:
    """Closeness in a grid of DEPTH_GRID x DEPTH_GRID, row by row, two digits a cell and no space: 00 far to 99 near."""
    inverse_HW = 1 / room.depth_HW
    step = SIDE / DEPTH_GRID
    edges = [round(step * i) for i in range(DEPTH_GRID)]
    mean_NN = np.add.reduceat(np.add.reduceat(inverse_HW, edges, 0), edges, 1)
    mean_NN /= np.outer(*[np.diff([*edges, SIDE])] * 2)
    low, high = float(inverse_HW.min()), float(inverse_HW.max())
    levels = np.clip(100 * (mean_NN - low) / max(high - low, 1e-6), 0, 99).astype(int)
    return "grid", f"How close is each of {DEPTH_GRID} x {DEPTH_GRID} parts?", "".join(f"{n:02d}" for n in levels.flat)


def _cells(room: Room, sight: Sight, grid: int) -> npt.NDArray[np.float32]:
    """What most of each cell of a grid shows, [grid * grid, 7], or EMPTY where no object fills enough of it.

    1 + index in KINDS, 1 + index in COLORS, box of the object (x0, y0, x1, y1) in [0, 1], mean inv_depth of the cell.
    """
    count, step = len(room.objects), SIDE // grid
    instance_GP = room.instance_HW.reshape(grid, step, grid, step).swapaxes(1, 2).reshape(grid * grid, -1)
    inverse_GP = (1 / room.depth_HW).reshape(grid, step, grid, step).swapaxes(1, 2).reshape(grid * grid, -1)
    share_GO = np.stack([(instance_GP == i).mean(1) for i in range(count)], 1)
    object_G, seen_G1 = share_GO.argmax(1), share_GO.max(1, keepdims=True) >= SEEN_SHARE
    kinds, colors = list(KINDS), list(COLORS)
    name_O2 = np.array([(1 + kinds.index(o.kind), 1 + colors.index(o.color)) for o in room.objects])
    box_O4 = (sight.box_O4 + np.array([0, 0, 1, 1])) / SIDE
    low, high = float((1 / room.depth_HW).min()), float((1 / room.depth_HW).max())
    inv_depth_G1 = (inverse_GP.mean(1, keepdims=True) - low) / max(high - low, 1e-6)
    shown_G6 = np.where(seen_G1, np.concatenate([name_O2, box_O4], 1)[object_G], EMPTY)
    return np.concatenate([shown_G6, inv_depth_G1], 1).astype(np.float32)
