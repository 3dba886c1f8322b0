"""The kinds of furniture: parametric meshes, their colours, sizes, and what may stand on what.

Shape legend: T triangles. A piece stands on z = 0 around the origin, z up, its front towards -y; lengths are metres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import trimesh

Floats = npt.NDArray[np.float32]
RGB = tuple[float, float, float]
Top = tuple[float, float, float, float, float]  # x0, x1, y0, y1, z of a level rectangle

COLORS: dict[str, RGB] = {
    "red": (0.80, 0.07, 0.07),
    "orange": (0.98, 0.47, 0.04),
    "yellow": (0.97, 0.86, 0.10),
    "green": (0.10, 0.55, 0.16),
    "blue": (0.10, 0.26, 0.82),
    "purple": (0.50, 0.13, 0.66),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.06),
}
SIZES: dict[str, float] = {"small": 0.75, "large": 1.25}  # scale of the nominal piece
SIZE_JITTER = 0.04  # the classes stay far apart: 0.78 < 1.20

_WOOD: RGB = (0.45, 0.31, 0.19)
_DARK: RGB = (0.16, 0.15, 0.15)
_METAL: RGB = (0.62, 0.62, 0.64)
_LINEN: RGB = (0.88, 0.86, 0.82)


@dataclass(frozen=True)
class Furniture:
    """One piece: triangles, the base colour of each, and the level rectangle on which things may rest."""

    triangles_T33: Floats
    rgb_T3: Floats
    top: Top | None


class _Parts:
    """Collects the parts of one piece, each a transformed trimesh primitive in one colour."""

    def __init__(self, rng: np.random.Generator, rgb: RGB) -> None:
        self.rng, self.rgb = rng, rgb
        self.triangles: list[Floats] = []
        self.colors: list[Floats] = []

    def vary(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def add(self, triangles_T33: Floats, rgb: RGB | None) -> None:
        self.triangles.append(triangles_T33)
        self.colors.append(np.tile(np.asarray(rgb or self.rgb, np.float32), (len(triangles_T33), 1)))

    def box(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], rgb: RGB | None = None
    ) -> None:
        low, high = _point(x[0], y[0], z[0]), _point(x[1], y[1], z[1])
        self.add(low + _unit_box() * (high - low), rgb)

    def turned(self, profile: list[tuple[float, float]], rgb: RGB | None = None, at: RGB = (0, 0, 0)) -> None:
        """Adds a turned part: `profile` lists (radius, z) from bottom to top."""
        self.add(_turned(tuple(profile)) + _point(*at), rgb)

    def legs(self, x: float, y: float, z: float, thick: float, rgb: RGB | None = None) -> None:
        for sx in (-1, 1):
            for sy in (-1, 1):
                cx, cy = sx * (x - thick / 2), sy * (y - thick / 2)
                self.box((cx - thick / 2, cx + thick / 2), (cy - thick / 2, cy + thick / 2), (0, z), rgb)


def _point(x: float, y: float, z: float) -> Floats:
    return np.asarray((x, y, z), np.float32)


@lru_cache(maxsize=1)
def _unit_box() -> Floats:
    return np.asarray(trimesh.creation.box(extents=(1, 1, 1)).triangles + 0.5, np.float32)


@lru_cache(maxsize=1)
def _unit_sphere() -> Floats:
    return np.asarray(trimesh.creation.icosphere(subdivisions=3).triangles, np.float32)


@lru_cache(maxsize=1)
def _handle() -> Floats:
    ring = trimesh.creation.torus(0.07, 0.018, major_sections=20, minor_sections=10)
    return np.asarray(ring.triangles, np.float32)[:, :, [0, 2, 1]]  # stands upright in the x-z plane


def _turned(profile: tuple[tuple[float, float], ...]) -> Floats:
    return np.asarray(trimesh.creation.revolve(np.asarray(profile), sections=28).triangles, np.float32)


def _table(p: _Parts) -> Top:
    w, d, h, thick = p.vary(0.52, 0.66), p.vary(0.36, 0.44), p.vary(0.62, 0.70), p.vary(0.04, 0.07)
    leg = _WOOD if p.rng.random() < 0.3 else None
    if p.rng.random() < 0.3:  # round, on one foot
        r = (w + d) / 2
        p.turned([(0, h - thick), (r, h - thick), (r, h), (0, h)])
        p.turned([(0, 0), (0.28, 0), (0.28, 0.03), (0.05, 0.06), (0.05, h - thick)], leg)
        return (-0.68 * r, 0.68 * r, -0.68 * r, 0.68 * r, h)
    p.box((-w, w), (-d, d), (h - thick, h))
    p.legs(w - 0.02, d - 0.02, h - thick, p.vary(0.05, 0.10), leg)
    return (-w, w, -d, d, h)


def _chair(p: _Parts) -> Top:
    w, seat, back, leg = p.vary(0.21, 0.25), p.vary(0.42, 0.47), p.vary(0.85, 1.0), p.vary(0.035, 0.055)
    p.legs(w, w, seat - 0.05, leg, _WOOD if p.rng.random() < 0.3 else None)
    p.box((-w, w), (-w, w), (seat - 0.05, seat))
    if p.rng.random() < 0.5:  # a solid back, or slats between two posts
        p.box((-w, w), (w - 0.045, w), (seat, back))
    else:
        for x in (-w, w - leg):
            p.box((x, x + leg), (w - leg, w), (seat, back))
        for z in np.linspace(seat + 0.14, back - 0.1, 3):
            p.box((-w + leg, w - leg), (w - 0.035, w - 0.01), (float(z), float(z) + 0.1))
    return (-w, w, -w, w - 0.06, seat)


def _stool(p: _Parts) -> Top:
    r, h = p.vary(0.20, 0.24), p.vary(0.46, 0.54)
    p.turned([(0, h - 0.06), (r, h - 0.06), (r, h), (0, h)])
    inner = r * 0.68
    p.legs(inner, inner, h - 0.06, p.vary(0.035, 0.05), _WOOD if p.rng.random() < 0.5 else _METAL)
    z = h * 0.35
    for y in (-inner, inner - 0.03):
        p.box((-inner + 0.01, inner - 0.01), (y + 0.002, y + 0.028), (z, z + 0.03), _WOOD)
    return (-0.85 * r, 0.85 * r, -0.85 * r, 0.85 * r, h)


def _sofa(p: _Parts) -> Top:
    w, d, seat, back, arm = p.vary(0.75, 0.9), 0.4, p.vary(0.38, 0.42), p.vary(0.74, 0.84), p.vary(0.14, 0.2)
    p.box((-w, w), (-d, d), (0.07, seat - 0.13))
    p.legs(w - 0.04, d - 0.04, 0.08, 0.06, _DARK)
    p.box((-w, w), (d - 0.2, d + 0.001), (seat - 0.13, back))
    for x in (-w, w - arm):
        p.box((x, x + arm), (-d, d - 0.2), (seat - 0.13, seat + 0.18))
    count = int(p.rng.integers(2, 4))
    edges = np.linspace(-w + arm, w - arm, count + 1)
    for x0, x1 in pairwise(edges):  # seat cushions, with gaps that draw their outline
        p.box((float(x0) + 0.01, float(x1) - 0.01), (-d - 0.02, d - 0.2), (seat - 0.12, seat))
        p.box((float(x0) + 0.015, float(x1) - 0.015), (d - 0.3, d - 0.2), (seat + 0.01, back - 0.06))
    return (-w + arm, w - arm, -d, d - 0.31, seat)


def _bed(p: _Parts) -> Top:
    w, d, h, head = p.vary(0.55, 0.72), p.vary(0.9, 1.0), p.vary(0.40, 0.48), p.vary(0.75, 0.95)
    p.box((-w - 0.03, w + 0.03), (-d, d), (0.12, 0.24), _WOOD)
    p.legs(w, d - 0.02, 0.13, 0.08, _WOOD)
    p.box((-w - 0.04, w + 0.04), (d, d + 0.07), (0, head), _WOOD if p.rng.random() < 0.5 else None)
    p.box((-w, w), (-d + 0.02, d), (0.24, h - 0.03), _LINEN)
    p.box((-w - 0.02, w + 0.02), (-d, d - 0.55), (0.22, h))  # the blanket carries the colour
    pillows = [(-w + 0.06, w - 0.06)] if w < 0.6 else [(-w + 0.05, -0.03), (0.03, w - 0.05)]
    for x in pillows:
        p.box(x, (d - 0.42, d - 0.06), (h - 0.03, h + 0.09), _LINEN)
    return (-w, w, -d, d - 0.6, h)


def _bookcase(p: _Parts) -> Top:
    w, d, h, side = p.vary(0.38, 0.5), p.vary(0.14, 0.18), p.vary(1.35, 1.6), 0.035
    for x in (-w, w - side):
        p.box((x, x + side), (-d, d), (0, h))
    p.box((-w + side, w - side), (d - 0.02, d), (0, h))
    count = int(p.rng.integers(4, 6))
    levels = np.linspace(0.04, h - side, count)
    for z in levels:
        p.box((-w + side, w - side), (-d, d - 0.02), (float(z), float(z) + side))
    gap = float(levels[1] - levels[0]) - side
    for z in levels[:-1]:
        x = -w + side
        while x < (w - side) * p.vary(0.2, 1.0):
            thick = p.vary(0.035, 0.07)
            if x + thick > w - side:
                break
            tone = p.vary(0.25, 0.75)
            z0, z1 = float(z) + side, float(z) + side + gap * p.vary(0.6, 0.9)
            p.box((x, x + thick - 0.006), (-d + 0.05, d - 0.03), (z0, z1), (tone, tone * 0.92, tone * 0.82))
            x += thick
    return (-w, w, -d, d, h)


def _cabinet(p: _Parts) -> Top:
    w, d, h = p.vary(0.42, 0.55), p.vary(0.22, 0.27), p.vary(0.7, 0.85)
    p.box((-w, w), (-d, d), (0.08, h))
    p.legs(w - 0.03, d - 0.03, 0.09, 0.06, _DARK)
    rows, columns = [(1, 2), (3, 1), (3, 2)][int(p.rng.integers(3))]
    for i in range(columns):
        for j in range(rows):  # dark seams and knobs make doors and drawers
            x0, x1 = -w + 2 * w * i / columns, -w + 2 * w * (i + 1) / columns
            z0, z1 = 0.08 + (h - 0.11) * j / rows, 0.08 + (h - 0.11) * (j + 1) / rows
            p.box((x0 + 0.012, x1 - 0.012), (-d - 0.004, -d), (z0 + 0.012, z1 - 0.012), _DARK)
            p.box((x0 + 0.024, x1 - 0.024), (-d - 0.02, -d), (z0 + 0.024, z1 - 0.024))
            x = (x0 + x1) / 2 if rows > 1 else (x1 - 0.09 if i == 0 else x0 + 0.09)
            z = (z0 + z1) / 2
            p.box((x - 0.03, x + 0.03), (-d - 0.05, -d - 0.02), (z - 0.02, z + 0.02), _METAL)
    return (-w, w, -d, d, h)


def _lamp(p: _Parts) -> None:
    r, h, shade = p.vary(0.17, 0.21), p.vary(0.52, 0.60), p.vary(0.22, 0.27)
    rod = _METAL if p.rng.random() < 0.5 else _DARK
    p.turned([(0, 0), (0.12, 0), (0.12, 0.025), (0.018, 0.045), (0.018, h - 0.04), (0, h - 0.04)], rod)
    p.turned([(r, h - shade), (r * p.vary(0.45, 0.7), h)])
    p.turned([(0, h - 0.03), (r * 0.4, h - 0.03)])


def _vase(p: _Parts) -> None:
    h, belly, neck = p.vary(0.38, 0.46), p.vary(0.12, 0.15), p.vary(0.04, 0.06)
    z = np.linspace(0, 1, 15)
    swell = np.sin(np.pi * np.clip(z / 0.75, 0, 1)) ** 1.2
    radius = neck + (belly - neck) * swell + 0.03 * np.clip(z - 0.8, 0, 1) / 0.2 + 0.02 * (1 - z)
    outer = [(float(r), float(v) * h) for r, v in zip(radius, z, strict=True)]
    p.turned([(0, 0), *outer])
    p.turned([(outer[-1][0] - 0.012, h - 0.001), (neck * 0.8, h * 0.75), (0, h * 0.7)], _DARK)


def _ball(p: _Parts) -> None:
    r = p.vary(0.17, 0.19)
    p.add(_unit_sphere() * np.float32(r) + _point(0, 0, r), None)


def _box(p: _Parts) -> Top:
    w, d, h, t = p.vary(0.19, 0.24), p.vary(0.17, 0.21), p.vary(0.28, 0.36), 0.012
    p.box((-w, w), (-d, d), (0, h))
    p.box((-0.03, 0.03), (-d - 0.003, d + 0.003), (0.001, h + 0.003), (0.75, 0.62, 0.42))  # a strip of tape
    p.box((-w - t, w + t), (-d - t, d + t), (h - 0.07, h - 0.001))
    return (-w, w, -d, d, h + 0.003)


def _mug(p: _Parts) -> None:
    r, h = p.vary(0.10, 0.12), p.vary(0.24, 0.28)
    p.turned([(0, 0), (r, 0), (r, h), (r - 0.014, h), (r - 0.014, h * 0.82)])
    p.turned([(0, h * 0.8), (r - 0.013, h * 0.8)], (0.22, 0.12, 0.06))
    side = 1.0 if p.rng.random() < 0.5 else -1.0
    p.add(_handle() + _point(side * (r + 0.035), 0, h / 2), None)


def _cone(p: _Parts) -> None:
    r, h = p.vary(0.12, 0.14), p.vary(0.44, 0.5)
    p.box((-r - 0.05, r + 0.05), (-r - 0.05, r + 0.05), (0, 0.03))
    p.turned([(r, 0.03), (0.02, h), (0, h)])
    z0, z1 = p.vary(0.35, 0.45), p.vary(0.58, 0.68)  # the band of a traffic cone
    band = [(r + (0.02 - r) * (z * h - 0.03) / (h - 0.03) + 0.004, z * h) for z in (z0, z1)]
    p.turned(band, _DARK if p.rgb == COLORS["white"] else _LINEN)


def _rug(p: _Parts) -> Top:
    w, d, edge = p.vary(0.7, 0.85), p.vary(0.48, 0.6), p.vary(0.06, 0.1)
    p.box((-w, w), (-d, d), (0, 0.012))
    trim = _DARK if p.rgb == COLORS["white"] else _LINEN
    for s in (-1, 1):
        x = s * (w - edge)
        p.box((x - 0.02, x + 0.02), (-d + edge, d - edge), (0, 0.014), trim)
        y = s * (d - edge)
        p.box((-w + edge, w - edge), (y - 0.02, y + 0.02), (0, 0.014), trim)
    return (-w, w, -d, d, 0.015)


_BUILDERS: dict[str, Callable[[_Parts], Top | None]] = {
    "table": _table, "chair": _chair, "stool": _stool, "sofa": _sofa, "bed": _bed, "bookcase": _bookcase,
    "cabinet": _cabinet, "lamp": _lamp, "vase": _vase, "ball": _ball, "box": _box, "mug": _mug, "cone": _cone,
    "rug": _rug,
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(_BUILDERS)
SUPPORTS = frozenset(
    {"table", "chair", "stool", "sofa", "bed", "cabinet", "box", "rug"}
)  # other things may rest on these
THINGS = frozenset({"lamp", "vase", "ball", "box", "mug", "cone"})  # these may rest on a support


def build(kind: str, color: str, size: str, rng: np.random.Generator) -> Furniture:
    """A piece of furniture in a random style; a pure function of its arguments and the state of `rng`.

    Raises KeyError if `kind`, `color` or `size` is not one of KINDS, COLORS, SIZES.
    """
    parts = _Parts(rng, COLORS[color])
    top = _BUILDERS[kind](parts)
    scale = SIZES[size] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    triangles_T33 = np.concatenate(parts.triangles) * np.float32(scale)
    x0, x1, y0, y1, z = (scale * v for v in top or (0, 0, 0, 0, 0))
    return Furniture(triangles_T33, np.concatenate(parts.colors), (x0, x1, y0, y1, z) if top else None)
