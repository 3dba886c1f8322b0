"""A room's exact picture: colour, metric depth and object ids, by ray casting with Embree. No OpenGL, no assets.

Shape legend: H, W image height and width in pixels, R rays, T triangles.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from perceptio.rooms import layout as layouts
from perceptio.rooms.furniture import Floats
from perceptio.rooms.layout import Camera, Layout, Light, Surface
from perceptio.rooms.room import BACKGROUND, Room

PROBE_SIZE = (
    96  # visibility is judged at this size whatever the picture's, so that the layout is the same at every size
)
MIN_SHARE = 0.004  # of the probe's pixels, for every object
MIN_OBJECTS, MAX_ATTEMPTS = 3, 50
MIN_UNCOVERED = 0.45  # visible share of an object's whole outline: less is mostly hidden or cut off
_NEAR = 0.3  # nothing nearer counts as in front of the camera
_LIFT = 2e-3  # shadow rays start this far off their surface, in metres
_STRATA = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))  # four colour samples per pixel

Ints = npt.NDArray[np.int32]


def render_room(seed: int, index: int, size: int) -> Room:
    """The room number `index` of `seed`, `size` pixels square; pure, and the same scene at every size.

    Depth is exact at pixel centres, in metres along the viewing axis. Raises ValueError for a size below 16 or a
    negative seed or index, RuntimeError if no layout with MIN_OBJECTS visible objects is found.
    """
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16 pixels: pass a larger size")
    scene = settled_scene(seed, index)
    layout = scene.layout
    rays_R3 = camera_rays(layout.camera, size)
    triangle_R, depth_R = scene.hit(rays_R3)
    light_R3 = np.zeros_like(rays_R3)
    for number, offset in enumerate(_STRATA):
        light_R3 += scene.shade(camera_rays(layout.camera, size, offset), number)
    rgb_R3 = np.clip(light_R3 / len(_STRATA), 0, 1) ** (1 / 1.15)
    return Room(
        seed=seed,
        index=index,
        rgb_HW3=np.rint(255 * rgb_R3).astype(np.uint8).reshape(size, size, 3),
        depth_HW=depth_R.reshape(size, size),
        instance_HW=scene.owner_T[triangle_R].reshape(size, size),
        objects=tuple(placed.what for placed in layout.objects),
    )


def settled_scene(seed: int, index: int) -> Scene:
    """The scene of (seed, index), every object mostly visible: others are taken out, or the layout is drawn again."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed, index are {seed}, {index}, expected numbers from 0 on")
    rng = np.random.default_rng((seed, index))
    for _ in range(MAX_ATTEMPTS):
        scene = Scene(layouts.draw(rng))
        seen = scene.clearly_seen()
        while len(seen) < len(scene.layout.objects):  # taking one out can bare or orphan another, so look again
            scene = Scene(layouts.keep(scene.layout, seen))
            seen = scene.clearly_seen()
        if len(seen) >= MIN_OBJECTS:
            return scene
    raise RuntimeError(f"no room with {MIN_OBJECTS} visible objects for seed {seed}, index {index}: use another index")


def camera_rays(camera: Camera, size: int, offset: tuple[float, float] = (0.0, 0.0)) -> Floats:
    """Rays (R, 3) through the pixels in row order, their forward part 1, so that hit distances are depths."""
    step = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - np.float32(1)
    return _rays(camera, step + np.float32(2 * offset[0] / size), step + np.float32(2 * offset[1] / size))


def _rays(camera: Camera, x_W: Floats, y_H: Floats) -> Floats:
    """Rays through a grid of image positions, -1 to 1 from edge to edge of the picture."""
    across, down = x_W * np.float32(camera.tan_half), y_H * np.float32(camera.tan_half)
    right, below, forward = camera.axes
    rays_HW3 = across[None, :, None] * right + down[:, None, None] * below + forward
    return np.ascontiguousarray(rays_HW3.reshape(-1, 3), dtype=np.float32)


class Scene:
    """A layout's triangles in one Embree scene: the room's box first, then the objects in order."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        shell_T33 = _shell(layout.extent)
        pieces = layout.objects
        triangles_T33 = np.concatenate([shell_T33, *(p.triangles_T33 for p in pieces)]).astype(np.float32)
        counts = [len(shell_T33), *(len(p.triangles_T33) for p in pieces)]
        self.owner_T = np.repeat(np.arange(BACKGROUND, len(pieces), dtype=np.int16), counts)
        self.rgb_T3 = np.concatenate([np.zeros((len(shell_T33), 3), np.float32), *(p.rgb_T3 for p in pieces)])
        normals_T3 = np.cross(triangles_T33[:, 1] - triangles_T33[:, 0], triangles_T33[:, 2] - triangles_T33[:, 0])
        lengths_T1 = np.linalg.norm(normals_T3, axis=1, keepdims=True)
        self.normals_T3 = (normals_T3 / np.maximum(lengths_T1, 1e-12)).astype(np.float32)
        self.embree = EmbreeScene()
        self.mesh = TriangleMesh(self.embree, triangles_T33)

    def hit(self, rays_R3: Floats) -> tuple[Ints, Floats]:
        """Triangle and depth for each camera ray. Raises RuntimeError if a ray leaves the closed room."""
        origins_R3 = np.broadcast_to(self.layout.camera.position, rays_R3.shape).copy()
        found = self.embree.run(origins_R3, rays_R3, query="INTERSECT", output=True)
        triangle_R: Ints = found["primID"]
        if (triangle_R < 0).any():
            raise RuntimeError(f"{int((triangle_R < 0).sum())} rays left the room: its walls must be closed")
        return triangle_R, found["tfar"]

    def clearly_seen(self) -> set[int]:
        """Indices of the objects that fill MIN_SHARE of the picture and are neither mostly hidden nor cut off."""
        triangle_R, _ = self.hit(camera_rays(self.layout.camera, PROBE_SIZE))
        instance_HW = self.owner_T[triangle_R].reshape(PROBE_SIZE, PROBE_SIZE)
        seen = set()
        for index, placed in enumerate(self.layout.objects):
            visible = np.count_nonzero(instance_HW == index)
            if visible < MIN_SHARE * PROBE_SIZE**2:
                continue
            if visible >= MIN_UNCOVERED * _outline(self.layout.camera, placed.triangles_T33):
                seen.add(index)
        return seen

    def shade(self, rays_R3: Floats, number: int) -> Floats:
        """Colour (R, 3) for each camera ray: Lambert under each light, shadows, and ambient light from above.

        `number` picks the point of each lamp that is sampled: several numbers together give soft shadows.
        """
        triangle_R, depth_R = self.hit(rays_R3)
        points_R3 = self.layout.camera.position + rays_R3 * depth_R[:, None]
        normals_R3 = self.normals_T3[triangle_R]
        facing_R = np.einsum("ij,ij->i", normals_R3, rays_R3)
        normals_R3 *= np.where(facing_R > 0, np.float32(-1), np.float32(1))[:, None]
        light_R = self.layout.ambient * (np.float32(0.8) + np.float32(0.2) * normals_R3[:, 2])
        starts_R3 = points_R3 + normals_R3 * np.float32(_LIFT)
        for light in self.layout.lights:
            light_R += self._lit(light, number, starts_R3, normals_R3)
        rgb_R3 = self.rgb_T3[triangle_R]
        for face, surface in enumerate(self.layout.surfaces):
            on = np.flatnonzero(triangle_R == face)
            rgb_R3[on] = _painted(surface, points_R3[on], face)
        shaded_R3: Floats = rgb_R3 * light_R[:, None]
        return shaded_R3

    def _lit(self, light: Light, number: int, starts_R3: Floats, normals_R3: Floats) -> Floats:
        angle = np.pi * (0.25 + 0.5 * number)
        shift = light.radius * np.asarray([np.cos(angle), np.sin(angle), 0])
        towards_R3 = (light.position + shift).astype(np.float32) - starts_R3
        distance_R = np.sqrt(np.einsum("ij,ij->i", towards_R3, towards_R3))
        cosine_R = np.einsum("ij,ij->i", normals_R3, towards_R3) / distance_R
        strength_R: Floats = (
            np.float32(light.strength) * np.maximum(cosine_R, 0) / (1 + np.float32(0.02) * distance_R**2)
        )
        turned = np.flatnonzero(cosine_R > 0)
        reach = np.full(len(turned), 0.999, np.float32)
        blocked = self.embree.run(starts_R3[turned], towards_R3[turned], reach, query="OCCLUDED") >= 0
        strength_R[turned[blocked]] = 0
        return strength_R


def _shell(extent: tuple[float, float, float]) -> Floats:
    """The room's box in the order of `Layout.surfaces`, as one oversized triangle per face: no seam can leak a ray."""
    faces = []
    for axis in (2, 0, 1):
        for side in (0, 1):
            corners = np.full((3, 3), side, np.float32)
            corners[:, [a for a in range(3) if a != axis]] = [(-1, -1), (4, -1), (-1, 4)]
            faces.append(corners)
    return np.stack(faces) * np.asarray(extent, np.float32)


def _outline(camera: Camera, triangles_T33: Floats) -> int:
    """Probe pixels that the object would fill if nothing hid it and the picture did not end."""
    local = (triangles_T33.reshape(-1, 3) - camera.position) @ camera.axes.T
    xy = local[:, :2] / np.maximum(local[:, 2:], _NEAR) / camera.tan_half
    first, last = np.clip([xy.min(axis=0), xy.max(axis=0)], -3, 3)
    pixel = 2 / PROBE_SIZE
    start = (np.floor(first / pixel) + 0.5) * pixel  # on the probe's own grid
    x_W, y_H = (np.arange(start[k], last[k] + pixel, pixel, dtype=np.float32) for k in (0, 1))
    rays_R3 = _rays(camera, x_W, y_H)
    alone = EmbreeScene()
    mesh = TriangleMesh(alone, triangles_T33)
    hits = alone.run(np.broadcast_to(camera.position, rays_R3.shape).copy(), rays_R3, query="OCCLUDED") >= 0
    del mesh  # it had to live until here
    return int(np.count_nonzero(hits))


def _painted(surface: Surface, points_R3: Floats, face: int) -> Floats:
    """The colour of a painted surface at points on it."""
    across, along = ((0, 1), (0, 1), (1, 2), (1, 2), (0, 2), (0, 2))[face]
    u = points_R3[:, across] / surface.period + surface.shift
    v = points_R3[:, along] / surface.period + surface.shift
    if surface.pattern == "stripes":
        mix = np.floor(2 * u) % 2
    elif surface.pattern == "checks":
        mix = (np.floor(u) + np.floor(v)) % 2
    elif surface.pattern == "planks":
        row = np.floor(u)
        board = _noise(row, np.floor(v / 7 + _noise(row, row)))
        mix = 0.75 * board + 0.25 * (np.mod(u, 1) < 0.08)
    elif surface.pattern == "speckle":
        mix = _noise(np.floor(12 * u), np.floor(12 * v))
    else:
        mix = np.zeros_like(u)
    first, second = np.asarray(surface.first, np.float32), np.asarray(surface.second, np.float32)
    painted_R3: Floats = first + mix.astype(np.float32)[:, None] * (second - first)
    return painted_R3


def _noise(a: Floats, b: Floats) -> Floats:
    """Repeatable noise in [0, 1) from whole numbers."""
    return np.mod(np.sin(a * np.float32(12.9898) + b * np.float32(78.233)) * np.float32(43758.547), 1)
