"""Numbers as the points of small drawings; the page's style sheet gives them their colours, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 300.0, 110.0  # of a curve's plot, in its own units
SMOOTHING = 0.03  # share of the steps that a smoothed point looks back over
SPAN = 160.0  # width of a whisker's plot


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run: the values as they are, smoothed, and smoothed for each data set."""

    title: str
    first: int  # step
    last: int
    top: str  # the value at the upper edge; the lower one is 0
    end: str  # the smoothed value at the last step
    raw: str  # points of an SVG polyline
    smooth: str
    apart: dict[str, str]  # data set -> points


@dataclass(frozen=True)
class Whisker:
    """A value with its interval and a mark for the baseline, as x positions from 0 to SPAN."""

    value: float
    low: float
    high: float
    baseline: float


@dataclass(frozen=True)
class Bar:
    """A stage's seconds, and its share of the longest."""

    name: str
    seconds: str
    share: float


@dataclass(frozen=True)
class Column:
    """One bar of a histogram, in the units of its plot."""

    x: float
    y: float
    width: float
    height: float
    said: str  # what the pointer is told


@dataclass(frozen=True)
class Histogram:
    """How often values lie where."""

    title: str
    low: str  # the value at the left edge
    high: str
    top: str  # of the tallest bar
    bars: list[Column]


def curves(
    title: str, steps: Sequence[int], values: Sequence[float | None], apart: Mapping[str, Sequence[float | None]]
) -> Chart:
    """A chart of one loss term; None where a step, or a data set's part of it, had none."""
    shown = [value for value in values if value is not None and np.isfinite(value)]
    top = max(float(np.quantile(shown, 0.99)), 1e-9) if shown else 1.0
    smooth = _smoothed(values)
    return Chart(
        title=title.replace("_", " "),
        first=steps[0],
        last=steps[-1],
        top=f"{top:.3g}",
        end=f"{smooth[-1]:.3g}" if smooth and smooth[-1] is not None else "",
        raw=_points(steps, list(values), top),
        smooth=_points(steps, smooth, top),
        apart={name: _points(steps, _smoothed(own), top) for name, own in apart.items()},
    )


@dataclass(frozen=True)
class Curve:
    """One run's values of a quantity over its steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def curves_together(title: str, lines: Sequence[Curve]) -> dict[str, Any]:
    """A chart of several runs' curves on one scale, from 0 to what 99 % of the values stay under."""
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    top = max(float(np.quantile([value for line in lines for value in line.values], 0.99)), 1e-9)
    points = {line.name: _points(list(line.steps), list(line.values), top, (first, last)) for line in lines}
    return {"title": title, "first": first, "last": last, "top": f"{top:.3g}", "lines": points}


def whisker(value: float, low: float, high: float, baseline: float) -> Whisker:
    """The positions on a scale from 0 (or the smallest number, if below) to a little above the largest."""
    left = min(0.0, value, low, baseline)
    right = max(value, high, baseline, left + 1e-9)
    scale = 0.96 * SPAN / (right - left)
    value, low, high, baseline = (round((x - left) * scale, 1) for x in (value, low, high, baseline))
    return Whisker(value, low, high, baseline)


def bars(seconds: Mapping[str, float]) -> list[Bar]:
    """One bar a stage."""
    longest = max([*seconds.values(), 1e-9])
    return [Bar(name, f"{value:.1f}", round(100 * value / longest, 1)) for name, value in seconds.items()]


def histogram(title: str, values: npt.NDArray[Any], bins: int, span: tuple[float, float] | None = None) -> Histogram:
    """The values' counts in bins of one width, from the smallest to the largest or over `span`; whole numbers whole."""
    finite = values[np.isfinite(values)] if len(values) else np.zeros(0)
    whole = np.issubdtype(values.dtype, np.integer)
    if span is None:
        low, high = (finite.min(), finite.max()) if len(finite) else (0, 1)
        span = (float(low), float(high) + whole) if whole or high > low else (float(low) - 0.5, float(high) + 0.5)
        bins = min(bins, int(span[1] - span[0])) if whole else bins
    counts, edges = np.histogram(finite, bins, span)
    said = [f"{a:.4g} to {b:.4g}: {n:,}" for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)]
    right = span[1] - 1 if whole else span[1]
    return Histogram(title, f"{span[0]:.4g}", f"{right:.4g}", f"{counts.max():,}", _columns(counts.tolist(), said))


def usage(title: str, counts: Sequence[int]) -> Histogram:
    """A bar a code, in the order of the codes."""
    said = [f"code {code}: {count:,}" for code, count in enumerate(counts)]
    return Histogram(title, "code 0", f"code {len(counts) - 1}", f"{max(counts):,}", _columns(counts, said))


def _columns(counts: Sequence[int], said: Sequence[str]) -> list[Column]:
    width, top = WIDTH / len(counts), max(max(counts), 1)
    heights = [round(HEIGHT * count / top, 2) for count in counts]
    return [
        Column(round(i * width, 2), round(HEIGHT - height, 2), round(0.9 * width, 2), height, text)
        for i, (height, text) in enumerate(zip(heights, said, strict=True))
    ]


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Each value's mean with those shortly before it; None stays None."""
    back = max(1, round(SMOOTHING * len(values)))
    found: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - back) : i + 1] if v is not None and np.isfinite(v)]
        found.append(float(np.mean(near)) if value is not None and near else None)
    return found


def _points(
    steps: Sequence[int], values: Sequence[float | None], top: float, span: tuple[int, int] | None = None
) -> str:
    first, last = span or (steps[0], steps[-1])
    across = max(last - first, 1)
    return " ".join(
        f"{(step - first) / across * WIDTH:.1f},{HEIGHT * (1 - min(max(value / top, 0), 1)):.1f}"
        for step, value in zip(steps, values, strict=True)
        if value is not None and np.isfinite(value)
    )
