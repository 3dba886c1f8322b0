"""What a shipped part was to reach, as its card says it beside what it reached."""

from __future__ import annotations

REFERRING_CIOU = 0.60  # of the shipped Perceptio, and every kind of question above its blind guess
BOX_MIOU = 0.80  # of the segmenter, from a box
ANSWERS = 0.70  # of the base, on attributes and counts
TEACHER_SHARE = 0.5  # of the mean map's error


def aim(what: str, value: float, bar: float, *, at_most: bool = False) -> str:
    """A sentence of a model card."""
    met = value <= bar if at_most else value >= bar
    return (
        f"{what}: {'at most' if at_most else 'at least'} {bar:.3g} wanted, {value:.3f} reached:"
        f" {'met' if met else 'missed'}."
    )
