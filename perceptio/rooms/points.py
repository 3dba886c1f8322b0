"""Lettered points drawn into a room, after HardBLINK: which one is the closest to the camera?

Shape legend: H, W image height and width; P possible pixels; S sets of points tried; N points of a set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceptio.rooms.balance import Floats, draw, top_share
from perceptio.rooms.room import BACKGROUND, Question, Room

PROMPT = (
    "Multiple points are circled on the image, labeled by letters beside each circle. "
    "Which point is the closest to the camera?"
)
LETTERS = "ABCDE"
MARGIN = 1.10  # depth of the second closest point over that of the closest
FLAT = 1.08  # largest ratio of depths around a point: no depth edge, no slanting surface seen edge-on
GAP = 0.15  # least distance between two points, in x or y, as a share of the image's shorter side
SETS = 500  # tried
PIXELS = 18  # tried per object
CELLS = 4  # the background is cut into 4 x 4 regions

_GLYPHS = {  # 5 x 7 bitmaps, one row a number
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
}


@dataclass(frozen=True)
class _Pixels:
    """Pixels at which a point may be drawn: flat surface, away from the image's edge."""

    xy_P2: npt.NDArray[np.int64]
    region_P: npt.NDArray[np.int64]  # a set holds at most one point of each region
    z_P: Floats
    size_P: Floats  # visible pixels of the object that the pixel shows, 0 on the background
    out_P: Floats  # distance from the image's middle


def ask_points(room: Room, rng: np.random.Generator) -> list[Question]:
    """Up to three questions: the closest of 3, of 4 and of 5 points; one is left out where no balanced set exists."""
    pixels = _possible_pixels(room, rng)
    found = []
    for n in (3, 4, 5):
        chosen = _choose(room, rng, pixels, n)
        if chosen is None:
            continue
        points_xy, closest = chosen
        letters = tuple(f"({letter})" for letter in LETTERS[:n])
        image_HW3 = draw_points(room.rgb_HW3, points_xy)
        found.append(Question("points", f"points_{n}", PROMPT, letters[closest], "", (), letters, points_xy, image_HW3))
    return found


def _possible_pixels(room: Room, rng: np.random.Generator) -> _Pixels:
    height, width = room.depth_HW.shape
    side = min(height, width)
    edge, reach = max(2, round(0.06 * side)), max(1, round(0.012 * side))
    cells_HW = (np.arange(height) * CELLS // height)[:, None] * CELLS + np.arange(width) * CELLS // width
    region_HW = np.where(room.instance_HW == BACKGROUND, len(room.objects) + cells_HW, room.instance_HW)
    inner = region_HW[edge:-edge, edge:-edge]
    order = rng.permutation(inner.size)
    order = order[np.argsort(inner.ravel()[order], kind="stable")]
    labels = inner.ravel()[order]
    share = np.where(labels < len(room.objects), PIXELS, PIXELS // 4)  # the background has more regions
    y, x = np.divmod(order[np.arange(len(labels)) - np.searchsorted(labels, labels) < share], inner.shape[1])
    y, x = y + edge, x + edge
    around = np.arange(-reach, reach + 1)
    window = (y[:, None, None] + around[:, None], x[:, None, None] + around)
    z_around, same = room.depth_HW[window], room.instance_HW[window] == room.instance_HW[y, x][:, None, None]
    good = same.all((1, 2)) & (z_around.max((1, 2)) <= FLAT * z_around.min((1, 2)))
    y, x = y[good], x[good]
    sizes = np.array([*room.visible_pixels, 0.0])  # index -1 is the background
    out_P = np.hypot(x - width / 2, y - height / 2)
    z_P = room.depth_HW[y, x].astype(np.float64)
    return _Pixels(np.stack([x, y], -1), region_HW[y, x], z_P, sizes[room.instance_HW[y, x]], out_P)


def _choose(
    room: Room, rng: np.random.Generator, pixels: _Pixels, n: int
) -> tuple[tuple[tuple[int, int], ...], int] | None:
    """Points in letter order and the place of the closest; the letters are a random order, so each is as likely."""
    set_SN = _sets(rng, pixels, n, GAP * min(room.depth_HW.shape))
    wish_S = 3.0 ** (pixels.size_P[set_SN] > 0).sum(1)  # points on objects rather than on bare walls
    chosen = draw(rng, _marks(pixels, set_SN), np.full(6, 1 / n), wish_S)
    if chosen is None:
        return None
    order = rng.permutation(n)
    points = tuple((int(x), int(y)) for x, y in pixels.xy_P2[set_SN[chosen]][order])
    return points, int(np.flatnonzero(order == 0)[0])


def _sets(rng: np.random.Generator, pixels: _Pixels, n: int, gap: float) -> npt.NDArray[np.int64]:
    """Sets of points, the closest first. Sets in which a blind guess fails are rare, so they are looked for.

    Each try takes a closest point and wishes it extreme or not in height, centrality and size of its object; the
    others are drawn from the pixels that fit the wish and are farther away from the camera by the margin.
    """
    count = len(pixels.z_P)
    if count < n:
        return np.zeros((0, n), np.int64)
    x_P, y_P = pixels.xy_P2.T
    together_PP = (np.abs(x_P[:, None] - x_P) >= gap) | (np.abs(y_P[:, None] - y_P) >= gap)
    together_PP &= pixels.region_P[:, None] != pixels.region_P
    closest_S = rng.integers(count, size=SETS)
    fits_SP = pixels.z_P >= MARGIN * pixels.z_P[closest_S][:, None]
    for value_P in (y_P, pixels.out_P, pixels.size_P):
        wish_S1 = rng.integers(-1, 2, size=(SETS, 1))  # the closest point is to have the least, any, the largest
        fits_SP &= wish_S1 * (value_P[closest_S][:, None] - value_P) >= 0
    set_SN = np.empty((SETS, n), np.int64)
    set_SN[:, 0] = closest_S
    for k in range(n):
        if k:
            keys_SP = np.where(fits_SP, rng.random(fits_SP.shape, np.float32), 0)
            set_SN[:, k] = keys_SP.argmax(1)
            good_S = keys_SP.max(1) > 0
            set_SN, fits_SP = set_SN[good_S], fits_SP[good_S]
        fits_SP &= together_PP[set_SN[:, k]]
    return set_SN


def _marks(pixels: _Pixels, set_SN: npt.NDArray[np.int64]) -> Floats:
    """How far six blind guesses name the closest point: lowest, highest, least and most central, largest, smallest."""
    y_SN, out_SN, size_SN = pixels.xy_P2[set_SN][..., 1].astype(float), pixels.out_P[set_SN], pixels.size_P[set_SN]
    return np.stack([top_share(g)[:, 0] for g in (y_SN, -y_SN, out_SN, -out_SN, size_SN, -size_SN)], -1)


def draw_points(rgb_HW3: npt.NDArray[np.uint8], points_xy: tuple[tuple[int, int], ...]) -> npt.NDArray[np.uint8]:
    """A copy of the image with a circle at each point and its letter on a white disc beside it."""
    image_HW3 = rgb_HW3.copy()
    scale = max(1, round(min(image_HW3.shape[:2]) / 128))
    for letter, (x, y) in zip(LETTERS, points_xy, strict=False):
        side = 1 if x + 15 * scale < image_HW3.shape[1] else -1
        glyph = np.array([[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in _GLYPHS[letter]], bool)
        glyph = np.pad(glyph.repeat(scale, 0).repeat(scale, 1), 8 * scale)
        rows, columns = (np.arange(n) - n // 2 for n in glyph.shape)
        disc = np.hypot(rows[:, None], columns)
        center = (x + side * 9 * scale, y)
        _paint(image_HW3, center, disc <= 6.2 * scale, (0, 0, 0))
        _paint(image_HW3, center, disc <= 5.4 * scale, (255, 255, 255))
        _paint(image_HW3, center, glyph, (0, 0, 0))
        ring = np.abs(disc - 2.5 * scale)
        _paint(image_HW3, (x, y), ring <= scale, (255, 255, 255))
        _paint(image_HW3, (x, y), ring <= 0.5 * scale, (230, 0, 0))
    return image_HW3


def _paint(
    image_HW3: npt.NDArray[np.uint8], center: tuple[int, int], stencil: npt.NDArray[np.bool_], rgb: tuple[int, int, int]
) -> None:
    rows, columns = np.nonzero(stencil)
    rows, columns = rows + center[1] - stencil.shape[0] // 2, columns + center[0] - stencil.shape[1] // 2
    height, width = image_HW3.shape[:2]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    image_HW3[rows[inside], columns[inside]] = rgb
