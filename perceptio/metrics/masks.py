"""Mask overlap as referring segmentation scores it: cIoU over a split, gIoU as the mean of the images.

Shape legend: M masks, H, W image height and width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def union_mask(masks: Sequence[Bools], shape: tuple[int, int]) -> Bools:
    """One mask [H, W] of the pixels in any of the masks; empty where there is none (lineage: Sa2VA's RefCOCO scoring).

    Raises ValueError where a mask has another shape.
    """
    union_HW = np.zeros(shape, np.bool_)
    for mask_HW in masks:
        if mask_HW.shape != shape:
            raise ValueError(f"mask has shape {mask_HW.shape}, expected the image's {shape}: resize it first")
        union_HW |= mask_HW.astype(np.bool_)
    return union_HW


def overlap(found_HW: Bools, true_HW: Bools) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks. Raises ValueError where their shapes differ."""
    if found_HW.shape != true_HW.shape:
        raise ValueError(f"found mask has shape {found_HW.shape}, the true one {true_HW.shape}: resize it first")
    return int((found_HW & true_HW).sum()), int((found_HW | true_HW).sum())


def iou(intersections_Q: npt.ArrayLike, unions_Q: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Intersection over union of each query [Q], in [0, 1]; 1 where both masks are empty: nothing asked, none given."""
    intersections, unions = np.asarray(intersections_Q, np.float64), np.asarray(unions_Q, np.float64)
    return np.where(unions > 0, intersections / np.maximum(unions, 1), 1.0)


def ciou(intersections_Q: npt.ArrayLike, unions_Q: npt.ArrayLike) -> float:
    """Sum of intersections over sum of unions, in [0, 1] (lineage). Raises ValueError where every mask is empty."""
    total = float(np.sum(unions_Q))
    if total <= 0:
        raise ValueError("cIoU of empty masks only: sum of unions is 0, expected a query with an object")
    return float(np.sum(intersections_Q)) / total


def giou(intersections_Q: npt.ArrayLike, unions_Q: npt.ArrayLike) -> float:
    """Mean of the queries' IoU, in [0, 1] (lineage). Raises ValueError without queries."""
    values_Q = iou(intersections_Q, unions_Q)
    if not values_Q.size:
        raise ValueError("gIoU of no queries: expected at least one")
    return float(values_Q.mean())
