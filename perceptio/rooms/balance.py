"""Draws without shortcuts: weights over the candidates of one room under which blind guesses are right by chance alone.

Shape legend: C candidates, M blind guesses (marks).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TOLERANCE = 2e-3  # largest error left in a chance of being right
_ROUNDS = 60


def balanced_weights(marks_CM: Floats, chance_M: Floats, base_C: Floats | None = None) -> Floats | None:
    """Weights [C] of sum 1 whose mean of each column of `marks_CM` is `chance_M`; None where no such weights exist.

    A mark says how far a blind guess ("the lowest point") is right for a candidate, in [0, 1]. Among all weights that
    meet the chances, these stay closest (in relative entropy) to the wish `base_C`, or to equal weights: Newton steps
    on the dual problem.
    """
    if not len(marks_CM) or (marks_CM.min(0) > chance_M).any() or (marks_CM.max(0) < chance_M).any():
        return None
    dual_M = np.zeros(marks_CM.shape[1])
    wish_C = np.ones(len(marks_CM)) if base_C is None else base_C
    for _ in range(_ROUNDS):
        scores_C = marks_CM @ dual_M
        weights_C: Floats = wish_C * np.exp(scores_C - scores_C.max())
        weights_C /= weights_C.sum()
        mean_M = weights_C @ marks_CM
        error_M = mean_M - chance_M
        if np.abs(error_M).max() < TOLERANCE:
            return weights_C
        curvature_MM = (marks_CM * weights_C[:, None]).T @ marks_CM - np.outer(mean_M, mean_M)
        step_M = np.linalg.solve(curvature_MM + 1e-5 * np.eye(len(dual_M)), error_M)
        dual_M -= step_M * min(1.0, 3.0 / max(float(np.abs(step_M).max()), 1e-9))
    return None


def draw(rng: np.random.Generator, marks_CM: Floats, chance_M: Floats, base_C: Floats | None = None) -> int | None:
    """Index of one candidate, drawn with `balanced_weights`; None where the room allows no balanced draw."""
    weights_C = balanced_weights(marks_CM, chance_M, base_C)
    return None if weights_C is None else int(rng.choice(len(weights_C), p=weights_C))


def top_share(values: Floats) -> Floats:
    """1 at the largest value along the last axis and 0 elsewhere; ties share the 1."""
    top = values >= values.max(-1, keepdims=True)
    share: Floats = top / top.sum(-1, keepdims=True)
    return share
