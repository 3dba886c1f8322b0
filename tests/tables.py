"""Whole tables of a few small rooms under a root, made by the stages' own workers without an actor pool for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import REJECTS
from workflows import assemble, depth, ingest, tokenize_depth
from workflows.commits import ROW_GROUP_ROWS, Table
from workflows.folders import publish
from workflows.listing import listed
from workflows.shards import ShardWorker, Work
from workflows.store import Root
from workflows.teacher_maps import Teaching

ROOMS = Path(ingest.__file__).parent / "recipes" / "rooms.yaml"
SCENES = 3
KINDS = ["referring", "points", "count", "yes_no"]


def recipe_in(folder: Path | str, parts: Path, **more: Any) -> Recipe:
    """The rooms recipe on two sources of SCENES rooms, with tiny parts and dotted settings such as train__steps=4."""

    def rooms(name: str, seed: int, held_out: bool) -> dict[str, Any]:
        source = {"name": name, "format": "rooms", "count": SCENES, "size": 64, "seed": seed, "exact_masks": True}
        return source | {"questions": KINDS, "held_out": held_out}

    sources = [rooms("training", 1, False), rooms("heldout", 2, True)]
    entry = {"source": "training", "weight": 1, "segmentation": True, "depth": True}
    settings = {
        "sources": sources,
        "train.mixture": [entry],
        "depth.teacher": "recorded",
        "model.base": str(parts / "base"),
        "model.starts_as": {},  # its tokens are of another tokenizer
        "model.sam2": str(parts / "sam2"),
        "model.max_objects": 2,
        "train.preflight": False,  # it has tests of its own
        "evaluate.bootstrap": 20,
        "evaluate.batch_size": 4,
        "evaluate.max_new_tokens": 3,
        "evaluate.pool": {"min_actors": 1, "max_actors": 1},
        "cluster.min_memory_gb": 1,
        "max_reject_share": 1,
    }
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_recipe(ROOMS, overrides=overrides, root=str(folder))


def published(root: Root, local: Path, name: str, inputs: dict[str, str]) -> Manifest:
    """The manifest of a local folder after it was published as the codebook or the model."""
    stage = "train" if name == "model" else "codebook"
    return publish(root, local, name, stage=stage, attempt="test", recipe="test", code="test", inputs=inputs)


def fill(recipe: Recipe, root: Root, codebook: Manifest, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """The tables that an evaluation reads, by the stages' own workers, without an actor pool for each."""
    workers: dict[tuple[str, ...], ShardWorker] = {
        ("images", "listing"): ingest.IngestWorker(recipe.model_dump_json()),
        ("depth", "images"): depth.DepthWorker(Teaching.of(recipe).source),
        ("codes", "depth"): tokenize_depth.CodecWorker(recipe.root, batch_size=4, threads=1),
        ("samples", "images", "codes"): assemble.JoinWorker(),
    }
    for source in recipe.sources:
        listed(recipe, root, source)
        for (name, *parents), worker in workers.items():
            table, over = Table(root, name, source.name), Table(root, parents[0], source.name)
            inputs = {parent: Table(root, parent, source.name).require().shards[0].content for parent in parents}
            made = worker.process(Work(table, over, 0, inputs))
            assert not made.rejects
            none = REJECTS.empty_table()
            commit = table.commit(0, "test", made.table, none, made.read, row_group_rows, inputs=inputs)
            depends = {"codebook": codebook.digest}
            table.finish({0: commit}, attempt="test", recipe="test", code="test", inputs=depends)
