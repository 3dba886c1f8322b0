"""From nothing to a served answer: the rooms recipe, every stage, three questions over HTTP, a report.

    perceptio demo

Reads   nothing; the small pretrained parts are shipped
Writes  everything of `perceptio run` under runs/demo, and report.html, report.json, served.json
Needs   2 cores, 12 GB of memory, a free port

| seconds on 2 cores | ingest | depth | masks | codebook | tokenize | assemble | train | evaluate | serve | report |
|--------------------|--------|-------|-------|----------|----------|----------|-------|----------|-------|--------|
| budget, 720 in all |     60 |    30 |    15 |       45 |       15 |       10 |   420 |       85 |    30 |     10 |
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from schemas.recipe import Recipe
from workflows import pipeline, report, serve
from workflows.commits import Table
from workflows.store import Root, StageError, open_root

MARK = "demo.json"  # says that a folder was made here and may be emptied
ASKED = ("referring", "points", "count")  # a question of each kind
TIMEOUT_S = 120.0

log = logging.getLogger(__name__)
Row = dict[str, Any]


def run(recipe: Recipe) -> None:
    """Makes a report under an emptied root and prints five lines about it; raises StageError where it cannot."""
    serve.require_free(recipe.serve.host, recipe.serve.port)  # now, not after ten minutes
    _empty(recipe)
    root = open_root(recipe.root)
    seconds = pipeline.run(recipe)
    began = time.monotonic()
    served = _served(recipe, root)
    root.write(json.dumps(served).encode(), "served.json")
    seconds["serve"] = round(time.monotonic() - began, 1)
    page = report.write_report(recipe, seconds)
    print("\n".join(_summary(recipe, root, page, served, sum(seconds.values()))))


def _empty(recipe: Recipe) -> None:
    """Makes the root an empty folder; refuses to delete what no demo has made."""
    folder = Path(recipe.root)
    if "://" in recipe.root:
        raise StageError(f"--root {recipe.root}: the demo runs in a local folder; use `run` for a store")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise StageError(f"--root {folder}: holds files that no demo has made; give a new folder, or empty it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"recipe": recipe.digest}), encoding="utf-8")


def _served(recipe: Recipe, root: Root) -> list[Row]:
    """A question of each kind in ASKED about a held-out room, its picture, and what the server replied."""
    url = serve.start(recipe)
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            return [_ask(client, *asked) for asked in _held_out(recipe, root)]
    finally:
        serve.stop()


def _ask(client: httpx.Client, image: bytes, turn: Row) -> Row:
    part = "on" if turn["kind"] == "referring" else "off"
    asked = {"image": base64.b64encode(image).decode("ascii"), "question": turn["prompt"], "depth": "on"}
    reply = client.post("/v1/perceive", json={**asked, "segmentation": part})
    if reply.status_code != 200:
        raise StageError(f"serve: the server answered {reply.status_code} to '{turn['prompt']}': {reply.text}")
    return {"question": turn["prompt"], "image": asked["image"], "reply": reply.json()}


def _held_out(recipe: Recipe, root: Root) -> Iterator[tuple[bytes, Row]]:
    """The first held-out picture and question of each kind in ASKED."""
    wanted = list(ASKED)
    for source in recipe.sources:
        if not source.held_out:
            continue
        table = Table(root, "images", source.name)
        for shard in sorted(table.committed()):
            for row in table.read_shard(shard, columns=["image", "turns"]).to_pylist():
                turn = next((turn for turn in row["turns"] if turn["kind"] in wanted), None)
                if turn is not None:
                    wanted.remove(turn["kind"])
                    yield row["image"], turn
    if wanted:
        raise StageError(f"{recipe.root}: no held-out question of kind {wanted}: add a held_out source with them")


def _summary(recipe: Recipe, root: Root, page: str, served: list[Row], seconds: float) -> Iterator[str]:
    """Five lines: what was made, how good it is, what to type next."""
    metrics = json.loads(root.read("report.json") or b"{}")["metrics"]
    place = os.path.relpath(recipe.root)
    manifests = [Table(root, "samples", source.name).require() for source in recipe.sources]
    rows, answer = sum(manifest.kept for manifest in manifests), served[0]["reply"]
    yield (
        f"Made     {rows} samples of rooms, a depth codebook and a model, in {place},"
        f" in {seconds // 60:.0f} min {seconds % 60:.0f} s"
    )
    figures = {
        "generated_depth_mae": "depth error",
        "referring_ciou": "referring cIoU",
        "closest_point_accuracy": "closest point",
    }
    shown = [f"{label} {_figure(metrics[name])}" for name, label in figures.items() if name in metrics]
    yield f"Quality  {'; '.join(shown)}"
    yield f"Served   {served[0]['question']!r} -> {answer['text']!r}, {len(answer['masks'])} masks, a depth map"
    yield f"Report   {os.path.relpath(page)}"
    yield f"Next     perceptio serve --recipe {recipe.name} --root {place}"


def _figure(metric: Row) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f}; blind {metric['baseline']:.3f})"
