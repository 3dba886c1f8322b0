"""Rooms are exact, closed, repeatable pictures of objects at rest that can all be seen."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from perceptio.rooms import furniture, layout
from perceptio.rooms.render import MIN_OBJECTS, MIN_SHARE, MIN_UNCOVERED, Scene, camera_rays, render_room, settled_scene
from perceptio.rooms.room import BACKGROUND, FLOOR, Room, RoomObject

SEED, SIZE = 11, 128
ROOMS = range(24)


@cache
def room(index: int) -> Room:
    return render_room(SEED, index, SIZE)


@cache
def scene(index: int) -> Scene:
    return settled_scene(SEED, index)


def objects_of(index: int) -> list[RoomObject]:
    return [placed.what for placed in scene(index).layout.objects]


def world_points(index: int) -> np.ndarray:
    """Where each pixel's surface is, from the depth map and the camera alone."""
    camera = scene(index).layout.camera
    return camera.position + camera_rays(camera, SIZE) * room(index).depth_HW.reshape(-1, 1)


def test_the_same_seed_and_index_give_the_same_bytes():
    again = render_room(SEED, 0, SIZE)
    assert again.objects == room(0).objects
    for name in ("rgb_HW3", "depth_HW", "instance_HW"):
        assert getattr(again, name).tobytes() == getattr(room(0), name).tobytes()


@pytest.mark.parametrize(("seed", "index"), [(SEED, 1), (SEED + 1, 0)])
def test_another_index_or_seed_gives_another_room(seed: int, index: int):
    other = render_room(seed, index, SIZE)
    assert (other.depth_HW != room(0).depth_HW).mean() > 0.9


def test_the_same_room_at_another_size_is_the_same_scene():
    for index in range(4):
        small, large = render_room(SEED, index, 48), render_room(SEED, index, 144)
        assert small.objects == large.objects == room(index).objects
        centres = large.instance_HW[1::3, 1::3], large.depth_HW[1::3, 1::3]  # every third pixel is on the same ray
        assert (centres[0] == small.instance_HW).mean() > 0.995
        assert np.median(np.abs(centres[1] - small.depth_HW)) < 1e-4


def test_arrays_have_the_promised_shapes_types_and_ranges():
    for index in ROOMS:
        got = room(index)
        assert (got.rgb_HW3.shape, got.rgb_HW3.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (got.depth_HW.shape, got.depth_HW.dtype) == ((SIZE, SIZE), np.float32)
        assert (got.instance_HW.shape, got.instance_HW.dtype) == ((SIZE, SIZE), np.int16)
        assert np.isfinite(got.depth_HW).all() and got.depth_HW.min() > 0.3 and got.depth_HW.max() < 11


def test_depth_puts_every_pixel_on_its_own_surface():
    for index in ROOMS:
        points_R3, instance_R = world_points(index), room(index).instance_HW.ravel()
        extent = np.asarray(scene(index).layout.extent)
        walls_R3 = points_R3[instance_R == BACKGROUND]
        to_wall_R = np.minimum(np.abs(walls_R3), np.abs(walls_R3 - extent)).min(axis=1)
        assert to_wall_R.max() < 1e-3
        for placed in scene(index).layout.objects:
            mine_R3 = points_R3[instance_R == placed.what.index]
            assert (mine_R3 > placed.low - 1e-3).all() and (mine_R3 < placed.high + 1e-3).all()


def test_every_object_is_listed_once_and_clearly_visible():
    for index in ROOMS:
        got = room(index)
        assert MIN_OBJECTS <= len(got.objects) <= layout.MAX_OBJECTS
        assert [o.index for o in got.objects] == list(range(len(got.objects)))
        assert set(np.unique(got.instance_HW)) - {BACKGROUND} == set(range(len(got.objects)))
        assert min(got.visible_pixels) / SIZE**2 > 0.7 * MIN_SHARE  # the floor is exact at the probe's size


def test_no_object_is_mostly_hidden_by_others():
    for index in range(8):
        whole = scene(index)
        for placed in whole.layout.objects:
            alone = Scene(layout.keep(replace(whole.layout, objects=(unsupported(placed),)), {placed.what.index}))
            triangle_R, _ = alone.hit(camera_rays(whole.layout.camera, SIZE))
            bare = np.count_nonzero(alone.owner_T[triangle_R] == 0)
            assert room(index).visible_pixels[placed.what.index] > 0.9 * MIN_UNCOVERED * bare


def unsupported(placed: layout.Placed) -> layout.Placed:
    return replace(placed, what=replace(placed.what, support=FLOOR))


def test_kinds_colors_and_sizes_are_of_the_lists_and_supports_allowed():
    assert len(furniture.KINDS) >= 12
    for index in ROOMS:
        objects = room(index).objects
        for thing in objects:
            assert thing.kind in furniture.KINDS and thing.color in furniture.COLORS and thing.size in furniture.SIZES
            if thing.support != FLOOR:
                assert thing.support < thing.index
                assert thing.kind in furniture.THINGS and objects[thing.support].kind in furniture.SUPPORTS


def test_objects_rest_on_the_floor_or_right_on_their_support():
    on_support = 0
    for index in ROOMS:
        whole = scene(index).layout
        for placed in whole.objects:
            what = placed.what
            if what.support == FLOOR:
                assert abs(float(placed.low[2])) < 1e-5
                continue
            on_support += 1
            below = Scene(layout.keep(whole, {what.index - k for k in range(1, what.index + 1)}))
            start = np.append((placed.low[:2] + placed.high[:2]) / 2, placed.low[2] + 0.005).astype(np.float32)
            found = below.embree.run(start[None], np.float32([[0, 0, -1]]), query="INTERSECT", output=True)
            assert below.owner_T[found["primID"][0]] == what.support
            assert found["tfar"][0] < 0.02
    assert on_support > 10


def test_neighbours_do_not_run_into_each_other():
    for index in ROOMS:
        for a, b in combinations(scene(index).layout.objects, 2):
            if a.what.index != b.what.support:
                assert (a.low >= b.high).any() or (b.low >= a.high).any()


def test_colours_are_still_recognisable_in_the_picture():
    """Red is redder than it is green or blue after lighting, and so on: the median pixel has its name's hue."""
    checks = {
        "red": lambda r, g, b: r > 2 * max(g, b),
        "green": lambda r, g, b: g > 1.5 * max(r, b),
        "blue": lambda r, g, b: b > 1.5 * max(r, g),
        "yellow": lambda r, g, b: min(r, g) > 2 * b,
        "white": lambda r, g, b: min(r, g, b) > 75,
        "black": lambda r, g, b: max(r, g, b) < 60,
    }
    right = []
    for index in ROOMS:
        for thing in room(index).objects:
            if thing.color in checks and thing.kind in ("table", "sofa", "ball", "vase", "cabinet", "rug"):
                pixels = room(index).rgb_HW3[room(index).instance_HW == thing.index]
                right.append(checks[thing.color](*np.median(pixels, axis=0)))
    assert len(right) > 20 and np.mean(right) > 0.95


def test_the_two_sizes_of_a_kind_never_overlap():
    rng = np.random.default_rng(0)
    for kind in furniture.KINDS:
        volume = {}
        for size in furniture.SIZES:
            pieces = [furniture.build(kind, "red", size, rng).triangles_T33 for _ in range(30)]
            volume[size] = [float(np.prod(np.ptp(p.reshape(-1, 3), axis=0))) for p in pieces]
        assert max(volume["small"]) < min(volume["large"])


def test_many_rooms_have_several_of_a_kind_and_things_on_things():
    names = [Counter(o.kind for o in objects_of(index)) for index in ROOMS]
    assert 0.35 < np.mean([max(count.values()) > 1 for count in names]) < 0.9
    assert np.mean([any(o.support != FLOOR for o in objects_of(i)) for i in ROOMS]) > 0.4


@pytest.mark.parametrize(("seed", "index", "size"), [(-1, 0, 64), (0, -1, 64), (0, 0, 8)])
def test_numbers_out_of_range_are_refused(seed: int, index: int, size: int):
    with pytest.raises(ValueError, match="expected"):
        render_room(seed, index, size)
