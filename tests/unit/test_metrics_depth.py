"""Depth errors by hand; alignment undoes any scale and shift, and only those."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.metrics.depth import align, inverse_errors, z_errors


def relative(z_HW: np.ndarray) -> np.ndarray:
    inverse_HW = 1 / z_HW
    return (inverse_HW - inverse_HW.min()) / (inverse_HW.max() - inverse_HW.min())


def room(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 6, (6, 7))


def test_inverse_errors_by_hand() -> None:
    errors = inverse_errors([[0.0, 0.5]], [[0.1, 0.2]])
    assert errors.mae == pytest.approx(0.2)
    assert errors.rmse == pytest.approx(np.sqrt((0.01 + 0.09) / 2))


def test_z_errors_by_hand_leave_out_unknown_pixels() -> None:
    errors = z_errors([[2.0, 2.2, 9.0]], [[1.0, 2.0, 0.0]])
    assert errors.pixels == 2
    assert errors.abs_rel == pytest.approx((1 + 0.1) / 2)
    assert errors.rmse == pytest.approx(np.sqrt((1 + 0.04) / 2))
    assert (errors.delta1, errors.delta2, errors.delta3) == (0.5, 0.5, 0.5)
    assert z_errors([[1.5]], [[1.0]]).delta2 == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_relative_map_of_true_depth_aligns_to_it(seed: int) -> None:
    z_HW = room(seed)
    assert align(relative(z_HW), z_HW) == pytest.approx(z_HW, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9), st.floats(0, 0.1))
def test_scale_and_shift_of_the_map_change_nothing(seed: int, scale: float, shift: float) -> None:
    z_HW, other_HW = room(seed), relative(room(seed + 1))
    assert align(scale * other_HW + shift, z_HW) == pytest.approx(align(other_HW, z_HW), rel=1e-6)


def test_alignment_is_the_least_squares_line_in_inverse_depth() -> None:
    z_HW, found_HW = room(3), 0.5 * relative(room(3)) + 0.5 * relative(room(4))
    line = np.polynomial.Polynomial.fit(found_HW.ravel(), 1 / z_HW.ravel(), 1)
    expected = np.maximum(line(found_HW), (1 / z_HW).min())
    assert 1 / align(found_HW, z_HW) == pytest.approx(expected, rel=1e-9)


def test_a_map_upside_down_gains_nothing_by_a_negative_scale() -> None:
    z_HW = room(5)
    flat = align(np.full_like(z_HW, 0.5), z_HW)
    assert align(1 - relative(z_HW), z_HW) == pytest.approx(flat)
    assert 1 / flat == pytest.approx(np.full_like(z_HW, (1 / z_HW).mean()))


def test_pixels_without_true_depth_are_not_fitted() -> None:
    z_HW = room(6)
    found_HW = relative(z_HW)
    z_HW[0, 0], found_HW[0, 0] = 0, 1
    assert z_errors(align(found_HW, z_HW), z_HW).abs_rel == pytest.approx(0, abs=1e-9)


def test_wrong_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        inverse_errors([[1.5]], [[0.5]])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        inverse_errors([[np.nan]], [[0.5]])
    with pytest.raises(ValueError, match="resize"):
        inverse_errors([[0.5]], [[0.5, 0.5]])
    with pytest.raises(ValueError, match="0 everywhere"):
        align([[0.5]], [[0.0]])
