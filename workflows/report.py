"""One page that shows a finished run: pictures, curves, figures beside their baselines, seconds; and the same as JSON.

Reads   eval/, samples/, images/, depth/, codebook/, model/, runs/RUN/metrics.jsonl, manifests; served.json if any
Writes  report.html (self-contained: no script, nothing loaded from elsewhere), report.json
Needs   a finished evaluation

Shape legend: H, W image height and width, S the codebook's image side.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from perceptio.data.images import ImageLimits, decode, decode_depth16
from perceptio.data.masks import rle_to_mask
from perceptio.depth.codec import DepthCodec
from perceptio.metrics.choices import is_right
from perceptio.metrics.masks import iou, overlap, union_mask
from schemas.recipe import Recipe
from workflows.charts import Chart, Whisker, bars, curves, whisker
from workflows.commits import Table
from workflows.folders import local_copy
from workflows.held_out import STEPS, Picture, inv_depth, read_pictures, resized
from workflows.page import render
from workflows.pictures import data_uri, depth_colours, tinted
from workflows.scores import NO_BASELINE
from workflows.store import Root, StageError, open_root

SHOWN = 12  # held-out scenes with pictures
STORED = ImageLimits(min_side=1, max_pixels=2**31)
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "sam2", "vector-quantize-pytorch", "numpy", "pyarrow")
TABLES = {"ingest": "images", "depth": "depth", "masks": "masks", "tokenize": "codes", "assemble": "samples"}
GROUPS = {
    "Depth": ("reconstruction", "generated", "teacher", "code"),
    "Masks": ("referring",),
    "Answers": ("closest_point", "distance", "count", "attribute", "yes_no", "choice", "well_formed"),
}
NAMES = {
    "reconstruction_mae": "Codebook's reconstruction, error in inverse depth",
    "generated_depth_mae": "Generated map, error in inverse depth",
    "code_accuracy": "Depth codes equal to the teacher's",
    "teacher_abs_rel": "Teacher, AbsRel in true depth",
    "generated_abs_rel": "Generated map, AbsRel in true depth",
    "teacher_rmse": "Teacher, RMSE in metres",
    "generated_rmse": "Generated map, RMSE in metres",
    "teacher_delta1": "Teacher, pixels within 1.25 of true depth",
    "generated_delta1": "Generated map, pixels within 1.25 of true depth",
    "referring_ciou": "Referring segmentation, cIoU",
    "referring_giou": "Referring segmentation, gIoU",
    "closest_point_accuracy": "Closest point, mean over set sizes",
    "closest_point_accuracy_3": "Closest of 3 points",
    "closest_point_accuracy_4": "Closest of 4 points",
    "closest_point_accuracy_5": "Closest of 5 points",
    "closest_point_on_generated_map": "Closest point, read off the generated map",
    "closest_point_on_reconstruction": "Closest point, read off the codebook's reconstruction",
    "attribute_accuracy": "What colour is it?",
    "choice_accuracy": "Multiple choice",
    "count_accuracy": "How many are there?",
    "distance_accuracy": "Which of two is closer?",
    "yes_no_accuracy": "Yes or no",
    "well_formed_without_grammar": "Replies well formed without the grammar",
    "closest_point_readable": "Closest point, replies that name a point",
    "attribute_readable": "What colour is it? Replies that name a colour",
    "choice_readable": "Multiple choice, replies that name an option",
    "count_readable": "How many are there? Replies that name a number",
    "distance_readable": "Which of two is closer? Replies that name one of them",
    "yes_no_readable": "Yes or no, replies that say either",
}
VERDICTS = {
    "better": "better",
    "worse": "worse",
    "open": "not told apart",
    "ceiling": "from the best possible",
    "alone": "",
}
HEADLINES = ("referring_ciou", "generated_depth_mae", "closest_point_accuracy", "well_formed_without_grammar")
ERRORS = ("mae", "rmse", "abs_rel")  # shown as numbers, all else in per cent

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A metric as a line of the page."""

    title: str
    against: str
    value: str
    interval: str
    baseline: str
    difference: str
    verdict: str  # a key of VERDICTS
    n: int
    whisker: Whisker


def write_report(recipe: Recipe, seconds: Mapping[str, float] | None = None) -> str:
    """The path or address of report.html, after it and report.json were written.

    `seconds` are wall-clock seconds by stage; without them the manifests' own are shown, which sum the actors' time.
    Raises StageError where the evaluation is not finished.
    """
    root = open_root(recipe.root)
    data = root.read("eval", "metrics.json")
    if data is None:
        raise StageError(f"{recipe.root}: eval/metrics.json is missing: run `evaluate` first")
    evaluation = json.loads(data)
    spent = dict(seconds) if seconds is not None else stage_seconds(recipe, root)
    manifest = root.manifest("eval", evaluation["evaluation"])
    versions = {"perceptio": manifest.code if manifest else "", "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    summary = {"metrics": evaluation["metrics"], "seconds": spent, "versions": versions}
    root.write(json.dumps(summary, indent=1).encode(), "report.json")
    charts = loss_curves(root)
    page = render(
        "report.html.j2",
        recipe=recipe,
        groups=figure_groups(evaluation["metrics"]),
        scenes=scenes(recipe, root, evaluation["evaluation"]),
        headlines=[figure(name, evaluation["metrics"][name]) for name in HEADLINES if name in evaluation["metrics"]],
        curves=charts,
        sources=sorted({name for chart in charts for name in chart.apart}),
        bars=bars(spent),
        total=_duration(sum(spent.values())),
        served=served(root),
        versions=versions,
        verdicts=VERDICTS,
    )
    root.write(page.encode(), "report.html")
    return root.at("report.html")


def stage_seconds(recipe: Recipe, root: Root) -> dict[str, float]:
    """Seconds by stage as the manifests have them; a stage without a manifest is left out."""
    found: dict[str, float] = {}
    for stage, table in TABLES.items():
        manifests = [Table(root, table, source.name).manifest() for source in recipe.sources]
        if any(manifests):
            found[stage] = sum(manifest.seconds for manifest in manifests if manifest is not None)
    evaluation = json.loads(root.read("eval", "metrics.json") or b"{}")
    folders = {
        "codebook": ("codebook",),
        "train": ("model",),
        "evaluate": ("eval", evaluation.get("evaluation", "")),
    }
    for stage, folder in folders.items():
        manifest = root.manifest(*folder)
        if manifest is not None:
            found[stage] = manifest.seconds
    order = ("ingest", "depth", "masks", "codebook", "tokenize", "assemble", "train", "evaluate")
    return {stage: round(found[stage], 1) for stage in order if stage in found}


def figure_groups(metrics: Mapping[str, Row]) -> dict[str, list[Figure]]:
    """The figures by group, in the order of the evaluation; a group without figures is left out."""
    groups: dict[str, list[Figure]] = {}
    for name, metric in metrics.items():
        group = next((group for group, starts in GROUPS.items() if name.startswith(starts)), "Other")
        groups.setdefault(group, []).append(figure(name, metric))
    return {group: groups[group] for group in (*GROUPS, "Other") if group in groups}


def figure(name: str, metric: Row) -> Figure:
    """One metric in words and as a drawing; better or worse only where the paired interval leaves out 0."""
    base = name.split("_vs_")[0]
    number = base.endswith(ERRORS)

    def shown(value: float, sign: str = "") -> str:
        return f"{value:{sign}.3f}" if number else f"{100 * value:{sign}.1f}"

    gain = (metric["difference_low"], metric["difference_high"])
    if not metric["higher_is_better"]:
        gain = (-gain[1], -gain[0])
    unit = "" if number else " %"
    verdict = "better" if gain[0] > 0 else "worse" if gain[1] < 0 else "open"
    if "ceiling" in metric["against"]:
        verdict = "ceiling"
    if metric["against"] == NO_BASELINE:
        verdict = "alone"
    title = NAMES.get(base) or base.replace("_", " ").capitalize()
    return Figure(
        title=title,
        against=metric["against"],
        value=shown(metric["value"]) + unit,
        interval=f"{shown(metric['low'])} to {shown(metric['high'])}",
        baseline=shown(metric["baseline"]) + unit,
        difference=f"{shown(metric['difference'], '+')} ({shown(metric['difference_low'], '+')}"
        f" to {shown(metric['difference_high'], '+')})",
        verdict=verdict,
        n=metric["n"],
        whisker=whisker(metric["value"], metric["low"], metric["high"], metric["baseline"]),
    )


def scenes(recipe: Recipe, root: Root, evaluation: str) -> list[Row]:
    """The first held-out scenes that were asked to segment, not chosen by how well they went: pictures and words."""
    data = root.read("eval", evaluation, "model.parquet")
    if data is None:
        raise StageError(f"eval/{evaluation}/model.parquet is missing: run `evaluate` again")
    said = {(row["id"], row["turn"]): row for row in pq.read_table(io.BytesIO(data)).to_pylist()}
    names = [source.name for source in recipe.sources if source.held_out]
    pictures = [p for name in names for p in read_pictures(root, name, min(recipe.evaluate.limit, 4 * SHOWN))]
    codec = DepthCodec.from_pretrained(local_copy(root, "codebook", stage="codebook"))
    found: list[Row] = []
    for picture in pictures:
        own = {turn: said[picture.id, turn] for turn in range(len(picture.turns)) if (picture.id, turn) in said}
        asked = next((turn for turn in own if picture.turns[turn]["kind"] == "referring"), None)
        if asked is not None and len(found) < SHOWN:
            found.append(_scene(picture, asked, own, codec))
    return found


def _scene(picture: Picture, asked: int, said: Mapping[int, Row], codec: DepthCodec) -> Row:
    rgb_HW3, reply = decode(picture.image, STORED), said[asked]
    true_HW = picture.true_mask(asked)
    found_HW = union_mask([rle_to_mask(rle) for rle in reply["masks"]], picture.size)
    target_SS = inv_depth(picture.depth_target)
    maps = [codec.decode(torch.tensor([codes]))[0].numpy() for codes in (picture.codes, reply["codes"])]
    errors = [f"error {np.abs(map_SS - target_SS).mean():.3f}" for map_SS in maps]
    rebuilt, generated = (data_uri(depth_colours(resized(map_SS, picture.size))) for map_SS in maps)
    score = iou(*([n] for n in overlap(found_HW, true_HW)))[0]
    others = [turn for turn in said if turn != asked]
    return {
        "question": picture.turns[asked]["prompt"],
        "answer": reply["text"],
        "pictures": [
            ("image", "", data_uri(rgb_HW3)),
            ("true mask", "", data_uri(tinted(rgb_HW3, true_HW))),
            ("generated mask", f"IoU {100 * score:.0f} %", data_uri(tinted(rgb_HW3, found_HW))),
            ("teacher depth", "", data_uri(depth_colours(inv_depth(picture.inv_depth)))),
            ("codebook", errors[0], rebuilt),
            ("generated depth", errors[1], generated),
        ],
        "others": [_asked(picture.turns[turn], said[turn]["text"]) for turn in others],
    }


def _asked(turn: Row, reply: str) -> Row:
    right = is_right(reply, turn["answer"], turn["choices"])
    return {"question": turn["prompt"], "answer": reply, "right": right, "wanted": turn["answer"]}


def loss_curves(root: Root) -> list[Chart]:
    """A chart per loss term over the steps of the run that made the model, each data set apart; [] without a log."""
    digests = json.loads(root.read("model", "perceptio.json") or b"{}")
    data = root.read("runs", digests.get("run", ""), "metrics.jsonl") or b""
    lines = [json.loads(line) for line in data.decode().splitlines()]
    if not lines:
        return []
    steps = [line["step"] for line in lines]
    sources = sorted({name for line in lines for name in line["by_source"]})
    charts = [curves("total", steps, [line["loss"] for line in lines], {})]
    for term in dict.fromkeys(name for line in lines for name in line["terms"]):
        apart = {name: [line["by_source"].get(name, {}).get(term) for line in lines] for name in sources}
        kept = {name: values for name, values in apart.items() if any(value is not None for value in values)}
        charts.append(curves(term, steps, [line["terms"].get(term) for line in lines], kept))
    return charts


def served(root: Root) -> list[Row]:
    """What the endpoint answered over HTTP, with its masks and depth drawn; [] where nothing was asked."""
    found = []
    for item in json.loads(root.read("served.json") or b"[]"):
        reply, rgb_HW3 = item["reply"], decode(base64.b64decode(item["image"]), STORED)
        pictures = [("asked about", "", data_uri(rgb_HW3))]
        if reply["masks"]:
            rles = [{"height": m["rle"]["size"][0], "width": m["rle"]["size"][1], **m["rle"]} for m in reply["masks"]]
            mask_HW = union_mask([rle_to_mask(rle) for rle in rles], rgb_HW3.shape[:2])
            pictures.append((f"{len(rles)} mask{'s' if len(rles) > 1 else ''}", "", data_uri(tinted(rgb_HW3, mask_HW))))
        if reply["depth"]:
            map_HW = decode_depth16(base64.b64decode(reply["depth"]["png"])) / STEPS
            pictures.append(("depth", "", data_uri(depth_colours(map_HW))))
        taken = sum(reply["seconds"].values())
        found.append({"question": item["question"], "answer": reply["text"], "pictures": pictures, "seconds": taken})
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
