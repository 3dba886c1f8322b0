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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from perceptio.rooms.expressions import Sight, expressions, look
from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.points import ask_points
from perceptio.rooms.questions import ask, ask_again
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Room

SIDE = 128  # pixels of an image
GRID = 8  # image tokens along a side
PATCHES = 16  # patches along a side
DEPTH_GRID = 6  # cells along a side of the depth question
ROOMS_A_FILE = 250
MOST_BOXES = 24  # box questions kept of a room
DRAWS, POINT_DRAWS = 12, 4  # of the questions answered in words, and of those about points
SEEN_SHARE = 0.1  # of a cell that an object must fill to be its content
NAMED = ("attribute", "size")  # constructions that say what an object is, and not where
EMPTY = 0  # kind and colour of a cell without an object


class Turn(NamedTuple):
    """A question and its answer."""

    kind: str
    prompt: str
    answer: str
    about: tuple[int, ...] = ()  # the objects that the answer is read from


@dataclass(frozen=True)
class Points:
    """A question about lettered points, and where they are to be drawn."""

    xy: tuple[tuple[int, int], ...]
    turn: Turn
    inv_depth: tuple[float, ...]  # at each point

    @property
    def closest(self) -> tuple[int, int]:
        """Where the point lies that is the answer."""
        return self.xy[int(np.argmax(self.inv_depth))]


@dataclass(frozen=True)
class TaughtRoom:
    """One room: its questions, and what each cell of the image grid shows."""

    image: bytes  # PNG
    turns: dict[str, tuple[Turn, ...]]  # by kind; all but points
    points: tuple[Points, ...]
    token_G9: npt.NDArray[np.float32]  # what each image token shows; see _cells
    patch_P9: npt.NDArray[np.float32]  # what each patch shows


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
    return [
        Turn(
            "name" if e.form in NAMED else "box", f"Where is {e.text}?", box_answer(sight.box_O4[e.target]), (e.target,)
        )
        for e in (found[i] for i in chosen)
    ]


def png(rgb_HW3: npt.NDArray[np.uint8]) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_HW3).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _row(room: Room) -> dict[str, object]:
    sight = look(room)
    turns: dict[str, list[Turn]] = {}
    for turn in all_boxes(sight, np.random.default_rng([room.seed, room.index, SIDE])):
        turns.setdefault(turn.kind, []).append(turn)
    for q in (*ask(room), *ask_again(room, DRAWS)):
        if q.kind not in ("points", "referring"):
            turns.setdefault(q.kind, []).append(Turn(q.kind, q.prompt, q.answer, q.about or q.objects))
    turns["grid"] = [depth_turn(room)]
    inv_depth_HW = _inv_depth(room)
    rng = np.random.default_rng([room.seed, room.index, SIDE, 1])
    points = [
        {
            "xy": q.points_xy,
            "turn": Turn(q.kind, q.prompt, q.answer),
            "inv_depth": [float(inv_depth_HW[y, x]) for x, y in q.points_xy],
        }
        for _ in range(POINT_DRAWS)
        for q in ask_points(room, rng)
    ]
    return {
        "image": png(room.rgb_HW3),
        "turns": json.dumps(turns),
        "points": json.dumps(points),
        "tokens": _cells(room, sight, GRID).ravel().tolist(),
        "patches": _cells(room, sight, PATCHES).ravel().tolist(),
    }


def _taught(row: dict[str, object]) -> TaughtRoom:
    turns, points = json.loads(str(row["turns"])), json.loads(str(row["points"]))
    return TaughtRoom(
        row["image"],  # type: ignore[arg-type]
        {kind: tuple(_turn(values) for values in of_kind) for kind, of_kind in turns.items()},
        tuple(Points(tuple((x, y) for x, y in p["xy"]), _turn(p["turn"]), tuple(p["inv_depth"])) for p in points),
        np.array(row["tokens"], np.float32).reshape(-1, 9),
        np.array(row["patches"], np.float32).reshape(-1, 9),
    )


def _turn(values: list[Any]) -> Turn:
    kind, prompt, answer, about = values
    return Turn(kind, prompt, answer, tuple(about))


def lettered(points: Points) -> npt.NDArray[np.float32]:
    """[G, 2]: for each image token the letter of the point in it (1 for A), and that point's inv_depth; else 0."""
    letter_G2 = np.zeros((GRID * GRID, 2), np.float32)
    for n, ((x, y), inv_depth) in enumerate(zip(points.xy, points.inv_depth, strict=True)):
        letter_G2[y * GRID // SIDE * GRID + x * GRID // SIDE] = 1 + n, inv_depth
    return letter_G2


def mirrored(cell_G9: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the cells show when the image is turned left to right."""
    side = math.isqrt(len(cell_G9))
    turned_G9 = cell_G9.reshape(side, side, 9)[:, ::-1].reshape(-1, 9).copy()
    turned_G9[:, [2, 4]] = np.where(turned_G9[:, :1] > EMPTY, 1 - turned_G9[:, [4, 2]], 0)
    return turned_G9


def depth_turn(room: Room) -> Turn:
    """Closeness in a grid of DEPTH_GRID x DEPTH_GRID, row by row, two digits a cell and no space: 00 far to 99 near."""
    step = SIDE / DEPTH_GRID
    edges = [round(step * i) for i in range(DEPTH_GRID)]
    mean_NN = np.add.reduceat(np.add.reduceat(_inv_depth(room), edges, 0), edges, 1)
    mean_NN /= np.outer(*[np.diff([*edges, SIDE])] * 2)
    levels = np.clip(100 * mean_NN, 0, 99).astype(int)
    digits = "".join(f"{n:02d}" for n in levels.flat)
    return Turn("grid", f"How close is each of {DEPTH_GRID} x {DEPTH_GRID} parts?", digits)


def _inv_depth(room: Room) -> npt.NDArray[np.floating]:
    inverse_HW = 1 / room.depth_HW
    low, high = float(inverse_HW.min()), float(inverse_HW.max())
    return (inverse_HW - low) / max(high - low, 1e-6)


def _cells(room: Room, sight: Sight, grid: int) -> npt.NDArray[np.float32]:
    """What most of each cell of a grid shows, [grid * grid, 9], or EMPTY where no object fills enough of it.

    1 + index in KINDS, 1 + index in COLORS, box of the object (x0, y0, x1, y1) in [0, 1], mean inv_depth of the cell,
    1 in the one cell of each object that stands for it (the nearest to its middle of those that show it), and 1 + the
    object's index.
    """
    count, step = len(room.objects), SIDE // grid
    instance_GP = room.instance_HW.reshape(grid, step, grid, step).swapaxes(1, 2).reshape(grid * grid, -1)
    inv_depth_G = _inv_depth(room).reshape(grid, step, grid, step).mean((1, 3)).ravel()
    share_GO = np.stack([(instance_GP == i).mean(1) for i in range(count)], 1)
    object_G, seen_G1 = share_GO.argmax(1), share_GO.max(1, keepdims=True) >= SEEN_SHARE
    kinds, colors = list(KINDS), list(COLORS)
    name_O2 = np.array([(1 + kinds.index(o.kind), 1 + colors.index(o.color)) for o in room.objects])
    box_O4 = (sight.box_O4 + np.array([0, 0, 1, 1])) / SIDE
    shown_G6 = np.where(seen_G1, np.concatenate([name_O2, box_O4], 1)[object_G], EMPTY)
    middle_G2 = (np.stack(np.divmod(np.arange(grid * grid), grid)[::-1], 1) + 0.5) / grid
    chosen_G = np.zeros(grid * grid)
    for i in range(count):
        own = np.flatnonzero(seen_G1[:, 0] & (object_G == i))
        if len(own):
            chosen_G[own[np.hypot(*(middle_G2[own] - sight.center_O2[i]).T).argmin()]] = 1
    index_G1 = np.where(seen_G1, 1 + object_G[:, None], EMPTY)
    return np.concatenate([shown_G6, inv_depth_G[:, None], chosen_G[:, None], index_G1], 1).astype(np.float32)
