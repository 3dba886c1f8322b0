"""What the segmenter learns from: rooms as pixels, masks and names, and prompts drawn on them.

Shape legend: M prompts, P points, H, W image height and width, or those of the mask logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.render import render_room
from perceptio.segmentation.sam2_image import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND_POINT

MIN_OBJECT_SHARE = 0.0015  # of the image; smaller visible objects are no target
PROMPTS_PER_IMAGE = 6  # half of them boxes, half clicks
COLOR_NAMES = tuple(COLORS)

Rng = np.random.Generator
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A room, reduced to what training needs."""

    rgb_HW3: npt.NDArray[np.uint8]
    masks: tuple[npt.NDArray[np.bool_], ...]  # [H, W] per object that is large enough
    names_2HW: npt.NDArray[np.int64]  # kind and colour of every pixel's object, 0 on walls and floor


def example(seed: int, index: int, size: int) -> Example:
    """The room (seed, index), with the masks of its objects above MIN_OBJECT_SHARE; pure."""
    room = render_room(seed, index, size)
    floor = MIN_OBJECT_SHARE * size * size
    masks = tuple(room.instance_HW == i for i, pixels in enumerate(room.visible_pixels) if pixels >= floor)
    names = [(1 + KINDS.index(thing.kind), 1 + COLOR_NAMES.index(thing.color)) for thing in room.objects]
    names_2HW = np.array([*names, (0, 0)]).T[:, room.instance_HW]  # BACKGROUND is -1, the last
    return Example(room.rgb_HW3, masks, names_2HW)


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
    masks = tuple(mask_HW[:, ::-1] for mask_HW in item.masks)
    return Example(item.rgb_HW3[:, ::-1], masks, item.names_2HW[:, :, ::-1])


def _jittered(box: tuple[float, float, float, float], side: int, rng: Rng) -> tuple[float, ...]:
    """The box with each edge moved by up to a tenth of the box's own width or height."""
    x0, y0, x1, y1 = box
    noise = np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    return tuple(np.clip(np.array(box) + noise, 0, side).tolist())


@dataclass(frozen=True)
class Batch:
    """Prompts of one kind, with their targets."""

    image_index_M: Tensor
    points_MP2: Tensor  # input pixels
    labels_MP: Tensor
    target_MHW: Tensor  # [0, 1], the share of the cell that the object covers


def draw_prompts(items: list[Example], *, boxes: bool, size: int, rng: Rng) -> Batch:
    """PROMPTS_PER_IMAGE / 2 prompts of each image, on objects drawn at random, as boxes or single clicks."""
    index, points, targets = [], [], []
    for i, item in enumerate(items):
        side = len(item.rgb_HW3)
        for pick in rng.integers(len(item.masks), size=PROMPTS_PER_IMAGE // 2):
            mask_HW = item.masks[pick]
            prompt = _jittered(box_of(mask_HW), side, rng) if boxes else click_on(mask_HW, rng)
            index.append(i)
            points.append(torch.tensor(prompt).view(-1, 2) * size / side)
            full_11HW = torch.from_numpy(np.ascontiguousarray(mask_HW))[None, None].float()
            targets.append(F.interpolate(full_11HW, (size // 4, size // 4), mode="area")[0, 0])
    labels = (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT) if boxes else (FOREGROUND_POINT,)
    labels_MP = torch.tensor(labels).expand(len(index), -1)
    return Batch(torch.tensor(index), torch.stack(points), labels_MP, torch.stack(targets))
