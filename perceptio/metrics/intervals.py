"""95 % intervals by bootstrap over images, and paired differences.

Every figure of ours is a ratio of sums (a mean: sum / count; cIoU: intersections / unions), and questions about one
image are not independent: so each image brings its two sums, and images are resampled.

Shape legend: Q queries, I images, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
CELLS = 4_000_000  # numbers held at a time while resampling


@dataclass(frozen=True)
class Sums:
    """A figure's numerator and denominator, summed per image."""

    numerator_I: Floats
    denominator_I: Floats
    images: tuple[Hashable, ...]

    @property
    def value(self) -> float:
        """The figure: sum of numerators over sum of denominators."""
        return float(self.numerator_I.sum() / self.denominator_I.sum())

    def __len__(self) -> int:
        return len(self.numerator_I)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over `n` images."""

    value: float
    low: float
    high: float
    n: int


def sums(images_Q: Sequence[Hashable], numerator_Q: npt.ArrayLike, denominator_Q: npt.ArrayLike = 1.0) -> Sums:
    """The sums of each image over its queries, images in the order of their first query; the mean by default.

    Raises ValueError where lengths differ, a number is not finite, or no denominator is above 0.
    """
    order = {image: i for i, image in enumerate(dict.fromkeys(images_Q))}
    index_Q = np.array([order[image] for image in images_Q], np.int64)
    parts = []
    for name, values in (("numerator", numerator_Q), ("denominator", denominator_Q)):
        values_Q = np.broadcast_to(np.asarray(values, np.float64), index_Q.shape)
        if not np.isfinite(values_Q).all():
            raise ValueError(f"{name} of query {int(np.argmin(np.isfinite(values_Q)))} is not finite: leave it out")
        parts.append(np.bincount(index_Q, values_Q, minlength=len(order)).astype(np.float64))
    if not parts[1].sum() > 0:
        raise ValueError(f"denominators of {len(index_Q)} queries sum to {parts[1].sum():g}, expected above 0")
    return Sums(parts[0], parts[1], tuple(order))


def interval(figure: Sums, *, resamples: int, seed: int) -> Interval:
    """The figure with its percentile bootstrap interval at 95 %."""
    low, high = _percentiles(_resampled([figure], resamples, seed)[0])
    return Interval(figure.value, low, high, len(figure))


def paired_difference(figure: Sums, other: Sums, *, resamples: int, seed: int) -> Interval:
    """figure - other with its 95 % interval; both are resampled with the same images, so what they share cancels.

    Raises ValueError where they are not over the same images in the same order.
    """
    if figure.images != other.images:
        apart = set(figure.images) ^ set(other.images)
        raise ValueError(
            f"paired figures over {len(figure)} and {len(other)} images, {len(apart)} of them in one alone: pass the"
            " same images in the same order"
        )
    first_R, second_R = _resampled([figure, other], resamples, seed)
    low, high = _percentiles(first_R - second_R)
    return Interval(figure.value - other.value, low, high, len(figure))


def _resampled(figures: Sequence[Sums], resamples: int, seed: int) -> list[Floats]:
    """Each figure [R] over the same resamples of its images."""
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, expected at least 1")
    rng, images = np.random.default_rng(seed), len(figures[0])
    found: list[list[Floats]] = [[] for _ in figures]
    step = max(1, CELLS // images)
    for start in range(0, resamples, step):
        times_RI = rng.multinomial(images, np.full(images, 1 / images), size=min(step, resamples - start))
        for figure, values in zip(figures, found, strict=True):
            below_R = times_RI @ figure.denominator_I
            # a resample without a single query has no figure: it is left out of the percentiles
            values.append(np.divide(times_RI @ figure.numerator_I, below_R, out=np.full(len(below_R), np.nan),
                                    where=below_R > 0))  # fmt: skip
    return [np.concatenate(values) for values in found]


def _percentiles(values_R: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values_R, (2.5, 97.5))
    return float(low), float(high)
