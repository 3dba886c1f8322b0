"""The rows at a worker's positions, each row group read once and before it is needed.

A stream draws from a window of a few row groups at a time (`perceptio.data.mixture`). When it enters one, the next is
asked for: a store has as long to answer as the window lasts (once a pass, where a stream's last window is a remnant,
only as long as that). The tables' caches hold the two windows of each stream of the worker,
`Mixture.row_groups_in_use` row groups, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perceptio.data.mixture import Mixture, Slot, Windows
from perceptio.data.shards import SampleTable, UnreadableError


class Reader:
    """The rows of the tables of a mixture's sources for one of `world` workers, who asks for its positions in order.

    Other orders give the same rows and read more. For one thread at a time.
    """

    def __init__(self, mixture: Mixture, tables: Sequence[SampleTable], *, world: int = 1) -> None:
        self.mixture, self.tables, self.world = mixture, tables, world
        for table in tables:
            table.cached = mixture.row_groups_in_use(world)
        self._unreadable: list[dict[int, UnreadableError]] = [{} for _ in tables]  # of row groups, tried enough
        self._windows: list[dict[int, tuple[int, Windows]]] = [{} for _ in tables]  # by stream: its pass, its windows

    def row(self, position: int) -> tuple[Slot, dict[str, Any]]:
        """What stands at a position, and its row.

        Raises as `Mixture.at` and `SampleTable.row` do. A row group that is unreadable once stays so for this reader,
        so that a run that leaves it out leaves out all of it.
        """
        slot, stream = self.mixture.at(position), position % self.mixture.streams
        if not self._holds(slot, stream):
            self._enter(slot, stream, self.mixture.windows(position))
        unreadable = self._unreadable[slot.source]
        if (known := unreadable.get(slot.row_group)) is not None:
            raise UnreadableError(known.group, known.why)  # a new one: an error keeps the frames of all its raises
        try:
            return slot, self.tables[slot.source].row(slot.row_group, slot.row)
        except UnreadableError as error:
            unreadable[slot.row_group] = error
            raise

    def begin(self, step: int, rank: int) -> None:
        """Asks for all row groups that the streams of worker `rank` will draw from first, from global batch `step` on.

        Without it, each is asked for as its stream comes to it. A source that they do not draw within a period of the
        mixture is left out.
        """
        first, phase = step * self.mixture.global_batch, self.mixture.phases.at(step * self.mixture.global_batch)
        end, each = self.mixture.phases.end, self.mixture.streams // self.world
        last = first + phase.table.rows * self.mixture.streams
        found: dict[tuple[int, int], Windows] = {}
        for position in range(first, last if end is None else min(last, end)):
            stream = position % self.mixture.streams
            if stream // each != rank:
                continue
            source = self.mixture.at(position).source
            if (source, stream) not in found:
                found[source, stream] = self.mixture.windows(position)
        for (source, _), windows in found.items():
            self.tables[source].prefetch(windows.now)

    def close(self) -> None:
        """Stops reading ahead."""
        for table in self.tables:
            table.close()

    def _holds(self, slot: Slot, stream: int) -> bool:
        """Whether the stream drew from the slot's window before, or was about to draw from it when it was asked for."""
        known = self._windows[slot.source].get(stream)
        return known is not None and known[0] == slot.pass_number and slot.row_group in known[1].now

    def _enter(self, slot: Slot, stream: int, windows: Windows) -> None:
        held = self._windows[slot.source]
        held.pop(stream, None)
        held[stream] = (slot.pass_number, windows)
        # what is asked for last is let go last: first all that others hold, so that only what nobody needs has to go
        wanted = [group for _, theirs in held.values() for group in (*theirs.now, *theirs.next)]
        self.tables[slot.source].prefetch(g for g in wanted if g not in self._unreadable[slot.source])
