"""Takes in what came since: lists every source again and adds what is new in shards of its own.

    perceptio append --recipe RECIPE

Reads   the sources' listings
Writes  ROOT/listing/SOURCE
Needs   8 bytes an item that is listed already

The stages then do only the new shards. A finished codebook stays as it is, so old and new codes mean the same.
"""

from __future__ import annotations

import logging

from schemas.recipe import Recipe
from workflows.commits import Table
from workflows.listing import listed
from workflows.store import open_root

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Lengthens the listing of every source; raises StageError where one cannot be listed."""
    root = open_root(recipe.root)
    for source in recipe.sources:
        before = Table(root, "listing", source.name).manifest()
        shards, items = (0, 0) if before is None else (len(before.shards), before.kept)
        after = listed(recipe, root, source, more=True)
        new = after.kept - items
        log.info("%s: %d new items in %d new shards", source.name, new, len(after.shards) - shards)
    log.info("next: `perceptio run`, which does the new shards")
