"""Padding of micro-batches on the rooms recipe's mixture, with `train.bucket` and without.

The recipe's own mixture, sizes and tokenizer, on a tenth of its rooms. Padded to the longest sample of a micro-batch,
as `collate` does. With one worker a global batch of 32 is cut into 8, 4 or 2 micro-batches; those of the recipe, with
its two workers, have no order that helps: a worker's share is one micro-batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from perceptio.data.collator import PAD_MULTIPLE, Item
from perceptio.processor import PerceptioProcessor
from perceptio.train.feed import Samples, Unread, micro_batches
from schemas.recipe_file import load_recipe
from tests.benchmarks._stage import RECIPE
from tests.benchmarks.tokenize import write_codebook
from tests.tables import fill, published
from workflows import runtime
from workflows.store import open_root

SHARE, STEPS, MICRO_BATCHES, BAR = 10, 24, (4, 8, 16), 0.7


def padded_share(batches: list[list[Item | Unread]], micro_batch: int, *, by_length: bool) -> float:
    """Of all tokens that a model computes on, the share that is padding."""
    tokens = padded = 0
    for drawn in batches:
        for part in micro_batches(drawn, micro_batch, by_length=by_length):
            lengths = [len(one.dialogue.input_ids) for one in part if isinstance(one, Item)]
            tokens += sum(lengths)
            padded += len(lengths) * -(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    return 1 - tokens / padded


def run() -> dict[str, Any]:
    """The benchmark's result; the bar is that of micro-batches of 8."""
    whole = load_recipe(RECIPE)
    sources = [source.model_dump(mode="json", exclude_defaults=True) for source in whole.sources]
    # with the renderer's own masks, where the recipe has a teacher's for one source: it changes no length
    fewer = [source | {"count": source["count"] // SHARE, "exact_masks": True} for source in sources]
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(RECIPE, root=f"{name}/root", overrides=[f"sources={fewer}", "depth.teacher=recorded"])
        (Path(name) / "codebook").mkdir()
        codebook, root = write_codebook(Path(name) / "codebook"), open_root(recipe.root)
        fill(recipe, root, published(root, codebook, "codebook", {}), row_group_rows=recipe.assemble.row_group_rows)
        processor = PerceptioProcessor.from_pretrained(runtime.shipped("base"), codebook=codebook)
        samples = Samples.open(recipe, processor)
        batches: list[list[Item | Unread]] = [
            [samples.item(position) for position in samples.mixture.positions_of(step, 0, 1)] for step in range(STEPS)
        ]
        samples.reader.close()
    rows = [
        {
            "micro_batch": size,
            "padded_share": padded_share(batches, size, by_length=False),
            "padded_share_by_length": padded_share(batches, size, by_length=True),
        }
        for size in MICRO_BATCHES
    ]
    value = rows[1]["padded_share_by_length"] / rows[1]["padded_share"]
    return {
        "name": "bucketing",
        "what": "padding of micro-batches of 8 of 32 rooms ordered by length, to that in the mixture's order",
        "value": value,
        "unit": "x",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": rows,
    }
