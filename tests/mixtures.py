"""Mixtures of all shapes, for tests of what every one of them promises."""

from __future__ import annotations

from hypothesis import reject
from hypothesis import strategies as st

from perceptio.data.mixture import Mixture, MixtureSource
from perceptio.data.period import period_counts

ROW_GROUPS = st.lists(st.integers(1, 7), min_size=1, max_size=9)
WEIGHTS = st.one_of(st.integers(1, 9).map(float), st.floats(0.05, 1.0))


def held_or_rejected(weights: list[float]) -> list[int]:
    """The period of weights that some period holds; others are refused, which has a test of its own."""
    try:
        return period_counts(weights)
    except ValueError:
        reject()


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sources = [
        MixtureSource(f"s{i}", draw(WEIGHTS), draw(ROW_GROUPS)) for i in range(draw(st.integers(1, 5), label="sources"))
    ]
    held_or_rejected([source.weight for source in sources])
    streams = draw(st.sampled_from([1, 2, 4, 8]))
    return Mixture(
        sources,
        seed=draw(st.integers(0, 2**40)),
        streams=streams,
        global_batch=streams * draw(st.integers(1, 3)),
        window=draw(st.integers(1, 3)),
    )


def vqa_and_boxes() -> Mixture:
    """Global batches of 8: three of four samples are of "vqa" (10 rows), the others of "boxes" (4 rows)."""
    sources = [MixtureSource("vqa", 3, [6, 4]), MixtureSource("boxes", 1, [4])]
    return Mixture(sources, seed=1, streams=4, global_batch=8)
