"""Where everything is: the room's box, its surfaces, lights, camera, and objects at rest without interpenetration.

Shape legend: T triangles. World axes: x right, y into the room, z up, the floor at z = 0; lengths are metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from perceptio.rooms import furniture
from perceptio.rooms.room import FLOOR, RoomObject

MAX_OBJECTS = 8
PATTERNS = ("plain", "stripes", "checks", "planks", "speckle")
FLOORS = ("planks", "checks", "speckle", "plain")
WALLS = ("plain", "plain", "stripes", "checks")
_CLEAR = 0.03  # gap between neighbours
_FRONTED = frozenset({"chair", "sofa", "bed", "bookcase", "cabinet"})  # these show their front
_TRIES = 30


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. The rows of `axes` are right, down, forward; `tan_half` is half the image's width at 1 m."""

    position: furniture.Floats
    axes: furniture.Floats
    tan_half: float


@dataclass(frozen=True)
class Light:
    """A small round lamp below the ceiling; `radius` softens its shadows."""

    position: furniture.Floats
    strength: float
    radius: float


@dataclass(frozen=True)
class Surface:
    """How the floor, the ceiling or a wall is painted: one of PATTERNS in two tones."""

    pattern: str
    first: furniture.RGB
    second: furniture.RGB
    period: float
    shift: float


@dataclass(frozen=True)
class Placed:
    """An object in the world: its name, its triangles with their base colours, and its bounding box (low, high)."""

    what: RoomObject
    triangles_T33: furniture.Floats
    rgb_T3: furniture.Floats
    low: furniture.Floats
    high: furniture.Floats


@dataclass(frozen=True)
class Layout:
    """A room before it is rendered. `surfaces` are floor, ceiling, and the walls at low x, high x, low y, high y."""

    extent: tuple[float, float, float]  # the room is [0, x] x [0, y] x [0, z]
    surfaces: tuple[Surface, ...]
    camera: Camera
    ambient: float
    lights: tuple[Light, ...]
    objects: tuple[Placed, ...]


@dataclass(frozen=True)
class _Stand:
    """An object's pose, needed to put another on it."""

    center: tuple[float, float]
    yaw: float
    top: furniture.Top | None


def draw(rng: np.random.Generator) -> Layout:
    """A random layout, a pure function of the state of `rng`. Some objects may still be hidden from the camera."""
    extent = (float(rng.uniform(3.6, 6.5)), float(rng.uniform(4.5, 7.5)), float(rng.uniform(2.4, 3.2)))
    camera = _camera(rng, extent)
    lights = tuple(_light(rng, extent) for _ in range(int(rng.integers(1, 3))))
    return Layout(
        extent=extent,
        surfaces=_surfaces(rng),
        camera=camera,
        ambient=float(rng.uniform(0.42, 0.58)),
        lights=tuple(replace(light, strength=light.strength / len(lights)) for light in lights),
        objects=_objects(rng, extent, camera),
    )


def keep(layout: Layout, wanted: set[int]) -> Layout:
    """The layout with only the objects in `wanted`, and those not whose support is gone; indices count from 0 again."""
    new: dict[int, int] = {FLOOR: FLOOR}
    objects: list[Placed] = []
    for placed in layout.objects:  # a support always comes before what rests on it
        what = placed.what
        if what.index in wanted and what.support in new:
            new[what.index] = len(objects)
            objects.append(replace(placed, what=replace(what, index=len(objects), support=new[what.support])))
    return replace(layout, objects=tuple(objects))


def _camera(rng: np.random.Generator, extent: tuple[float, float, float]) -> Camera:
    width, depth, height = extent
    position = (rng.uniform(0.2, 0.8) * width, rng.uniform(0.15, 0.7), rng.uniform(0.8, min(2.1, height - 0.3)))
    target = (rng.uniform(0.3, 0.7) * width, rng.uniform(0.5, 0.75) * depth, rng.uniform(0.0, 0.9))
    forward = np.subtract(target, position)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    roll = rng.normal(0, math.radians(2.5))
    tilted = math.cos(roll) * right + math.sin(roll) * down
    axes = np.stack([tilted, np.cross(forward, tilted), forward])
    tan_half = math.tan(math.radians(rng.uniform(52, 76)) / 2)
    return Camera(np.asarray(position, np.float32), axes.astype(np.float32), tan_half)


def _light(rng: np.random.Generator, extent: tuple[float, float, float]) -> Light:
    width, depth, height = extent
    position = (rng.uniform(0.1, 0.9) * width, rng.uniform(0.05, 0.8) * depth, height - rng.uniform(0.1, 0.5))
    return Light(np.asarray(position, np.float32), float(rng.uniform(0.75, 1.0)), float(rng.uniform(0.03, 0.15)))


def _surfaces(rng: np.random.Generator) -> tuple[Surface, ...]:
    """Muted tones, so that walls and floors are never mistaken for an object's colour."""
    wall, pattern, period = _muted(rng, 0.55, 0.85, 0.12), str(rng.choice(WALLS)), float(rng.uniform(0.25, 0.7))
    darker = _scaled(wall, float(rng.uniform(0.82, 0.93)))
    walls = [Surface(pattern, wall, darker, period, float(rng.uniform(0, 1))) for _ in range(4)]
    if rng.random() < 0.4:  # one wall in another tone
        other = _muted(rng, 0.4, 0.8, 0.18)
        walls[int(rng.integers(4))] = Surface("plain", other, other, 1.0, 0.0)
    pattern = str(rng.choice(FLOORS))
    base = (0.62, 0.46, 0.32) if pattern == "planks" else _muted(rng, 0.4, 0.75, 0.12)
    base = _scaled(base, float(rng.uniform(0.75, 1.15)))
    period = float(rng.uniform(0.12, 0.25) if pattern == "planks" else rng.uniform(0.3, 0.7))
    floor = Surface(pattern, base, _scaled(base, float(rng.uniform(0.72, 0.9))), period, float(rng.uniform(0, 1)))
    ceiling = Surface("plain", (0.86, 0.86, 0.84), (0.86, 0.86, 0.84), 1.0, 0.0)
    return (floor, ceiling, *walls)


def _muted(rng: np.random.Generator, low: float, high: float, tint: float) -> furniture.RGB:
    r, g, b = np.clip(rng.uniform(low, high) + rng.uniform(-tint / 2, tint / 2, 3), 0, 0.95)
    return float(r), float(g), float(b)


def _scaled(rgb: furniture.RGB, by: float) -> furniture.RGB:
    return rgb[0] * by, rgb[1] * by, rgb[2] * by


def _wanted(rng: np.random.Generator) -> list[str]:
    """The kinds to place; more than half of the rooms have several of one kind, so that a name does not pick one."""
    count = int(rng.integers(4, 15))
    weights = np.asarray([2.0 if kind in furniture.THINGS else 1.0 for kind in furniture.KINDS])  # they are hidden more
    kinds = [str(k) for k in rng.choice(furniture.KINDS, size=count, p=weights / weights.sum())]
    if rng.random() < 0.35:
        copies = min(int(rng.integers(2, 5)), count)
        kinds[:copies] = [str(rng.choice(furniture.KINDS))] * copies
    return sorted(kinds, key=lambda kind: kind in furniture.THINGS)  # supports first


def _objects(rng: np.random.Generator, extent: tuple[float, float, float], camera: Camera) -> tuple[Placed, ...]:
    placed: list[Placed] = []
    stands: list[_Stand] = []
    for kind in _wanted(rng):
        color, size = str(rng.choice(list(furniture.COLORS))), str(rng.choice(list(furniture.SIZES)))
        piece = furniture.build(kind, color, size, rng)
        for _ in range(_TRIES):
            support = _support(rng, kind, placed, stands)
            stand, z = _on_floor(rng, kind, extent, camera), 0.0
            if support != FLOOR:
                found = _on_top(rng, piece, stands[support])
                if found is None:
                    continue
                stand, z = found
            triangles = _moved(piece.triangles_T33, stand, z)
            low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
            if _fits(low, high, extent, camera, placed, support):
                what = RoomObject(len(placed), kind, color, size, support)
                placed.append(Placed(what, triangles, piece.rgb_T3, low, high))
                stands.append(replace(stand, top=piece.top if support == FLOOR else None))
                break
        if len(placed) == MAX_OBJECTS:
            break
    return tuple(placed)


def _support(rng: np.random.Generator, kind: str, placed: list[Placed], stands: list[_Stand]) -> int:
    supports = [
        p.what.index for p, s in zip(placed, stands, strict=True) if p.what.kind in furniture.SUPPORTS and s.top
    ]
    on_floor = rng.random() < (0.15 if kind == "mug" else 0.35)
    if kind not in furniture.THINGS or not supports or on_floor:
        return FLOOR
    return int(rng.choice(supports))


def _on_floor(rng: np.random.Generator, kind: str, extent: tuple[float, float, float], camera: Camera) -> _Stand:
    """A pose in front of the camera, even in distance rather than in area: the far end does not get all objects."""
    forward = math.atan2(float(camera.axes[2, 1]), float(camera.axes[2, 0]))
    angle = forward + rng.uniform(-0.9, 0.9) * math.atan(camera.tan_half)
    distance = rng.uniform(1.2, math.hypot(extent[0], extent[1]))
    x = float(camera.position[0]) + distance * math.cos(angle)
    y = float(camera.position[1]) + distance * math.sin(angle)
    yaw = float(rng.uniform(-math.pi, math.pi))
    if kind in _FRONTED:  # turned towards the camera, within 75 degrees
        yaw = angle - math.pi / 2 + float(rng.uniform(-1.3, 1.3))
    elif kind in ("table", "rug"):
        yaw = float(rng.integers(4)) * math.pi / 2 + float(rng.uniform(-0.4, 0.4))
    return _Stand((x, y), yaw, None)


def _on_top(rng: np.random.Generator, piece: furniture.Furniture, below: _Stand) -> tuple[_Stand, float] | None:
    """A pose wholly on the support's top rectangle, or None if the thing is too wide for it."""
    if below.top is None:
        return None
    x0, x1, y0, y1, z = below.top
    turn = float(rng.uniform(-math.pi, math.pi))  # against the support
    turned = _moved(piece.triangles_T33, _Stand((0.0, 0.0), turn, None), 0.0)
    low, high = turned.min(axis=(0, 1)), turned.max(axis=(0, 1))
    if high[0] - low[0] > x1 - x0 or high[1] - low[1] > y1 - y0:
        return None
    u, v = float(rng.uniform(x0 - low[0], x1 - high[0])), float(rng.uniform(y0 - low[1], y1 - high[1]))
    cos, sin = math.cos(below.yaw), math.sin(below.yaw)
    center = (below.center[0] + cos * u - sin * v, below.center[1] + sin * u + cos * v)
    return _Stand(center, below.yaw + turn, None), z


def _moved(triangles_T33: furniture.Floats, stand: _Stand, z: float) -> furniture.Floats:
    cos, sin = math.cos(stand.yaw), math.sin(stand.yaw)
    turn = np.asarray([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)
    return triangles_T33 @ turn.T + np.asarray([*stand.center, z], np.float32)


def _fits(low: furniture.Floats, high: furniture.Floats, extent: tuple[float, float, float], camera: Camera,
          placed: list[Placed], support: int) -> bool:  # fmt: skip
    if low[0] < _CLEAR or low[1] < _CLEAR or (high > np.asarray(extent) - _CLEAR).any():
        return False
    nearest = np.clip(camera.position[:2], low[:2], high[:2])
    if np.hypot(*(camera.position[:2] - nearest)) < 0.7:
        return False
    others = [p for p in placed if p.what.index != support]
    return not any((low < p.high + _CLEAR).all() and (p.low < high + _CLEAR).all() for p in others)
