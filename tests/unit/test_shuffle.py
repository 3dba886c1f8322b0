"""How well the mixture shuffles, and that the measures of it tell a good shuffle from none."""

from __future__ import annotations

import pytest

from tests.benchmarks.shuffle import BATCH, GROUPS, ROWS, STREAMS, by_mixture, perfect, plain, quality

PASSES = 4


def test_the_measures_know_a_perfect_shuffle_and_file_order() -> None:
    best, worst = quality(perfect(PASSES)), quality(plain(PASSES))
    by_chance = (ROWS - 1) / (GROUPS * ROWS - 1)  # that a second row is of the first one's row group
    assert best["rank_correlation"] < 0.03  # its standard deviation is 0.01
    assert best["batch_pairs_of_one_row_group"] == pytest.approx(by_chance, rel=0.1)
    assert best["next_draws_of_one_row_group"] == pytest.approx(by_chance, rel=0.3)
    assert worst["rank_correlation"] == pytest.approx(1)
    assert worst["next_draws_of_one_row_group"] == pytest.approx(1 - GROUPS / (GROUPS * ROWS), abs=1e-3)
    assert worst["batch_pairs_of_one_row_group"] > 0.6


def test_the_mixture_is_near_a_perfect_shuffle() -> None:
    found = quality(by_mixture(PASSES))
    # row groups are shuffled whole, so the correlation is that of 200 of them: its standard deviation is 0.07
    assert found["rank_correlation"] < 0.15
    # of a global batch each stream has BATCH / STREAMS rows, from a window of 2 row groups
    by_window = (BATCH / STREAMS - 1) / (BATCH - 1) / 2
    assert found["batch_pairs_of_one_row_group"] < 1.3 * by_window
    # the next draw is another stream's, which has another row group but where a cut divides one
    assert found["next_draws_of_one_row_group"] < 0.03
