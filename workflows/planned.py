"""A plan beside what became of it: ROOT/plan.json, and what a finished table's manifest says of both."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from schemas.plan import PLAN_NAME, Plan
from schemas.recipe import Recipe
from workflows.commits import Table
from workflows.store import DamagedTableError, Root


def read_plan(root: Root, recipe: Recipe) -> Plan | None:
    """The root's plan, None where there is none or where it is of another recipe.

    Raises DamagedTableError for a file that is no plan.
    """
    data = root.read(PLAN_NAME)
    if data is None:
        return None
    try:
        plan = Plan.model_validate_json(data)
    except ValidationError as error:
        raise DamagedTableError(f"{root.at(PLAN_NAME)} cannot be read: {error}; delete it, or plan again") from error
    return plan if plan.recipe == recipe.digest else None


def planned_and_actual(
    plan: Plan | None, table: Table, *, rows: int, seconds: float, wall: float, size: int
) -> dict[str, Any]:
    """Planned and actual figures of a table for its manifest; {} where it was not planned.

    rows were done by this run in `seconds` of actors' time; wall: seconds from its first look at the table to now, in
    which the stage worked on all sources; size: bytes of the table. Hours are the stage's.
    """
    expected = None if plan is None else plan.table(table.name, table.source)
    if plan is None or expected is None:
        return {}
    stage = plan.stage(table.stage)
    return {
        "planned": {
            "rows": expected.read,
            "bytes": expected.bytes,
            "rows_per_s_actor": stage.rows_per_s_actor,
            "hours": stage.hours - stage.preparing_hours,
        },
        "actual": {
            "rows": rows,
            "bytes": size,
            "rows_per_s_actor": round(rows / seconds, 4) if seconds else 0.0,
            "hours": wall / 3600,
        },
    }


def codebook_planned_and_actual(plan: Plan | None, seconds: float) -> dict[str, Any]:
    """The same of the codebook, which was learnt in one go in these wall-clock seconds; {} where it was not planned."""
    if plan is None:
        return {}
    stage = plan.stage("codebook")
    return {"planned": {"hours": stage.hours - stage.preparing_hours}, "actual": {"hours": seconds / 3600}}
