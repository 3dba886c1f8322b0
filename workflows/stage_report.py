"""One page about one data stage: counts, histograms, pictures, and refused rows by reason with what they look like.

    perceptio report depth --recipe RECIPE

Reads   the stage's finished tables, the images that are shown, and of rows that `ingest` refused the source files
Writes  ROOT/reports/STAGE/report.html (self-contained: no script, nothing loaded from elsewhere)
Needs   nothing but time for SHARDS_READ shards a source
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from schemas.manifest import Manifest
from schemas.recipe import Recipe
from workflows.commits import Table
from workflows.folders import require
from workflows.page import render
from workflows.reject_pictures import refusals
from workflows.stage_pictures import DRAW
from workflows.store import Root, StageError, open_root

HEADINGS = {
    "ingest": "Images in",
    "depth": "Teacher depth",
    "masks": "Teacher masks",
    "codebook": "The depth codebook",
    "tokenize": "Depth tokens",
    "assemble": "Training samples",
}


def run(recipe: Recipe, stage: str) -> str:
    """The path or address of the page, after it was written.

    Raises StageError for a stage that has no page, or whose tables are not finished.
    """
    if stage not in DRAW:
        raise StageError(f"there is no report of stage '{stage}', expected one of {', '.join(DRAW)}")
    root, (table, draw) = open_root(recipe.root), DRAW[stage]
    manifests = _manifests(recipe, root, table)
    kept, rejected = (sum(getattr(m, name) for m in manifests.values()) for name in ("kept", "rejected"))
    seconds = sum(manifest.seconds for manifest in manifests.values())
    done = sum(manifest.extra.get("rows_done", 0) for manifest in manifests.values())
    page = render(
        "stage_report.html.j2",
        recipe=recipe,
        stage=stage,
        heading=HEADINGS[stage],
        table=table,
        manifests=manifests,
        sizes={source: _size(manifest) for source, manifest in manifests.items()},
        kept=kept,
        rejected=rejected,
        rate=done / seconds if seconds and done else None,
        shown=draw(recipe, root, manifests) if kept else None,
        refusals=[] if table == "codebook" else refusals(recipe, root, table, manifests),
    )
    root.write(page.encode(), "reports", stage, "report.html")
    return posixpath.join(root.uri, "reports", stage, "report.html")


def _manifests(recipe: Recipe, root: Root, table: str) -> Mapping[str, Manifest]:
    """The stage's manifests by source; the codebook's, which has no source, under ""."""
    if table == "codebook":
        return {"": require(root, "codebook", stage="codebook")}
    tables = {source.name: Table(root, table, source.name) for source in recipe.sources}
    return {name: found.require() for name, found in tables.items()}


def _size(manifest: Manifest) -> int:
    """Bytes of a table's or folder's files."""
    parts = [entry for c in manifest.shards for entry in (c.data, c.rejects) if entry is not None]
    return sum(entry.size for entry in (*parts, *manifest.files))
