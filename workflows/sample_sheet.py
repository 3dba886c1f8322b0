"""Samples as one picture: a row each, of its image, maps and masks side by side.

Shape legend: H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from perceptio.metrics.masks import Bools
from workflows.codebook_pictures import GAP, INK, LINE, PAPER

TILE = 192  # pixels of a picture's longer side
LETTER = 6  # pixels of a letter of a caption, or fewer


@dataclass(frozen=True)
class Tile:
    """A picture: red, green and blue, with a mask over them if there is one, or inverse depth in [0, 1]."""

    name: str
    shown: npt.NDArray[Any]  # (H, W, 3) of uint8, or (H, W)
    mask_HW: Bools | None = None


@dataclass(frozen=True)
class Row:
    """A sample: what stands over it, and its pictures."""

    caption: str
    tiles: Sequence[Tile]


def sheet(rows: Sequence[Row]) -> Image.Image:
    """All rows below one another; depth dark = far, bright = close, masks tinted."""
    width = max(len(row.tiles) for row in rows) * (TILE + GAP) + GAP
    height = TILE + 2 * LINE + GAP
    page = Image.new("RGB", (width, len(rows) * height + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for number, row in enumerate(rows):
        top = GAP + number * height
        draw.text((GAP, top), _plain(row.caption, width // LETTER), fill=INK)
        for place, tile in enumerate(row.tiles):
            left = GAP + place * (TILE + GAP)
            draw.text((left, top + LINE), tile.name, fill=INK)
            small = Image.fromarray(_drawn(tile))
            scale = TILE / max(small.size)
            size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
            page.paste(small.resize(size, Image.Resampling.BILINEAR), (left, top + 2 * LINE))
    return page


def _drawn(tile: Tile) -> npt.NDArray[np.uint8]:
    from workflows.pictures import depth_colours, tinted  # here, since only rank 0 draws, and Matplotlib takes time

    if tile.shown.ndim == 2:
        return depth_colours(tile.shown)
    shown = tile.shown.astype(np.uint8)
    return shown if tile.mask_HW is None else tinted(shown, tile.mask_HW)


def _plain(caption: str, letters: int) -> str:
    """One line of a caption, cut where it is long."""
    line = " ".join(caption.split())
    return line if len(line) <= letters else f"{line[: letters - 3]}..."
