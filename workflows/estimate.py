"""From a sample's measurements to the whole data: rates, spans, sizes, requests, money. Plain arithmetic, no engine.

A shard takes fixed + rate x rows seconds, and its file fixed + rate x rows bytes; a pool takes shards in order, each by
the actor that is free first. What else a stage took in the sample (start of actors, loading of weights, first batches)
it takes once in the whole run too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from schemas.recipe import MachineRecipe, PoolRecipe, PriceRecipe

MULTIPART = 100 * 2**20  # bytes from which a file is uploaded in parts
PART = 50 * 2**20  # bytes of a part
LIST_KEYS = 1000  # names in one answer of a store


@dataclass(frozen=True)
class Line:
    """fixed + rate[group] x rows, of seconds or bytes."""

    fixed: float
    rate: Mapping[str, float]

    def at(self, group: str, rows: float) -> float:
        """The value for some rows of a group."""
        return self.fixed + self.rate[group] * rows


@dataclass(frozen=True)
class Rows:
    """Rows of one source in a table, by shard."""

    source: str
    shards: Sequence[float]

    @property
    def total(self) -> float:
        return float(sum(self.shards))

    def times(self, share: float) -> Rows:
        """The rows of a table of which each row gives `share` rows."""
        return Rows(self.source, [rows * share for rows in self.shards])


@dataclass(frozen=True)
class Requests:
    """Requests to an S3 store, by what they cost."""

    puts: float = 0.0  # PUT, POST, LIST
    gets: float = 0.0  # GET, HEAD

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.puts + other.puts, self.gets + other.gets)


@dataclass(frozen=True)
class Fleet:
    """Actors of a pool on machines of one kind."""

    kind: str
    actors: int
    machines: int


def fitted(points: Sequence[tuple[str, float, float]]) -> Line:
    """The line through points of (group, rows, value) with one fixed part and a rate for each group, none below zero.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("a line needs points, got none")
    groups = sorted({group for group, _, _ in points})
    matrix = np.zeros((len(points), 1 + len(groups)))
    matrix[:, 0] = 1
    for place, (group, rows, _) in enumerate(points):
        matrix[place, 1 + groups.index(group)] = rows
    found, _ = nnls(matrix, np.array([value for _, _, value in points], np.float64))
    return Line(float(found[0]), dict(zip(groups, map(float, found[1:]), strict=True)))


def span(seconds: Sequence[float], starts: Sequence[float]) -> float:
    """Seconds until all shards are done, each taken in order by the actor that is free first.

    starts: when each actor is there; one that comes too late gets no shard.
    """
    free = sorted(starts)
    end = 0.0
    for need in seconds:
        done = heapq.heappop(free) + need
        end = max(end, done)
        heapq.heappush(free, done)
    return end


def starts(pool: PoolRecipe, actors: int, late: float) -> list[float]:
    """When each of so many actors is there: the pool's first ones at 0, those that it adds `late` seconds after."""
    return [0.0 if place < pool.min_actors else late for place in range(actors)]


def shard_rows(rows: float, weight: float, shards: int, rows_per_shard: int) -> list[float]:
    """Rows of each shard of a source that was cut by weight: full ones, and the rest in the last."""
    full = rows * rows_per_shard / weight if weight else 0.0
    if shards < 2 or full * (shards - 1) >= rows:
        return [rows / shards] * shards
    return [full] * (shards - 1) + [rows - full * (shards - 1)]


def stretch(actors: int, busy: float, cores: float) -> float:
    """How much longer a shard takes where so many actors, each busy on `busy` cores, want more cores than there are."""
    return max(1.0, actors * busy / cores)


def fleet(pool: PoolRecipe, machines: Mapping[str, MachineRecipe], busy: float, memory_gb: float, most: int) -> Fleet:
    """The most actors that do good on the machines: of `most` shards each one has to have one.

    A pool with accelerators works on the kinds that have them, others on kinds without if there are any. Raises
    ValueError where no machine holds one actor.
    """
    fit = {kind: _per_machine(pool, machine, busy, memory_gb) for kind, machine in machines.items()}
    able = [kind for kind, count in fit.items() if count]
    plain = [kind for kind in able if not machines[kind].gpus]
    if not able:
        raise ValueError(
            f"no machine of plan.machines holds one actor of cpus {pool.cpus:g}, gpus {pool.gpus:g} and"
            f" {memory_gb:.1f} GB: name a larger one"
        )
    kinds = able if pool.gpus else plain or able
    kind = max(kinds, key=lambda kind: fit[kind] * machines[kind].count)
    actors = max(1, min(most, fit[kind] * machines[kind].count))
    return Fleet(kind, actors, math.ceil(actors / fit[kind]))


def _per_machine(pool: PoolRecipe, machine: MachineRecipe, busy: float, memory_gb: float) -> int:
    """Actors that fit on one machine by its CPUs, by the cores that they keep busy, by memory and accelerators."""
    limits = [machine.cpus / pool.cpus, machine.cpus / max(busy, 0.01), machine.memory_gb / max(memory_gb, 0.01)]
    if pool.gpus:
        limits.append(machine.gpus / pool.gpus)
    held = int(min(limits))
    fits = machine.cpus >= pool.cpus and machine.memory_gb >= memory_gb and machine.gpus >= pool.gpus
    return max(held, 1) if fits else 0


def shard_requests(inputs: int, size: float, reject_share: float) -> Requests:
    """What one shard costs: its own marker looked for, its inputs read, its files and its marker written.

    inputs: tables that it is made from, each two looks for a marker and one file; size: bytes of its file;
    reject_share: chance that it has a file of rejects.
    """
    puts = 1 + reject_share + (1 if size < MULTIPART else 2 + math.ceil(size / PART))
    return Requests(puts, 1 + 3 * inputs)


def stage_requests(shards: int, inputs: int) -> Requests:
    """What a table of one source costs besides its shards, in the driver: plan, manifests, listings.

    inputs: tables whose manifests are looked at.
    """
    listed = 1 + shards // LIST_KEYS
    return Requests(puts=5 + 3 * listed, gets=3 + inputs)


def money(amount: float, prices: PriceRecipe | None, field: str, per: float) -> float | None:
    """USD for an amount at a price of the table, None without one."""
    return None if prices is None else amount / per * float(getattr(prices, field))
