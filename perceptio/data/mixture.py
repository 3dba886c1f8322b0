"""The weighted mixture: which row of which source stands at a position, as a pure function of (seed, position).

A position is the number of a sample in the run's one global order; a global batch is the next `global_batch` positions.
Position p belongs to stream p mod C, and streams, not workers, own the order: worker r of W serves the streams
[r C/W, (r+1) C/W), so the sequence of global batches is the same for every W that divides C.

Which source (`_Table`). Weights are rounded to whole counts n_s of a period of P draws. A table of P rows x C columns
(streams) holds the source of C P positions and repeats. Its rows are filled by earliest deadline first, which keeps
every source within one draw of its share after each row (Baruah et al. 1996). Each source's draws are then cut into
rounds of C, and the draws of a round are given to C different streams: rows and rounds form a C-regular bipartite
graph, and such a graph splits into C perfect matchings (Koenig), one a stream. Hence, with share f_s = n_s / P,

    |draws of s among the first n of one stream  -  f_s n| < 1    for every n,
    |draws of s among the first n positions      -  f_s n| < 1    for every multiple n of C, so for every global batch,
                                                          < 1 + C f_s (1 - f_s) inside a row.

Which row (`_Order`). The k-th draw of a source, in order of position, belongs to pass k div R of its R rows. In each
pass its row groups are shuffled and laid end to end, and this line of R rows is cut into one stretch a stream, as long
as that stream's draws in this pass. A stream walks its stretch in windows of a few row groups and shuffles the rows
inside a window. So each row comes exactly once a pass, none is dropped, and each row group is read by one stream (by
two where a cut falls inside it, by more where a source has fewer row groups than there are streams). A position is
found by arithmetic: memory grows with the number of row groups, time does not grow with the position.

Shape legend: P rows of the table, C streams, G row groups of a source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

Ints = npt.NDArray[np.int64]
LONGEST_PERIOD = 1024
ROUNDING = 0.001  # relative error of a share at which a shorter period is good enough
WORST_ROUNDING = 0.05  # relative error of a share above which the weights are refused


@dataclass(frozen=True)
class MixtureSource:
    """One source of the mixture: its weight, and the rows of each of its row groups, in the order of its files."""

    name: str
    weight: float
    row_groups: Sequence[int]
    digest: str = ""  # of its table: another table is another mixture


class Slot(NamedTuple):
    """What stands at a position: a row of a row group of a source (by index), and which pass over the source it is."""

    source: int
    pass_number: int
    row_group: int
    row: int


class Mixture:
    """The order of every sample of a run (DESIGN.md, Mixture); all that a run must keep is a position and the digest.

    Raises ValueError for a weight that is not a positive number, for weights too far apart to be held in one period,
    for an empty source, and for a global batch that the streams do not divide.
    """

    def __init__(
        self, sources: Sequence[MixtureSource], *, seed: int, streams: int, global_batch: int, window: int = 2
    ) -> None:
        _check(sources, streams, global_batch, window)
        self.sources, self.seed, self.streams = tuple(sources), seed, streams
        self.global_batch, self.window = global_batch, window
        self.counts = period_counts([source.weight for source in sources])
        self._table = _Table(self.counts, streams)
        self._orders = [_Order(s, i, seed, self._table, window) for i, s in enumerate(self.sources)]

    def at(self, position: int) -> Slot:
        """The sample at a position; the same for ever, at the same cost for every position >= 0."""
        if position < 0:
            raise ValueError(f"position: got {position}, expected 0 or more")
        row, stream = divmod(position, self.streams)
        turn, row = divmod(row, self._table.period)
        source = int(self._table.source_PC[row, stream])
        count = self.counts[source]
        draw = turn * count * self.streams + int(self._table.draw_PC[row, stream])
        own = turn * count + int(self._table.own_PC[row, stream])
        return Slot(source, *self._orders[source].row(draw, stream, own))

    def positions_of(self, step: int, rank: int, world: int) -> list[int]:
        """The positions of global batch `step` that worker `rank` of `world` trains on, in order.

        Raises ValueError if `world` does not divide the streams, or `rank` is not one of its workers.
        """
        if world < 1 or self.streams % world or not 0 <= rank < world:
            raise ValueError(
                f"worker {rank} of {world}: expected a number of workers that divides the {self.streams} streams, "
                "and a rank below it"
            )
        each = self.streams // world
        first = step * self.global_batch
        return [first + b for b in range(self.global_batch) if b % self.streams // each == rank]

    def row_groups_in_use(self, world: int) -> int:
        """Number of row groups of one source that a worker's cache must hold: each stream's window, and the next."""
        return 2 * self.window * (self.streams // world)

    @property
    def shares(self) -> list[float]:
        """The share of each source after rounding: realised shares follow it within the bounds given above."""
        return [count / self._table.period for count in self.counts]

    @property
    def digest(self) -> str:
        """16 hex digits of all that fixes the order; equal digests mean equal samples at every position."""
        parts = [f"1 {self.seed} {self.streams} {self.global_batch} {self.window}".encode()]
        for source in self.sources:
            parts += [source.name.encode(), source.digest.encode(), np.asarray(source.row_groups, "<i8").tobytes()]
        parts += [self._table.source_PC.astype("<i4").tobytes()]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()[:16]

    def state(self, position: int) -> dict[str, int | str]:
        """All that a checkpoint needs to go on at `position`, the number of samples trained on so far."""
        return {"position": position, "digest": self.digest}

    def step_of(self, state: Mapping[str, int | str]) -> int:
        """The step at which a saved state goes on; raises ValueError if it was saved with another mixture."""
        position, digest = int(state["position"]), state["digest"]
        if digest != self.digest or position % self.global_batch:
            raise ValueError(
                f"mixture: the saved state is at position {position} of mixture {digest}, this is mixture "
                f"{self.digest} with global batches of {self.global_batch}: resume with the same sources, weights, "
                "seed and sizes, or start a new run from the saved weights"
            )
        return position // self.global_batch

    def describe(self) -> str:
        """The period table, one line a source: what was asked for, and what stands in every period."""
        asked = math.fsum(source.weight for source in self.sources)
        lines = [f"a period of {self._table.period} draws in each of {self.streams} streams:"]
        for source, count, share in zip(self.sources, self.counts, self.shares, strict=True):
            lines.append(
                f"  {source.name}: {count} of {self._table.period} = {share:.4f} (asked {source.weight / asked:.4f}), "
                f"{sum(source.row_groups)} rows in {len(source.row_groups)} row groups"
            )
        return "\n".join(lines)


def period_counts(weights: Sequence[float]) -> list[int]:
    """Whole draws of each source in one period: the shortest period that holds every share within ROUNDING.

    Raises ValueError if no period up to LONGEST_PERIOD holds them all within WORST_ROUNDING.
    """
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


class _Table:
    """The repeating table of sources, and for each of its cells how many draws of that source came before it."""

    def __init__(self, counts: Sequence[int], streams: int) -> None:
        self.period = sum(counts)
        self.source_PC = _deal(_earliest_deadline_first(counts, streams), counts)
        self.draw_PC = np.zeros((self.period, streams), np.int64)  # in all streams, in order of position
        self.own_PC = np.zeros((self.period, streams), np.int64)  # in this stream
        self.streams_of: list[Ints] = []  # the stream of each draw of a source, in order of position
        for source in range(len(counts)):
            here = self.source_PC == source
            self.draw_PC[here] = np.arange(here.sum())
            self.own_PC[here] = (np.cumsum(here, axis=0) - 1)[here]
            self.streams_of.append(np.nonzero(here)[1])

    def draws_before(self, source: int, draw: int) -> Ints:
        """How many of the first `draw` draws of a source fall to each stream: [C]."""
        streams = self.streams_of[source]
        turns, rest = divmod(draw, len(streams))
        columns = self.source_PC.shape[1]
        before_C: Ints = np.bincount(streams[:rest], minlength=columns) + turns * (len(streams) // columns)
        return before_C


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
        rounds = maximum_bipartite_matching(csr_array(edges_PP), perm_type="column")
        source_PC[:, stream] = np.searchsorted(first_round, rounds, side="right") - 1
        edges_PP[np.arange(period), rounds] -= 1
    return source_PC


@dataclass(frozen=True)
class _Pass:
    """One pass over a source: its row groups in this pass's order, and the stretch of rows of each stream."""

    order_G: Ints
    offset_G1: Ints  # first row of each row group on the line, and the end
    before_C: Ints  # draws of each stream before this pass
    start_C1: Ints  # first row of each stream's stretch, and the end


class _Order:
    """The order in which one source's rows are drawn."""

    def __init__(self, source: MixtureSource, index: int, seed: int, table: _Table, window: int) -> None:
        self._rows_G = np.asarray(source.row_groups, np.int64)
        self._rows = int(self._rows_G.sum())
        self._index, self._table, self._window = index, table, window
        self._key = int.from_bytes(hashlib.sha256(f"{seed} {index} {source.name}".encode()).digest()[:8], "little")
        streams = table.source_PC.shape[1]
        self._pass = lru_cache(maxsize=4)(self._make_pass)
        self._inside = lru_cache(maxsize=2 * streams)(_shuffled)

    def row(self, draw: int, stream: int, own: int) -> tuple[int, int, int]:
        """Pass, row group and row of the source's `draw`-th draw, which is the `own`-th of its stream."""
        number = draw // self._rows
        this = self._pass(number)
        start, end = int(this.start_C1[stream]), int(this.start_C1[stream + 1])
        own -= int(this.before_C[stream])
        # Odd streams walk backward: then neighbours reach the row group that their cut divides at the same time.
        on_line = start + own if stream % 2 == 0 else end - 1 - own
        first, group = (int(g) for g in np.searchsorted(this.offset_G1, (start, on_line), side="right") - 1)
        group -= (group - first) % self._window
        low = max(start, int(this.offset_G1[group]))
        high = min(end, int(this.offset_G1[min(group + self._window, len(this.order_G))]))
        on_line = low + int(self._inside(_mix(self._key + number, low), high - low)[on_line - low])
        group = int(np.searchsorted(this.offset_G1, on_line, side="right")) - 1
        return number, int(this.order_G[group]), on_line - int(this.offset_G1[group])

    def _make_pass(self, number: int) -> _Pass:
        order_G = _shuffled(_mix(self._key + number, -1), len(self._rows_G))
        offset_G1 = np.concatenate([[0], np.cumsum(self._rows_G[order_G])])
        before_C = self._table.draws_before(self._index, number * self._rows)
        after_C = self._table.draws_before(self._index, (number + 1) * self._rows)
        return _Pass(order_G, offset_G1, before_C, np.concatenate([[0], np.cumsum(after_C - before_C)]))


def _shuffled(key: int, count: int) -> Ints:
    """A permutation of range(count) fixed by `key`: by hashes of our own, since numpy's streams may change."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def _mix(key: int, number: int) -> int:
    """64 bits of (key, number)."""
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest(), "little")


def _check(sources: Sequence[MixtureSource], streams: int, global_batch: int, window: int) -> None:
    if not sources:
        raise ValueError("mixture: got no source, expected at least one: list them in train.mixture")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"weight of source '{source.name}': got {source.weight}, expected a positive number")
        if not source.row_groups or min(source.row_groups) < 1:
            raise ValueError(
                f"row groups of source '{source.name}': got {list(source.row_groups)[:8]}, expected at least one, each "
                "of at least one row: assemble the source again, or take it out of the mixture"
            )
    if streams < 1 or window < 1 or global_batch < 1 or global_batch % streams:
        raise ValueError(
            f"global_batch {global_batch}, streams {streams}, window {window}: expected positive numbers, "
            "and a global batch that is a multiple of the streams"
        )
