"""A plan, and a plan beside what became of it, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table as RichTable

from schemas.plan import Plan, TrainingPlan
from workflows.plan import Compared

WIDE = 220  # columns where the output is no terminal, so that nothing is cut
STAGE_COLUMNS = (
    "stage", "rows", "shards", "rows/s an actor", "cores", "GB", "actors", "hours", "suggested actors", "hours then",
    "machines", "PUT", "GET", "USD",
)  # fmt: skip


def show(plan: Plan) -> None:
    """Prints a plan: stages, storage by table, totals, what to know."""
    console = Console()
    console = console if console.is_terminal else Console(width=WIDE)
    console.print(_stages(plan))
    console.print(_storage(plan))
    for line in _totals(plan):
        console.print(line, markup=False, highlight=False)


def show_compared(rows: Sequence[Compared]) -> None:
    """Prints a finished run beside its plan."""
    table = RichTable("stage", *(f"{what}{when}" for what in ("hours", "rows", "bytes") for when in (" planned", "")))
    for row in rows:
        hours = "-" if row.hours is None else f"{_hours(row.hours)} ({_off(row.hours, row.planned_hours)})"
        count = "-" if row.rows is None else f"{row.rows:,}"
        size = "-" if row.bytes is None else f"{_size(row.bytes)} ({_off(row.bytes, row.planned_bytes)})"
        planned = f"{row.planned_rows:,}" if row.planned_rows else "-"
        table.add_row(row.stage, _hours(row.planned_hours), hours, planned, count, _size(row.planned_bytes), size)
    console = Console()
    (console if console.is_terminal else Console(width=WIDE)).print(table)


def _stages(plan: Plan) -> RichTable:
    table = RichTable(*STAGE_COLUMNS, title=f"{plan.name}: measured on {plan.sample_rows:,} rows, {plan.cores} cores")
    for stage in plan.stages:
        mark = " *" if stage.stage == plan.bottleneck else ""
        table.add_row(
            f"{stage.stage}{mark}",
            f"{stage.rows:,}",
            f"{stage.shards:,}" if stage.shards else "-",
            f"{stage.rows_per_s_actor:,.2f}",
            f"{stage.cores_per_actor:.1f}",
            f"{stage.memory_gb:.1f}" if stage.memory_gb else "-",
            f"{stage.actors:,}",
            _hours(stage.hours),
            f"{stage.suggested_actors:,}",
            _hours(stage.suggested_hours),
            f"{stage.machines} {stage.machine}" if stage.machine else "this one",
            f"{stage.puts:,}",
            f"{stage.gets:,}",
            _usd(stage.usd),
        )
    return table


def _storage(plan: Plan) -> RichTable:
    table = RichTable("table", "source", "rows in", "rows kept", "bytes", "bytes a row", title="storage")
    for part in plan.tables:
        each = f"{part.bytes / part.kept:,.0f}" if part.kept else "-"
        table.add_row(part.table, part.source, f"{part.read:,}", f"{part.kept:,}", _size(part.bytes), each)
    return table


def _totals(plan: Plan) -> Iterator[str]:
    yield f"hours: {_hours(plan.hours)} with the recipe's pools, {_hours(plan.suggested_hours)} with those suggested"
    yield f"bottleneck: {plan.bottleneck}"
    yield f"storage: {_size(plan.bytes)}, {_usd(plan.storage_usd_per_month)} USD a month"
    yield f"requests, on S3: {plan.puts:,} PUT, {plan.gets:,} GET, {_usd(plan.requests_usd)} USD"
    yield f"machines: {_usd(plan.machines_usd)} USD"
    if plan.training is not None:
        yield _training(plan.training)
    if plan.machines_usd is None or plan.requests_usd is None:
        yield "no money where plan.machines or plan.prices of the recipe name no price"
    changed = [stage for stage in plan.stages if stage.suggested_actors != stage.actors and stage.stage != "codebook"]
    for stage in changed:
        yield f"suggestion: --set {stage.stage}.pool.max_actors={stage.suggested_actors}"
    for note in plan.notes:
        yield f"note: {note}"


def _training(plan: TrainingPlan) -> str:
    on_device = plan.weights + plan.gradients + plan.optimizer
    elsewhere = f", {_size(plan.offloaded)} more in the machine's memory" if plan.offloaded else ""
    return (
        f"train: {plan.parameters:,} parameters, {plan.trained:,} trained; each of {plan.workers} workers at ZeRO stage"
        f" {plan.zero_stage} holds {_size(on_device)} (weights {_size(plan.weights)}, gradients"
        f" {_size(plan.gradients)}, optimizer {_size(plan.optimizer)}){elsewhere}; activations come on top, which the"
        " pre-flight of `train` measures"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.4f}"


def _usd(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.2f}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _off(actual: float, planned: float) -> str:
    return f"{100 * (actual / planned - 1):+.0f} %" if planned else "-"
