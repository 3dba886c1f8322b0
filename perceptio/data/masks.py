"""Masks on disk and on the wire: COCO's compressed run lengths, checked as they are decoded.

Shape legend: O objects, H, W image height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco

Bools = npt.NDArray[np.bool_]
Rle = dict[str, Any]  # height, width, counts: a row of schemas.tables.RLE
MOST_BITS = 40  # of a run length


def masks_to_rle(masks_OHW: Bools) -> list[Rle]:
    """One run-length record per mask, in order."""
    height, width = masks_OHW.shape[1:]
    columns_HWO = np.asfortranarray(masks_OHW.astype(np.uint8).transpose(1, 2, 0))
    return [
        {"height": height, "width": width, "counts": record["counts"].decode("ascii")}
        for record in coco.encode(columns_HWO)
    ]


def rle_to_mask(rle: Mapping[str, Any]) -> Bools:
    """The mask (H, W) of a run-length record.

    Raises ValueError where the runs do not add up to height x width; pycocotools would read past their end.
    """
    height, width = int(rle["height"]), int(rle["width"])
    runs = _runs(str(rle["counts"]))
    if height < 1 or width < 1 or sum(runs) != height * width:
        raise ValueError(f"run lengths cover {sum(runs)} pixels, expected {height} x {width}: another image's mask")
    inside = np.arange(len(runs)) % 2 == 1  # runs alternate, from outside on
    return np.repeat(inside, runs).reshape(width, height).T.copy()


def box_within(mask_HW: Bools, parts: int) -> tuple[int, int, int, int]:
    """First and last column and row of a mask, x0, y0, x1, y1, in `parts` of a side, 0 to parts - 1, rounded down.

    Raises ValueError for an empty mask.
    """
    if not mask_HW.any():
        raise ValueError(f"a mask of {mask_HW.shape[0]} x {mask_HW.shape[1]} pixels is empty, expected an object")
    (height, width), rows, columns = mask_HW.shape, np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    x0, x1 = (int(x) * parts // width for x in columns[[0, -1]])
    y0, y1 = (int(y) * parts // height for y in rows[[0, -1]])
    return x0, y0, x1, y1


def _runs(counts: str) -> list[int]:
    """The run lengths of COCO's text form: 5 bits a letter, lowest first; from the fourth on less the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(
                f"run lengths hold {letter!r}, expected letters from '0' to 'o': not COCO's compressed form"
            )
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > MOST_BITS:  # a hostile number without end would take the square of its length
                raise ValueError(f"a run of the mask has more than {MOST_BITS} bits: it is longer than any image")
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            raise ValueError(f"run {len(runs)} of the mask has length {runs[-1]}, expected 0 or more")
        value = shift = 0
    if shift:
        raise ValueError("the mask's run lengths end in the middle of a number: they were cut off")
    return runs
