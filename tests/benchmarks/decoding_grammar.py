"""What the grammar costs: our loop with it and without it, over words, where both compute the whole head.

The quickest turn of each side counts: other work on the machine only ever adds time, and more than what is measured.
The median of the turns' ratios stands beside it. Nothing is asked for, so that every token is chosen under the
grammar's longest list of what may not come.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.benchmarks._decoding import ours

WORDS, REPEATS, BAR = 48, 15, 1.02


def run() -> dict[str, Any]:
    """The benchmark's result; who goes first changes with every turn."""
    ours("off", "off", 1)
    rows = []
    for turn in range(REPEATS):
        taken = {}
        for use_grammar in (True, False) if turn % 2 else (False, True):
            began = time.perf_counter()
            replies = ours("off", "off", WORDS, use_grammar=use_grammar)
            taken[use_grammar] = time.perf_counter() - began
            assert {len(ids) for ids in replies} == {WORDS}
        rows.append({"with_grammar_s": taken[True], "without_s": taken[False]})
    value = min(row["with_grammar_s"] for row in rows) / min(row["without_s"] for row in rows)
    return {
        "name": "decoding_grammar",
        "what": "the quickest turn of our loop with the grammar, of the quickest without",
        "value": value,
        "unit": "x",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "median": statistics.median(row["with_grammar_s"] / row["without_s"] for row in rows),
        "rows": rows,
    }
