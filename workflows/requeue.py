"""Tries refused rows again after what was wrong with them was mended, and nothing else.

    perceptio requeue --recipe RECIPE --reason missing_file [--stage ingest]

Reads   the shards of every stage's tables that refused rows for the reason
Writes  new revisions of those shards
Needs   what the stages need whose rows are tried again

Rows that are kept now are carried on by `perceptio run`, which redoes in later stages only the rows that are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from schemas.recipe import Recipe
from schemas.tables import BY_RULE, Reason
from workflows import assemble, depth, ingest, masks, tokenize_depth
from workflows.commits import Table
from workflows.store import StageError, open_root

STAGES: Mapping[str, tuple[str, Callable[[Recipe, tuple[Reason, ...]], None]]] = {
    "ingest": ("images", ingest.run),
    "depth": ("depth", depth.run),
    "masks": ("masks", masks.run),
    "tokenize": ("codes", tokenize_depth.run),
    "assemble": ("samples", assemble.run),
}


@dataclass(frozen=True)
class Requeued:
    """What came of a reason's rows in one stage."""

    stage: str
    tried: int
    refused: int  # for the same reason again


def run(recipe: Recipe, reason: str, stage: str | None = None) -> list[Requeued]:
    """What came of it, by stage. Raises StageError for an unknown reason or stage, and where no row was refused so."""
    known = [each.value for each in Reason if each not in BY_RULE]
    if reason not in known:
        raise StageError(f"requeue: --reason '{reason}', expected one of {', '.join(known)}")
    if stage is not None and stage not in STAGES:
        raise StageError(f"requeue: --stage '{stage}', expected one of {', '.join(STAGES)}")
    found = []
    for name, (table, again) in STAGES.items():
        tried = _refused(recipe, table, reason) if stage in (None, name) else 0
        if tried:
            again(recipe, (Reason(reason),))
            found.append(Requeued(name, tried, _refused(recipe, table, reason)))
    if not found:
        raise StageError(f"requeue: no finished or running table under '{recipe.root}' refused a row as '{reason}'")
    return found


def _refused(recipe: Recipe, name: str, reason: str) -> int:
    """Rows of all sources that stand refused for the reason."""
    root = open_root(recipe.root)
    tables = [Table(root, name, source.name) for source in recipe.sources]
    return sum(commit.reasons.get(reason, 0) for table in tables for commit in table.committed().values())
