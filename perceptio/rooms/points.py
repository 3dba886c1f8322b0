"""Lettered points drawn into a room, after HardBLINK: which one is the closest to the camera?

Shape legend: H, W image height and width; P possible pixels; R regions (objects, and bands of the background);
S sets of points tried; N points of a set; M blind guesses.
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
MARGIN = 1.12  # depth of the second closest point over that of the closest
FLAT = 1.04  # largest ratio of depths around a point: no depth edge, no slanting surface seen edge-on
SETS = 1500
PIXELS = 8  # tried per region
_BANDS = 3  # the background is cut into bands by height, so that it can hold more than one point

_GLYPHS = {  # 5 x 7 bitmaps, one row a number
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
}


@dataclass(frozen=True)
class _Pixels:
    """Pixels at which a point may be drawn, grouped by region."""

    xy_P2: npt.NDArray[np.int64]
    z_P: Floats
    size_P: Floats  # visible pixels of the object (or of the background) that the pixel shows
    start_R: npt.NDArray[np.int64]  # first pixel of each region
    count_R: npt.NDArray[np.int64]


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
        found.append(
            Question("points", f"points_{n}", PROMPT, letters[closest], choices=letters, points_xy=points_xy,
                     image_HW3=image_HW3)
        )  # fmt: skip
    return found


def _possible_pixels(room: Room, rng: np.random.Generator) -> _Pixels:
    height, width = room.depth_HW.shape
    region_HW = room.instance_HW.astype(np.int64)
    bands_H = np.arange(height) * _BANDS // height
    region_HW = np.where(region_HW == BACKGROUND, len(room.objects) + bands_H[:, None], region_HW)
    edge, reach = max(2, round(0.06 * min(height, width))), max(1, round(0.012 * min(height, width)))
    inner = region_HW[edge:-edge, edge:-edge]
    order = rng.permutation(inner.size)
    sorted_ = order[np.argsort(inner.ravel()[order], kind="stable")]
    labels = inner.ravel()[sorted_]
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
    y, x = np.divmod(sorted_[rank < PIXELS], inner.shape[1])
    y, x = y + edge, x + edge
    around = np.arange(-reach, reach + 1)
    window = (y[:, None, None] + around[:, None], x[:, None, None] + around[None])
    z_around, same = room.depth_HW[window], room.instance_HW[window] == room.instance_HW[y, x][:, None, None]
    good = same.all((1, 2)) & (z_around.max((1, 2)) <= FLAT * z_around.min((1, 2)))
    y, x = y[good], x[good]
    start_R = np.unique(region_HW[y, x], return_index=True)[1]
    background = (room.instance_HW == BACKGROUND).sum()
    sizes = np.append(np.asarray(room.visible_pixels, np.float64), background)  # index -1 is the background
    count_R = np.diff(np.append(start_R, len(x)))
    z_P = room.depth_HW[y, x].astype(np.float64)
    return _Pixels(np.stack([x, y], -1), z_P, sizes[room.instance_HW[y, x]], start_R, count_R)


def _choose(
    room: Room, rng: np.random.Generator, pixels: _Pixels, n: int
) -> tuple[tuple[tuple[int, int], ...], int] | None:
    """Points in letter order and the place of the closest; the letters are a random order, so each is as likely."""
    height, width = room.depth_HW.shape
    regions = len(pixels.start_R)
    if regions < n:
        return None
    which_SR = pixels.start_R + (rng.random((SETS, regions)) * pixels.count_R).astype(np.int64)
    some_SN = np.argsort(rng.random((SETS, regions)), axis=1)[:, :n]
    set_SN = np.take_along_axis(which_SR, some_SN, axis=1)
    z_SN = np.sort(pixels.z_P[set_SN], axis=1)
    xy_SN2 = pixels.xy_P2[set_SN]
    gap_SNN = np.abs(xy_SN2[:, :, None] - xy_SN2[:, None]).max(-1) + 10 * max(height, width) * np.eye(n, dtype=np.int64)
    keep = (z_SN[:, 1] >= MARGIN * z_SN[:, 0]) & (gap_SNN.min((1, 2)) >= 0.15 * min(height, width))
    set_SN = set_SN[keep]
    if not len(set_SN):
        return None
    closest_S = pixels.z_P[set_SN].argmin(1)
    chosen = draw(rng, _marks(pixels, set_SN, closest_S, (width / 2, height / 2)), np.full(6, 1 / n))
    if chosen is None:
        return None
    order = rng.permutation(n)
    points = tuple((int(x), int(y)) for x, y in pixels.xy_P2[set_SN[chosen]][order])
    return points, int(np.flatnonzero(order == closest_S[chosen])[0])


def _marks(
    pixels: _Pixels,
    set_SN: npt.NDArray[np.int64],
    closest_S: npt.NDArray[np.int64],
    middle_xy: tuple[float, float],
) -> Floats:
    """How far six blind guesses name the closest point: lowest, highest, most and least central, largest, smallest."""
    y_SN = pixels.xy_P2[set_SN][..., 1].astype(np.float64)
    out_SN = np.hypot(*np.moveaxis(pixels.xy_P2[set_SN] - np.asarray(middle_xy), -1, 0))
    size_SN = pixels.size_P[set_SN]
    guesses = (y_SN, -y_SN, -out_SN, out_SN, size_SN, -size_SN)
    return np.stack([np.take_along_axis(top_share(g), closest_S[:, None], 1)[:, 0] for g in guesses], -1)


def draw_points(rgb_HW3: npt.NDArray[np.uint8], points_xy: tuple[tuple[int, int], ...]) -> npt.NDArray[np.uint8]:
    """A copy of the image with a circle at each point and its letter on a white disc beside it."""
    image_HW3 = rgb_HW3.copy()
    height, width = image_HW3.shape[:2]
    scale = max(1, round(min(height, width) / 160))
    radius = 2.5 * scale
    yy, xx = np.mgrid[:height, :width]
    for letter, (x, y) in zip(LETTERS, points_xy, strict=False):
        far = np.hypot(xx - x, yy - y)
        image_HW3[(far <= radius + scale) & (far > radius - scale)] = 255
        image_HW3[np.abs(far - radius) <= 0.5 * scale] = (230, 0, 0)
        side = 1 if x + 13 * scale < width else -1
        cx, cy = x + side * 9 * scale, y
        image_HW3[np.hypot(xx - cx, yy - cy) <= 5.4 * scale] = 0
        image_HW3[np.hypot(xx - cx, yy - cy) <= 4.6 * scale] = 255
        glyph = np.array([[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in _GLYPHS[letter]], bool)
        glyph = glyph.repeat(scale, 0).repeat(scale, 1)
        top, left = cy - glyph.shape[0] // 2, cx - glyph.shape[1] // 2
        rows, columns = np.nonzero(glyph)
        inside = (rows + top >= 0) & (rows + top < height) & (columns + left >= 0) & (columns + left < width)
        image_HW3[rows[inside] + top, columns[inside] + left] = 0
    return image_HW3
