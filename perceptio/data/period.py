"""The repeating table of a mixture: which source stands in which stream, row by row, and its counts.

Weights are rounded to whole counts n_s of a period of P draws. A table of P rows x C columns (streams) holds the source
of C P positions. Its rows are filled by earliest deadline first, which keeps every source within one draw of its share
after each row (Baruah et al. 1996). Each source's draws are then cut into rounds of C, and the draws of a round are
given to C different streams: rows and rounds form a C-regular bipartite graph, and such a graph splits into C perfect
matchings (Koenig), one a stream.

Shape legend: P rows of the table, C streams, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

Ints = npt.NDArray[np.int64]
LONGEST_PERIOD = 1024
ROUNDING = 0.001  # relative error of a share at which a shorter period is good enough
WORST_ROUNDING = 0.05  # relative error of a share above which the weights are refused


def period_counts(weights: Sequence[float]) -> list[int]:
    """Whole draws of each source in one period: the shortest period that holds every share within ROUNDING.

    A source of weight 0 has none. Raises ValueError if no period up to LONGEST_PERIOD holds them all within
    WORST_ROUNDING.
    """
    if not all(weights):
        drawn = iter(period_counts([weight for weight in weights if weight]))
        return [next(drawn) if weight else 0 for weight in weights]
    share = np.asarray(weights, np.float64) / math.fsum(weights)
    best, error = np.ones(len(share), np.int64), math.inf
    for period in range(len(share), LONGEST_PERIOD + 1):
        counts = np.maximum(np.floor(share * period + 1e-9).astype(np.int64), 1)
        left = period - int(counts.sum())
        counts[np.argsort(counts - share * period, kind="stable")[: max(left, 0)]] += 1  # largest remainders
        worst = float(np.max(np.abs(counts / counts.sum() / share - 1)))
        if worst < error - 1e-12:
            best, error = counts, worst
        if error <= ROUNDING:
            break
    if error > WORST_ROUNDING:
        rare = int(np.argmin(share))
        raise ValueError(
            f"weights: the smallest, {weights[rare]}, is a share of {share[rare]:.2g}, which no period of up to "
            f"{LONGEST_PERIOD} draws holds within {WORST_ROUNDING:.0%}: raise it, or leave that source out"
        )
    divisor = math.gcd(*best.tolist())
    return [int(count) // divisor for count in best]


class Period:
    """The table of sources, and for each of its cells how many draws of that source came before it."""

    def __init__(self, source_PC: Ints, sources: int) -> None:
        self.source_PC = source_PC
        self.rows, self.streams = int(source_PC.shape[0]), int(source_PC.shape[1])
        self.draw_PC = np.zeros(source_PC.shape, np.int64)  # in all streams, in order of position
        self.own_PC = np.zeros(source_PC.shape, np.int64)  # in this stream
        self.streams_of: list[Ints] = []  # the stream of each draw of a source, in order of position
        for source in range(sources):
            here = source_PC == source
            self.draw_PC[here] = np.arange(here.sum())
            self.own_PC[here] = (np.cumsum(here, axis=0) - 1)[here]
            self.streams_of.append(np.nonzero(here)[1])
        self.draws_P1S: Ints = np.zeros((self.rows + 1, sources), np.int64)  # of each source in the first rows
        for source in range(sources):
            self.draws_P1S[1:, source] = np.cumsum((source_PC == source).sum(1))

    @classmethod
    def of(cls, counts: Sequence[int], streams: int) -> Period:
        """The table in which each source has `counts` of the rows of each stream."""
        return cls(_deal(_earliest_deadline_first(counts, streams), counts), len(counts))

    @classmethod
    def of_one_row(cls, draws: Sequence[int]) -> Period:
        """A table of a single row, of as many draws of each source; it cannot be repeated."""
        return cls(np.repeat(np.arange(len(draws)), draws)[None], len(draws))

    def draws_before(self, source: int, draw: int) -> Ints:
        """How many of the first `draw` draws of a source fall to each stream: [C]."""
        streams = self.streams_of[source]
        turns, rest = divmod(draw, len(streams)) if len(streams) else (0, 0)
        before_C: Ints = np.bincount(streams[:rest], minlength=self.streams)
        return before_C + turns * np.bincount(streams, minlength=self.streams)

    def draws_in(self, rows: int) -> Ints:
        """How many draws of each source the first `rows` rows hold, of the table repeated: [S]."""
        turns, rest = divmod(rows, self.rows)
        found_S: Ints = turns * self.draws_P1S[-1] + self.draws_P1S[rest]
        return found_S

    def rows_within(self, source: int, draws: int) -> int | None:
        """The most rows that hold at most `draws` draws of a source; None where it is never drawn."""
        each = int(self.draws_P1S[-1, source])
        if each == 0:
            return None
        turns, rest = divmod(draws, each)
        return turns * self.rows + int(np.searchsorted(self.draws_P1S[:, source], rest, side="right")) - 1


def _earliest_deadline_first(counts: Sequence[int], streams: int) -> Ints:
    """How often each source is drawn in each row: [P, S]; after every row each is within one draw of its share."""
    period, done = sum(counts), [0] * len(counts)
    drawn = np.zeros((period, len(counts)), np.int64)
    for slot in range(period * streams):
        released = [s for s, n in enumerate(counts) if done[s] * period < n * (slot + 1)]
        source = min(released, key=lambda s: (-(-(done[s] + 1) * period // counts[s]), s))
        done[source] += 1
        drawn[slot // streams, source] += 1
    return drawn


def _deal(drawn_PS: Ints, counts: Sequence[int]) -> Ints:
    """The source of each cell: [P, C]; the draws of each round of a source go to different streams."""
    period = len(drawn_PS)
    streams = int(drawn_PS[0].sum())
    first_round = np.cumsum([0, *counts])
    edges_PP = np.zeros((period, period), np.int32)  # rows x rounds, rounds of all sources one after another
    for source in range(len(counts)):
        rows = np.repeat(np.arange(period), drawn_PS[:, source])
        np.add.at(edges_PP, (rows, first_round[source] + np.arange(len(rows)) // streams), 1)
    source_PC = np.empty((period, streams), np.int64)
    for stream in range(streams):
        rounds = _perfect_matching(edges_PP)
        source_PC[:, stream] = np.searchsorted(first_round, rounds, side="right") - 1
        edges_PP[np.arange(period), rounds] -= 1
    return source_PC


def _perfect_matching(edges_PP: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The column matched to each row of a regular bipartite graph: [P].

    As a flow of one unit a vertex: scipy's own maximum_bipartite_matching takes time exponential in P on some tables.
    """
    period = len(edges_PP)
    vertex_P, start, end = np.arange(period), 2 * period, 2 * period + 1
    row, column = np.nonzero(edges_PP)
    tails = np.concatenate([np.full(period, start), row, period + vertex_P])
    heads = np.concatenate([vertex_P, period + column, np.full(period, end)])
    capacity = csr_array((np.ones(len(tails), np.int32), (tails, heads)), shape=(end + 1, end + 1))
    flow = maximum_flow(capacity, start, end).flow[:period, period : 2 * period].tocoo()
    matched_P = np.empty(period, np.int32)
    matched_P[flow.row[flow.data > 0]] = flow.col[flow.data > 0]
    return matched_P
