"""How well the mixture shuffles a table, beside a perfect shuffle and beside plain file order.

A table of 200 row groups of 50 rows is one of two sources, in global batches of 32 over 8 streams, as the rooms recipe
has them. Measured are, over 20 passes: the rank correlation of a row's place in a pass with its place in the files
(Spearman's; the mean of its amounts), the share of pairs of rows of one global batch that come from one row group, and
the share of the source's draws whose next draw is from the same row group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from perceptio.data.mixture import Mixture, MixtureSource

GROUPS, ROWS, STREAMS, BATCH, WEIGHTS, SEED, PASSES = 200, 50, 8, 32, (3, 1), 5, 20
BAR = 0.1  # of the pairs that plain file order has
Drawn = Sequence[tuple[int, int]]  # (global batch, row's number in the table) of each draw, in order


def by_mixture(passes: int = PASSES) -> list[Drawn]:
    """The draws of each pass over the table, the first of two sources."""
    sources = [MixtureSource(str(number), weight, [ROWS] * GROUPS) for number, weight in enumerate(WEIGHTS)]
    mixture = Mixture(sources, seed=SEED, streams=STREAMS, global_batch=BATCH)
    drawn: list[list[tuple[int, int]]] = [[] for _ in range(passes)]
    position = 0
    while len(drawn[-1]) < GROUPS * ROWS:
        slot = mixture.at(position)
        if slot.source == 0 and slot.pass_number < passes:
            drawn[slot.pass_number].append((position // BATCH, slot.row_group * ROWS + slot.row))
        position += 1
    return list(drawn)


def perfect(passes: int = PASSES) -> list[Drawn]:
    """The same places in batches, filled by a shuffle of the whole table."""
    rng = np.random.default_rng(SEED)
    return [_filled(rng.permutation(GROUPS * ROWS).tolist()) for _ in range(passes)]


def plain(passes: int = PASSES) -> list[Drawn]:
    """The same, filled in the order of the files."""
    return [_filled(range(GROUPS * ROWS))] * passes


def quality(drawn: Sequence[Drawn]) -> dict[str, float]:
    """The three measures of some passes over the table."""
    correlations, pairs, alike, next_alike, draws = [], 0, 0, 0, 0
    for one_pass in drawn:
        batch_N, row_N = np.asarray(one_pass).T
        correlations.append(float(spearmanr(np.arange(len(row_N)), row_N).statistic))
        group_N = row_N // ROWS
        next_alike += int((group_N[1:] == group_N[:-1]).sum())
        draws += len(group_N) - 1
        for groups in np.split(group_N, np.flatnonzero(np.diff(batch_N)) + 1):
            counts = np.bincount(groups)
            alike += int((counts * (counts - 1)).sum()) // 2
            pairs += len(groups) * (len(groups) - 1) // 2
    return {
        "rank_correlation": float(np.mean(np.abs(correlations))),
        "mean_rank_correlation": float(np.mean(correlations)),
        "batch_pairs_of_one_row_group": alike / pairs,
        "next_draws_of_one_row_group": next_alike / draws,
    }


def _filled(rows: Sequence[int]) -> Drawn:
    each = BATCH * WEIGHTS[0] // sum(WEIGHTS)  # of a global batch
    return [(place // each, row) for place, row in enumerate(rows)]


def run() -> dict[str, Any]:
    """The benchmark's result."""
    found = {"mixture": by_mixture(), "perfect shuffle": perfect(), "plain file order": plain()}
    rows = [{"order": name, **quality(drawn)} for name, drawn in found.items()]
    ours, files = (float(rows[at]["batch_pairs_of_one_row_group"]) for at in (0, 2))
    return {
        "name": "shuffle",
        "what": "pairs of a global batch from one row group, mixture to plain file order",
        "value": ours / files,
        "unit": "of file order's",
        "bar": BAR,
        "higher_is_better": False,
        "holds": ours / files <= BAR,
        "rows": rows,
    }
