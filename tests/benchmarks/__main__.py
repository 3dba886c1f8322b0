"""Runs the benchmarks: `python -m tests.benchmarks [NAME ...]`, all of them without a name.

Each module beside this one is a benchmark with `run() -> dict`: {"name", "what", "value", "unit", "bar",
"higher_is_better", "holds", "rows": [every measured row]}. Written to runs/bench/NAME.json, and a table on the
terminal; exit 1 where a bar is missed.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUT = Path("runs/bench")


def main(names: list[str]) -> int:
    """0 if every bar holds, else 1."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; known: {', '.join(known) or 'none yet'}", file=sys.stderr)
        return 2
    table = Table("benchmark", "what", "value", "bar", "holds")
    OUT.mkdir(parents=True, exist_ok=True)
    holds = True
    for name in names or known:
        found = importlib.import_module(f"tests.benchmarks.{name}").run()
        (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        holds &= bool(found["holds"])
        bar = f"{'>=' if found['higher_is_better'] else '<='} {found['bar']:g}"
        table.add_row(
            name, found["what"], f"{found['value']:.3g} {found['unit']}", bar, "yes" if found["holds"] else "NO"
        )
    Console().print(table if known else "there are no benchmarks yet")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
