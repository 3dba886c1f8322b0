"""The codebook's contact sheet: held-out maps, what it makes of them, and where it is wrong.

Shape legend: S the codebook's image side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

TILE = 128  # pixels at least; smaller maps are enlarged by a whole number
GAP, LINE = 6, 16  # pixels
FULL = 0.25  # error that is shown brightest
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class Rebuilt:
    """A held-out map and its reconstruction, both inverse depth in [0, 1]."""

    name: str
    mae: float
    truth_SS: npt.NDArray[np.float32]
    found_SS: npt.NDArray[np.float32]


def choose(errors: Sequence[tuple[float, str]], each: int = 4) -> dict[str, list[str]]:
    """Names of the best, the median and the worst maps by (error, name): `each` of them, fewer where there are few."""
    ordered = [name for _, name in sorted(errors)]
    count = min(each, max(1, len(ordered) // 3))
    middle = (len(ordered) - count) // 2
    return {
        "best": ordered[:count],
        "median": ordered[middle : middle + count],
        "worst": ordered[len(ordered) - count :],
    }


def contact_sheet(groups: Mapping[str, Sequence[Rebuilt]]) -> Image.Image:
    """One block of rows a group: teacher, reconstruction, absolute error, and each row's MAE under it."""
    from workflows.pictures import depth_colours  # here, since only rank 0 draws and Matplotlib takes half a second

    size = next(len(row.truth_SS) for rows in groups.values() for row in rows)
    side = size * -(-TILE // size)
    block, step = 3 * (side + GAP), side + LINE + GAP
    height = GAP + 2 * LINE + max(len(rows) for rows in groups.values()) * step
    sheet = Image.new("RGB", (len(groups) * (block + GAP) + GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (group, rows) in enumerate(groups.items()):
        left = GAP + i * (block + GAP)
        draw.text((left, GAP), f"{group} {len(rows)} held-out maps: teacher, reconstruction,", fill=INK)
        draw.text((left, GAP + LINE), f"absolute error (brightest: {FULL:g} and above)", fill=INK)
        for j, row in enumerate(rows):
            top = GAP + 2 * LINE + j * step
            tiles = (row.truth_SS, row.found_SS, np.abs(row.found_SS - row.truth_SS) / FULL)
            for k, tile_SS in enumerate(tiles):
                tile = Image.fromarray(depth_colours(tile_SS)).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + k * (side + GAP), top))
            draw.text((left, top + side), f"MAE {row.mae:.4f}  {row.name[:32]}", fill=INK)
    return sheet
