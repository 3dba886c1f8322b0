"""Runs the benchmarks: `python -m tests.benchmarks [--to FOLDER] [NAME ...]`, all of them without a name.

Each module beside this one is a benchmark with `run() -> dict`: {"name", "what", "value", "unit", "bar",
"higher_is_better", "holds", "rows": [every measured row]}. Written to FOLDER/NAME.json with the code and the machine,
and a table on the terminal; exit 1 where a bar is missed. `make bench` writes to docs/bench.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from workflows.runtime import code_version


def processor() -> str:
    """The processor's name as Linux has it; blank where it has none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def main(names: list[str], to: Path) -> int:
    """0 if every bar holds, else 1."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; known: {', '.join(known) or 'none yet'}", file=sys.stderr)
        return 2
    table = Table("benchmark", "what", "value", "bar", "holds")
    to.mkdir(parents=True, exist_ok=True)
    where = {"code": code_version(), "cores": os.cpu_count(), "cpu": processor()}
    holds = True
    for name in names or known:
        found = importlib.import_module(f"tests.benchmarks.{name}").run()
        (to / f"{name}.json").write_text(json.dumps(found | where, indent=1) + "\n", encoding="utf-8")
        holds &= bool(found["holds"])
        bar = f"{'>=' if found['higher_is_better'] else '<='} {found['bar']:g}"
        table.add_row(
            name, found["what"], f"{found['value']:.3g} {found['unit']}", bar, "yes" if found["holds"] else "NO"
        )
    Console().print(table if known else "there are no benchmarks yet")
    return 0 if holds else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--to", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    sys.exit(main(options.names, options.to))
