"""What the segmenter learns from: rooms as pixels, masks and names, and prompts drawn on them.

Shape legend: M prompts, P points, H, W image height and width, or those of the mask logits.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.render import render_room
from perceptio.segmentation.sam2_image import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND_POINT

MIN_OBJECT_SHARE = 0.0015  # of the image; smaller visible objects are no target
COLOR_NAMES = tuple(COLORS)
NAME_FORMS = ((1, 1), (1, 1), (1, 0), (0, 1))  # which of kind and colour a name tells

Rng = np.random.Generator
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A room, reduced to what training needs."""

    rgb_HW3: npt.NDArray[np.uint8]
    instance_HW: npt.NDArray[np.int8]  # index of the object that shows, -1 on walls and floor
    names_O2: npt.NDArray[np.int64]  # kind and colour of each object, from 1
    large: tuple[int, ...]  # objects that show enough to be asked for

    @property
    def masks(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """[H, W] per object that is large enough."""
        return tuple(self.instance_HW == i for i in self.large)

    @property
    def names_2HW(self) -> npt.NDArray[np.int64]:
        """Kind and colour of every pixel's object, 0 on walls and floor."""
        return np.concatenate([self.names_O2, np.zeros((1, 2), np.int64)]).T[:, self.instance_HW]

    def named(self, kind: int, color: int) -> npt.NDArray[np.bool_]:
        """[H, W] where an object of this kind and colour shows; 0 is any kind, any colour."""
        fits_O = np.isin(self.names_O2[:, 0], [kind] if kind else self.names_O2[:, 0])
        fits_O &= np.isin(self.names_O2[:, 1], [color] if color else self.names_O2[:, 1])
        return np.append(fits_O, False)[self.instance_HW]


def example(seed: int, index: int, size: int) -> Example:
    """The room (seed, index), with the masks of its objects above MIN_OBJECT_SHARE; pure."""
    room = render_room(seed, index, size)
    floor = MIN_OBJECT_SHARE * size * size
    large = tuple(i for i, pixels in enumerate(room.visible_pixels) if pixels >= floor)
    names = [(1 + KINDS.index(thing.kind), 1 + COLOR_NAMES.index(thing.color)) for thing in room.objects]
    return Example(room.rgb_HW3, room.instance_HW.astype(np.int8), np.array(names, np.int64), large)


def rooms_of(seed: int, count: int, sizes: tuple[int, ...]) -> list[Example]:
    """Rooms 0 to `count` of a seed that show an object to ask for, in turn of each size; rendered by all cores."""
    with ProcessPoolExecutor() as pool:
        indices = range(count)
        drawn = pool.map(example, repeat(seed), indices, (sizes[i % len(sizes)] for i in indices), chunksize=25)
        return [room for room in drawn if room.large]


def box_of(mask_HW: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The tight box x0, y0, x1, y1 in pixels, x1 and y1 one past the last."""
    ys, xs = np.nonzero(mask_HW)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def click_on(mask_HW: npt.NDArray[np.bool_], rng: Rng) -> tuple[float, float]:
    """A random pixel (x, y) of the mask."""
    ys, xs = np.nonzero(mask_HW)
    pick = rng.integers(len(xs))
    return float(xs[pick]), float(ys[pick])


def mirrored(item: Example) -> Example:
    return Example(item.rgb_HW3[:, ::-1], item.instance_HW[:, ::-1], item.names_O2, item.large)


def _jittered(box: tuple[float, float, float, float], side: int, rng: Rng) -> tuple[float, ...]:
    """The box with each edge moved by up to a tenth of the box's own width or height."""
    x0, y0, x1, y1 = box
    noise = np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    return tuple(np.clip(np.array(box) + noise, 0, side).tolist())


@dataclass(frozen=True)
class Batch:
    """Prompts of one sort, with their targets."""

    image_index_M: Tensor
    target_MHW: Tensor  # [0, 1], the share of the cell that the object covers
    points_MP2: Tensor  # input pixels; no points where names are asked
    labels_MP: Tensor
    names_M2: Tensor  # kind and colour asked for, 0 is any; empty where points are asked


def draw_prompts(items: list[Example], *, boxes: bool, size: int, count: int, rng: Rng) -> Batch:
    """`count` prompts of each image, on objects drawn at random, as boxes or single clicks."""
    index, points, targets = [], [], []
    for i, item in enumerate(items):
        side = len(item.rgb_HW3)
        for pick in rng.choice(item.large, size=count):
            mask_HW = item.instance_HW == pick
            prompt = _jittered(box_of(mask_HW), side, rng) if boxes else click_on(mask_HW, rng)
            index.append(i)
            points.append(torch.tensor(prompt).view(-1, 2) * size / side)
            targets.append(_target(mask_HW, size))
    labels = (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT) if boxes else (FOREGROUND_POINT,)
    labels_MP = torch.tensor(labels).expand(len(index), -1)
    return Batch(torch.tensor(index), torch.stack(targets), torch.stack(points), labels_MP, torch.zeros(0, 2).long())


def draw_names(items: list[Example], *, size: int, count: int, rng: Rng) -> Batch:
    """`count` names of objects of each image: kind and colour, kind alone or colour alone."""
    index, names, targets = [], [], []
    for i, item in enumerate(items):
        for pick in rng.choice(item.large, size=count):
            kind, color = (item.names_O2[pick] * NAME_FORMS[rng.integers(len(NAME_FORMS))]).tolist()
            index.append(i)
            names.append((kind, color))
            targets.append(_target(item.named(kind, color), size))
    none = torch.zeros(len(index), 0, 2)
    return Batch(torch.tensor(index), torch.stack(targets), none, none[..., 0].long(), torch.tensor(names))


def _target(mask_HW: npt.NDArray[np.bool_], size: int) -> Tensor:
    full_11HW = torch.from_numpy(np.ascontiguousarray(mask_HW))[None, None].float()
    return F.interpolate(full_11HW, (size // 4, size // 4), mode="area")[0, 0]
