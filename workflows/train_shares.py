"""What a training drew of each entry of its mixture, beside what its weights asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from perceptio.data.mixture import Mixture


def counted(lines: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Samples of each entry in some lines of metrics.jsonl: what workers read, not what they should have read."""
    found: Counter[str] = Counter()
    for line in lines:
        found.update(line["samples"])
    return found


def shares(mixture: Mixture, step: int, samples: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Of each entry, over the first `step` global batches, of which `samples` were counted.

    `asked`: the share that its weight asked for, a mean over the steps where weights change or entries are spent;
    `period`: the share that the tables of whole draws have up to here; `share`: that of the samples counted, equal to
    `period` where every step's were; `samples`: their number; `passes`: how often that is its table's rows.
    """
    asked, due = mixture.asked_until(step), mixture.drawn_until(step)
    whole, total = step * mixture.global_batch, max(sum(samples.values()), 1)
    return {
        source.name: {
            "asked": asked[number] / whole,
            "period": due[number] / whole,
            "share": samples.get(source.name, 0) / total,
            "samples": samples.get(source.name, 0),
            "passes": samples.get(source.name, 0) / sum(source.row_groups),
        }
        for number, source in enumerate(mixture.sources)
    }


def shares_table(mixture: Mixture, lines: Iterable[Mapping[str, Any]]) -> str:
    """The shares after the last of all lines of a run's metrics.jsonl, a line an entry."""
    lines = list(lines)
    step = lines[-1]["step"]
    table = RichTable(box=None)
    table.add_column("entry")
    for name in ("asked", "of the periods", "drawn", "samples", "passes"):
        table.add_column(name, justify="right")
    for name, of in shares(mixture, step, counted(lines)).items():
        parts = [f"{of[key]:.4f}" for key in ("asked", "period", "share")]
        table.add_row(name, *parts, f"{of['samples']:,}", f"{of['passes']:.2f}")
    console = Console(width=120, color_system=None)
    with console.capture() as told:
        console.print(table)
    rows = [row.rstrip() for row in told.get().splitlines()]
    return "\n".join([f"what {step} steps drew of the mixture, as shares:", *rows])
