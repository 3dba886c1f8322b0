"""Intervals resample images: they cover, they narrow, and pairing cancels what is shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.metrics import intervals
from perceptio.metrics.intervals import interval, paired_difference, sums


def test_sums_group_queries_by_image() -> None:
    figure = sums(["a", "b", "a"], [1, 2, 3], [4, 5, 6])
    assert figure.numerator_I.tolist() == [4, 2]
    assert figure.denominator_I.tolist() == [10, 5]
    assert figure.value == pytest.approx(6 / 15)


def test_the_mean_is_the_default() -> None:
    assert sums("abc", [1.0, 2.0, 6.0]).value == pytest.approx(3)


def test_equal_images_leave_no_doubt() -> None:
    found = interval(sums(range(5), [0.25] * 5), resamples=50, seed=0)
    assert (found.value, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 5)


def test_agrees_with_resampling_one_by_one() -> None:
    rng = np.random.default_rng(1)
    top_I, below_I = rng.uniform(0, 1, 40), rng.uniform(1, 2, 40)
    found = interval(sums(range(40), top_I, below_I), resamples=4000, seed=2)
    drawn = [(top_I[i].sum() / below_I[i].sum()) for i in rng.integers(40, size=(4000, 40))]
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.01)


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(0, 1, 400)
    found = interval(sums(range(400), values), resamples=2000, seed=0)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_repeated_questions_about_an_image_do_not_narrow_it() -> None:
    right = np.random.default_rng(4).integers(0, 2, 50)
    once = interval(sums(range(50), right), resamples=500, seed=0)
    often = interval(sums(np.repeat(range(50), 20).tolist(), np.repeat(right, 20)), resamples=500, seed=0)
    assert (often.low, often.high, often.n) == (once.low, once.high, 50)


def test_pairing_cancels_what_both_share() -> None:
    rng = np.random.default_rng(5)
    hard_I = rng.normal(0, 5, 100)
    ours, theirs = sums(range(100), hard_I + 0.5), sums(range(100), hard_I + rng.normal(0, 0.1, 100))
    found = paired_difference(ours, theirs, resamples=500, seed=0)
    assert 0.4 < found.low < found.value < found.high < 0.6
    assert interval(ours, resamples=500, seed=0).low < 0


def test_the_difference_of_a_figure_to_itself_is_zero() -> None:
    figure = sums(range(9), range(9))
    found = paired_difference(figure, figure, resamples=20, seed=0)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_images_without_the_question_are_allowed() -> None:
    found = interval(sums(range(3), [0, 1, 0], [0, 2, 0]), resamples=200, seed=0)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 99))
def test_the_interval_stays_within_the_values_and_holds_the_middle(values: list[float], seed: int) -> None:
    found = interval(sums(range(len(values)), values), resamples=60, seed=seed)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == interval(sums(range(len(values)), values), resamples=60, seed=seed)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = sums(range(10), range(10))
    whole = interval(figure, resamples=40, seed=6)
    monkeypatch.setattr(intervals, "CELLS", 30)
    assert interval(figure, resamples=40, seed=6) == whole


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        sums("ab", [1, float("nan")])
    with pytest.raises(ValueError, match="above 0"):
        sums("ab", [1, 1], [0, 0])
    with pytest.raises(ValueError, match="same images"):
        paired_difference(sums("ab", [1, 1]), sums("a", [1]), resamples=5, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        interval(sums("a", [1]), resamples=0, seed=0)
