"""A pool of Ray Data actors over rows: the one way in which data stages and their checks use the engine.

Tests of what is done to tables, and not of the engine, put a loop in this process in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray.data

from schemas.recipe import PoolRecipe, Recipe
from workflows.runtime import start

Row = dict[str, Any]


def on_actors(
    recipe: Recipe,
    rows: Sequence[Row],
    actor: Callable[..., Callable[[Row], Row]],
    arguments: Mapping[str, Any],
    *,
    pool: PoolRecipe,
    blocks: int,
) -> Iterator[Row]:
    """actor(**arguments)(row) for every row, in the order in which they get done.

    Rows are handed out in `blocks` portions. Starts Ray at once, the actors when the first result is asked for. That
    raises RayTaskError with the cause where an actor raised, RayError where one was lost more often than Ray repeats
    its work.
    """
    start(recipe)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours count rows, not blocks
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    made: Any = actor
    results = ray.data.from_items(list(rows), override_num_blocks=blocks).map(
        made,
        fn_constructor_kwargs=dict(arguments),
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=max(pool.min_actors, min(pool.max_actors, blocks)),
            max_tasks_in_flight_per_actor=2,  # one would keep the pool from ever growing, more would queue up rows
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    return iter(results.iter_rows())
