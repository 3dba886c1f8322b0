"""The weighted mixture: which row of which source stands at a position, as a pure function of (seed, position).

A position is the number of a sample in the run's one global order; a global batch is the next `global_batch` positions.
Position p belongs to stream p mod C, and streams, not workers, own the order: worker r of W serves the streams
[r C/W, (r+1) C/W), so the sequence of global batches is the same for every W that divides C.

Which source (`Period`). A table of P rows and C columns holds the source of C P positions and repeats, while weights
stay what they are (`Phases`). With share f_s = n_s / P, and counted from where a phase begins,

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

from perceptio.data.period import Ints, period_counts
from perceptio.data.phases import Phase, Phases


@dataclass(frozen=True)
class MixtureSource:
    """One source of the mixture: its weight, and the rows of each of its row groups, in the order of its files."""

    name: str
    weight: float
    row_groups: Sequence[int]
    digest: str = ""  # of its table: another table is another mixture
    max_passes: int | None = None  # over its rows, after which the others share its place


class WeightChange(NamedTuple):
    """From global batch `step` on the sources have these weights; 0 leaves a source out."""

    step: int
    weights: tuple[float, ...]


class Slot(NamedTuple):
    """What stands at a position: a row of a row group of a source (by index), and which pass over the source it is."""

    source: int
    pass_number: int
    row_group: int
    row: int


class Windows(NamedTuple):
    """Row groups of a source that one stream draws from, and those that it will draw from next; () where it will not.

    In a pass a stream's windows have no row group in common.
    """

    now: tuple[int, ...]
    next: tuple[int, ...]


class Mixture:
    """The order of every sample of a run (DESIGN.md, Mixture); all that a run must keep is a position and the digest.

    Raises ValueError for a weight that is not a positive number, for weights too far apart to be held in one period,
    for an empty source, and for a global batch that the streams do not divide.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int,
        streams: int,
        global_batch: int,
        window: int = 2,
        changes: Sequence[WeightChange] = (),
    ) -> None:
        _check(sources, streams, global_batch, window)
        _check_changes(sources, changes)
        self.sources, self.seed, self.streams = tuple(sources), seed, streams
        self.global_batch, self.window = global_batch, window
        self.counts = period_counts([source.weight for source in sources])  # until the first change
        weights = [(0, [source.weight for source in sources])]
        weights += [(change.step * global_batch, list(change.weights)) for change in changes]
        limits = [None if s.max_passes is None else s.max_passes * sum(s.row_groups) for s in sources]
        self.phases = Phases(weights, limits, streams)
        self._orders = [_Order(s, i, seed, self.phases, window) for i, s in enumerate(self.sources)]

    def at(self, position: int) -> Slot:
        """The sample at a position; the same for ever, at the same cost for every position >= 0.

        Raises ValueError below 0, and behind the end of a mixture whose sources are all spent.
        """
        end = self.phases.end
        if position < 0 or (end is not None and position >= end):
            raise ValueError(
                f"position: got {position}, expected 0 or more{f', below {end}' if end is not None else ''}"
            )
        source, draw, stream, own = self._draw(position)
        return Slot(source, *self._orders[source].row(draw, stream, own))

    def windows(self, position: int) -> Windows:
        """Of the stream that has a position, and of the source that stands there: what to hold and what to read ahead.

        Raises ValueError as `at` does.
        """
        self.at(position)
        source, draw, stream, own = self._draw(position)
        return self._orders[source].windows(draw, stream, own)

    def _draw(self, position: int) -> tuple[int, int, int, int]:
        """The source at a position, which of its draws that is, its stream, and which of the stream's draws of it."""
        phase = self.phases.at(position)
        table = phase.table
        row, stream = divmod(position - phase.first, self.streams)
        turn, row = divmod(row, table.rows)
        source = int(table.source_PC[row, stream])
        each = len(table.streams_of[source])  # draws of a turn
        draw = int(phase.drawn_S[source]) + turn * each + int(table.draw_PC[row, stream])
        own = int(phase.own_SC[source, stream]) + turn * (each // self.streams) + int(table.own_PC[row, stream])
        return source, draw, stream, own

    @property
    def steps(self) -> int | None:
        """How many whole global batches there are before every source is spent; None where they never end."""
        return None if self.phases.end is None else self.phases.end // self.global_batch

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
        """Most row groups of one source in the `windows` of all streams of a worker: what its cache must hold."""
        return 2 * self.window * (self.streams // world)

    @property
    def shares(self) -> list[float]:
        """The share of each source after rounding, until the first change: realised shares follow it within the bounds
        given above."""
        return [count / sum(self.counts) for count in self.counts]

    def asked_until(self, step: int) -> list[float]:
        """Samples of each source that weights asked for in the first `step` global batches, before any rounding."""
        end, found = step * self.global_batch, self.phases.found
        ends = [*(phase.first for phase in found[1:]), end]
        parts = [
            max(0, min(to, end) - phase.first) / math.fsum(phase.weights) for phase, to in zip(found, ends, strict=True)
        ]
        asked = zip(*(phase.weights for phase in found), strict=True)
        return [math.fsum(part * weight for part, weight in zip(parts, weights, strict=True)) for weights in asked]

    def drawn_until(self, step: int) -> list[int]:
        """Samples of each source in the first `step` global batches, at the same cost for every step that there is."""
        position = step * self.global_batch
        phase = self.phases.at(position)
        return [int(n) for n in phase.drawn_S + phase.table.draws_in((position - phase.first) // self.streams)]

    @property
    def digest(self) -> str:
        """16 hex digits of all that fixes the order; equal digests mean equal samples at every position."""
        parts = [f"1 {self.seed} {self.streams} {self.global_batch} {self.window}".encode()]
        for source in self.sources:
            parts += [source.name.encode(), source.digest.encode(), np.asarray(source.row_groups, "<i8").tobytes()]
        first, *later = self.phases.found
        parts += [first.table.source_PC.astype("<i4").tobytes()]
        for phase in later:
            parts += [str(phase.first).encode(), phase.table.source_PC.astype("<i4").tobytes()]
        if self.phases.end is not None:
            parts += [str(self.phases.end).encode()]
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
        """The period table of each phase, one line a source: what was asked for, and what stands in every period."""
        lines = []
        for phase in self.phases.found:
            lines += self._described(phase)
        if self.phases.end is not None:
            lines.append(f"all sources are spent after {self.steps} global batches")
        return "\n".join(lines)

    def _described(self, phase: Phase) -> list[str]:
        asked, rows = math.fsum(phase.weights), phase.table.rows
        since = f"from position {phase.first}, " if phase.first else ""
        lines = [f"{since}a period of {rows} draws in each of {self.streams} streams:"]
        for number, source in enumerate(self.sources):
            count = len(phase.table.streams_of[number]) / self.streams
            lines.append(
                f"  {source.name}: {count:g} of {rows} = {count / rows:.4f} (asked"
                f" {phase.weights[number] / asked:.4f}), {sum(source.row_groups)} rows in"
                f" {len(source.row_groups)} row groups"
            )
        return lines


@dataclass(frozen=True)
class _Pass:
    """One pass over a source: its row groups in this pass's order, and the stretch of rows of each stream."""

    order_G: Ints
    offset_G1: Ints  # first row of each row group on the line, and the end
    before_C: Ints  # draws of each stream before this pass
    start_C1: Ints  # first row of each stream's stretch, and the end


class _Order:
    """The order in which one source's rows are drawn."""

    def __init__(self, source: MixtureSource, index: int, seed: int, phases: Phases, window: int) -> None:
        self._rows_G = np.asarray(source.row_groups, np.int64)
        self._rows = int(self._rows_G.sum())
        self._index, self._phases, self._window, self._passes = index, phases, window, source.max_passes
        self._key = int.from_bytes(hashlib.sha256(f"{seed} {index} {source.name}".encode()).digest()[:8], "little")
        streams = phases.streams
        self._pass = lru_cache(maxsize=4)(self._make_pass)
        self._inside = lru_cache(maxsize=2 * streams)(_shuffled)

    def row(self, draw: int, stream: int, own: int) -> tuple[int, int, int]:
        """Pass, row group and row of the source's `draw`-th draw, which is the `own`-th of its stream."""
        number = draw // self._rows
        this = self._pass(number)
        on_line = _on_line(this, stream, own)
        _, low, high = self._window_at(this, stream, on_line)
        on_line = low + int(self._inside(_mix(self._key + number, low), high - low)[on_line - low])
        group = int(np.searchsorted(this.offset_G1, on_line, side="right")) - 1
        return number, int(this.order_G[group]), on_line - int(this.offset_G1[group])

    def windows(self, draw: int, stream: int, own: int) -> Windows:
        """The window of a draw, and its stream's next one: behind the last of a pass, the first of the next pass."""
        number = draw // self._rows
        this = self._pass(number)
        now, low, high = self._window_at(this, stream, _on_line(this, stream, own))
        own = int(this.before_C[stream])
        own += high - int(this.start_C1[stream]) if stream % 2 == 0 else int(this.start_C1[stream + 1]) - low
        if own - int(this.before_C[stream]) == int(this.start_C1[stream + 1] - this.start_C1[stream]):
            if number + 1 == self._passes:
                return Windows(now, ())
            this = self._pass(number + 1)
            if this.start_C1[stream] == this.start_C1[stream + 1]:
                return Windows(now, ())
        return Windows(now, self._window_at(this, stream, _on_line(this, stream, own))[0])

    def _window_at(self, this: _Pass, stream: int, on_line: int) -> tuple[tuple[int, ...], int, int]:
        """The row groups of the window that a row on the line belongs to, and its first row and its end there."""
        start, end = int(this.start_C1[stream]), int(this.start_C1[stream + 1])
        first, group = (int(g) for g in np.searchsorted(this.offset_G1, (start, on_line), side="right") - 1)
        group -= (group - first) % self._window
        low = max(start, int(this.offset_G1[group]))
        high = min(end, int(this.offset_G1[min(group + self._window, len(this.order_G))]))
        last = int(np.searchsorted(this.offset_G1, high, side="left"))
        return tuple(this.order_G[group:last].tolist()), low, high

    def _make_pass(self, number: int) -> _Pass:
        order_G = _shuffled(_mix(self._key + number, -1), len(self._rows_G))
        offset_G1 = np.concatenate([[0], np.cumsum(self._rows_G[order_G])])
        before_C = self._phases.draws_before(self._index, number * self._rows)
        after_C = self._phases.draws_before(self._index, (number + 1) * self._rows)
        return _Pass(order_G, offset_G1, before_C, np.concatenate([[0], np.cumsum(after_C - before_C)]))


def _on_line(this: _Pass, stream: int, own: int) -> int:
    """Where on the line a stream's `own`-th draw stands.

    Odd streams walk backward: then neighbours reach the row group that their cut divides at the same time.
    """
    own -= int(this.before_C[stream])
    return int(this.start_C1[stream]) + own if stream % 2 == 0 else int(this.start_C1[stream + 1]) - 1 - own


def weights_by_size(rows: Sequence[float], temperature: float) -> list[float]:
    """rows ** (1 / temperature), as shares that add up to 1 (as in mT5, Xue et al. 2020)."""
    powers = [math.log(count) / temperature for count in rows]
    least = max(powers)  # so that no power overflows
    found = [math.exp(power - least) for power in powers]
    return [weight / math.fsum(found) for weight in found]


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
        if source.max_passes is not None and source.max_passes < 1:
            raise ValueError(f"max_passes of source '{source.name}': got {source.max_passes}, expected at least 1")
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


def _check_changes(sources: Sequence[MixtureSource], changes: Sequence[WeightChange]) -> None:
    for before, change in zip([0, *(change.step for change in changes)], changes, strict=False):
        if change.step <= before:
            raise ValueError(f"changes of weights: step {change.step} comes after step {before}, expected rising steps")
        weights = change.weights
        if len(weights) != len(sources) or not any(weights) or not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(
                f"weights from step {change.step}: got {weights}, expected {len(sources)} numbers from 0, not all 0"
            )
