"""The phases of a mixture: its period table while nothing changes, and what was drawn before each.

A phase ends where the recipe changes the weights, or where a source has been read as often as it may. Draws go on being
counted across phases, so a pass over a source may begin in one and end in another. Where a source ends, one row of the
table is made by hand: it takes what is left of that source's last pass, and the others fill the row by their weights.

Shape legend: C streams, S sources.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perceptio.data.period import Ints, Period, period_counts


@dataclass(frozen=True)
class Phase:
    """A stretch of positions under one table; `first` is its first position, a multiple of the streams."""

    first: int
    table: Period
    weights: tuple[float, ...]  # as they were asked for, 0 for a source that is spent
    drawn_S: Ints  # draws of each source before it
    own_SC: Ints  # the same in each stream

    def after(self, rows: int) -> tuple[Ints, Ints]:
        """`drawn_S` and `own_SC` after this many of its rows."""
        draws_S = self.table.draws_in(rows)
        own = [self.table.draws_before(source, int(draws)) for source, draws in enumerate(draws_S)]
        return self.drawn_S + draws_S, self.own_SC + np.stack(own)


class Phases:
    """All phases of a mixture, and its end: the first position that cannot be filled, None where there is none.

    `changes` are (first position, weights), in order, the first at 0; `limits` the most draws of each source, None
    without one.
    """

    def __init__(
        self, changes: Sequence[tuple[int, Sequence[float]]], limits: Sequence[int | None], streams: int
    ) -> None:
        self.streams, self.limits = streams, limits
        self.found: list[Phase] = []
        self.end: int | None = None
        none_S, none_SC = np.zeros(len(limits), np.int64), np.zeros((len(limits), streams), np.int64)
        state, spent = (none_S, none_SC), {s for s, limit in enumerate(limits) if limit == 0}
        for (first, weights), end in zip(changes, [*(p for p, _ in changes[1:]), None], strict=True):
            at: int | None = first
            while at is not None and at != end:
                alive = [0.0 if s in spent else float(weight) for s, weight in enumerate(weights)]
                if not any(alive):
                    self.end = at
                    return
                at, state = self._phase(at, end, alive, state, spent)
                if self.end is not None:
                    return

    @cached_property
    def _firsts(self) -> list[int]:
        return [phase.first for phase in self.found]

    @cached_property
    def _drawn(self) -> list[list[int]]:
        """Of each source, what was drawn before each phase."""
        return [[int(phase.drawn_S[source]) for phase in self.found] for source in range(len(self.limits))]

    def at(self, position: int) -> Phase:
        """The phase that a position stands in."""
        return self.found[bisect.bisect_right(self._firsts, position) - 1]

    def draws_before(self, source: int, draw: int) -> Ints:
        """How many of a source's first `draw` draws fall to each stream: [C]."""
        phase = self.found[bisect.bisect_right(self._drawn[source], draw) - 1]
        own_C: Ints = phase.own_SC[source]
        return own_C + phase.table.draws_before(source, draw - int(phase.drawn_S[source]))

    def _phase(
        self, at: int, end: int | None, alive: list[float], state: tuple[Ints, Ints], spent: set[int]
    ) -> tuple[int | None, tuple[Ints, Ints]]:
        """Adds the phase that begins at `at`, and the row that ends a source; where the next begins, and its state."""
        phase = Phase(at, Period.of(period_counts(alive), self.streams), tuple(alive), *state)
        lasts = {s: phase.table.rows_within(s, left) for s, left in self._left(state[0]).items() if alive[s]}
        rows = min((r for r in lasts.values() if r is not None), default=None)
        until = None if rows is None else at + rows * self.streams
        if until is None or (end is not None and until >= end):
            self.found.append(phase)
            return end, state if end is None else phase.after((end - at) // self.streams)
        if rows:
            self.found.append(phase)
            state = phase.after(rows)
        ending = [s for s, r in lasts.items() if r == rows]
        spent.update(ending)
        draws = self._closing(alive, self._left(state[0]), ending)
        if draws is None:
            self.end = until
            return None, state
        if sum(draws[s] for s in ending) == 0:
            return until, state
        closing = Phase(until, Period.of_one_row(draws), tuple(alive), *state)
        self.found.append(closing)
        return until + self.streams, closing.after(1)

    def _left(self, drawn_S: Ints) -> dict[int, int]:
        return {s: limit - int(drawn_S[s]) for s, limit in enumerate(self.limits) if limit is not None}

    def _closing(self, alive: Sequence[float], left: dict[int, int], ending: Sequence[int]) -> list[int] | None:
        """The draws of the row in which `ending` sources give their last: [S]; None where nothing fills it."""
        draws = [left[s] if s in ending else 0 for s in range(len(alive))]
        others = [s for s, weight in enumerate(alive) if weight and s not in ending]
        while sum(draws) < self.streams:
            open_ = [s for s in others if draws[s] < left.get(s, math.inf)]
            if not open_:
                return None
            # the one that is furthest behind its weight, a draw at a time
            least = min(open_, key=lambda s: ((draws[s] + 1) / alive[s], s))
            draws[least] += 1
        return draws
