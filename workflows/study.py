"""The method's parts, one by one: every arm trained and asked on the same base, data, order and number of steps.

    perceptio study --recipe rooms_study --results docs

Reads   the recipe's sources; finished runs in RESULTS
Writes  everything of `perceptio run`; as each run ends RESULTS/study/ARM-SEED.json, RESULTS/study/study.json and
        RESULTS/study.html. RESULTS is ROOT where it is not given
Needs   what training and evaluation need; a run that was interrupted goes on at its last checkpoint

A finished run is never made again: it is known by the digest of its settings, and one with other settings is refused.
ROOT/model is the arm's that was trained last; the arms with forced codes ask the model of the arm with the same
training, which stands before them.
"""

from __future__ import annotations

import io
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.manifest import MANIFEST_NAME, Manifest
from schemas.recipe import MixtureEntry, Recipe, StudyArm
from workflows import evaluate, pipeline, runtime, study_page, train
from workflows.folders import require
from workflows.store import OtherInputsError, Root, StageError, open_root
from workflows.train_log import read_metrics

DIGITS = 6  # of a mark in a finished run's file
EVERY = 10  # steps that a point of a finished run's curves is the mean of
CURVES = ("text", "token", "reconstruction", "mask_dice")
BOX_PARTS = 100  # of a side: how an arm without masks says in words where that is which the others segment

log = logging.getLogger(__name__)
Row = dict[str, Any]


def run(recipe: Recipe, results: str | None = None) -> str:
    """Where study.html lies, after every run of the study stands; raises StageError where one cannot go on.

    The page is written anew after each run, so that it shows what is known so far.
    """
    if recipe.study is None:
        raise StageError(f"recipe '{recipe.name}' has no `study` section: name its arms there, as rooms_study does")
    root = open_root(recipe.root)
    finished = root if results is None else open_root(results)
    command = f"perceptio study --recipe {recipe.name}" + (f" --results {results}" if results is not None else "")
    found = {
        (arm.name, seed): _result(finished, arm, seed, arm_recipe(recipe, arm, seed)) for arm, seed in in_order(recipe)
    }
    for arm, seed in in_order(recipe):
        if found[arm.name, seed] is None:
            page = study_page.write(recipe, finished, [run for run in found.values() if run is not None], command)
            log.info("study: %s, seed %d; %s has what stands", arm.name, seed, page)
            found[arm.name, seed] = _run(recipe, root, finished, arm, seed)
    return study_page.write(recipe, finished, [run for run in found.values() if run is not None], command)


def in_order(recipe: Recipe) -> Iterator[tuple[StudyArm, int]]:
    """Every run: seed by seed, so that all arms stand once before any stands twice."""
    assert recipe.study is not None
    for seed in dict.fromkeys(seed for arm in recipe.study.arms for seed in arm.seeds):
        yield from ((arm, seed) for arm in recipe.study.arms if seed in arm.seeds)


def arm_recipe(recipe: Recipe, arm: StudyArm, seed: int) -> Recipe:
    """The recipe of one run: the seed of training and what the arm changes; all else, data too, is the study's."""
    zero = {} if arm.depth in ("objectives", "soft_merging") else {"marker": 0.0, "token": 0.0, "count": 0.0}
    if arm.depth != "soft_merging":
        zero["reconstruction"] = 0.0
    losses = recipe.train.losses.model_copy(update={**zero, "plain": arm.depth in ("none", "plain")})
    mixture = tuple(_entry(entry, arm) for entry in recipe.train.mixture)
    changes = {
        "seed": seed,
        "study": None,
        "model": recipe.model.model_copy(update={"depth_after_text": arm.depth_after_text}),
        "train": recipe.train.model_copy(update={"losses": losses, "mixture": mixture}),
        "evaluate": recipe.evaluate.model_copy(update={"codes": arm.codes}),
    }
    return Recipe.model_validate(recipe.model_copy(update=changes).model_dump())


def _entry(entry: MixtureEntry, arm: StudyArm) -> MixtureEntry:
    changes: Row = {} if arm.depth != "none" else {"depth": False}
    if entry.segmentation and not arm.segmentation:
        changes |= {"segmentation": False, "boxes": BOX_PARTS}
    return entry.model_copy(update=changes)


def _run(recipe: Recipe, root: Root, finished: Root, arm: StudyArm, seed: int) -> Row:
    """Trains and asks one arm, and writes its result."""
    own = arm_recipe(recipe, arm, seed)
    pipeline.run(recipe.model_copy(update={"study": None}), pipeline.DATA)
    _same_data(recipe, root, finished, arm, seed)
    _make_way(recipe, root, own)
    seconds = pipeline.run(own, {"train": pipeline.MODEL["train"]})
    model = require(root, "model", stage="train")
    _same_model(recipe, finished, arm, seed, model)
    seconds |= pipeline.run(own, {"evaluate": pipeline.MODEL["evaluate"]})
    evaluation = json.loads(root.read("eval", evaluate.METRICS) or b"{}")
    result = {
        "arm": arm.name,
        "seed": seed,
        "settings": own.digest,
        "code": runtime.code_version(),
        "machine": f"{platform.processor() or platform.machine()}, {psutil.cpu_count(logical=False)} cores",
        "precision": model.extra.get("precision"),
        "seconds": seconds,
        "model": model.digest,
        "inputs": model.inputs,
        "curves": _curves(root),
        "metrics": evaluation["metrics"],
        **_marks(root, evaluation["evaluation"]),
    }
    finished.write(json.dumps(result, separators=(",", ":")).encode() + b"\n", *_place(arm, seed))
    return result


def _same_data(recipe: Recipe, root: Root, finished: Root, arm: StudyArm, seed: int) -> None:
    """Raises OtherInputsError where a finished run of this seed, with which the arm may be paired, had other data.

    Another machine rounds otherwise, so its teacher, its codebook and what is made with them are others.
    """
    own = train.inputs(arm_recipe(recipe, arm, seed), root)
    data = [name for name in own if name == "codebook" or name.startswith("samples/")]
    for other, its_seed in in_order(recipe):
        run = _result(finished, other, seed, arm_recipe(recipe, other, seed)) if its_seed == seed else None
        seen: dict[str, str] = run["inputs"] if run else {}
        for name in data:
            if seen.get(name, own[name]) != own[name]:
                raise OtherInputsError(
                    f"{finished.at(*_place(other, seed))}: its {name} is {seen[name][:16]}, {root.uri} has"
                    f" {own[name][:16]}: finish a seed where it began, or delete that seed's runs"
                )


def _same_model(recipe: Recipe, finished: Root, arm: StudyArm, seed: int, model: Manifest) -> None:
    """Raises OtherInputsError where an arm of the same training was asked with another model: then codes are not all
    that differs."""
    for other, its_seed in in_order(recipe):
        run = _result(finished, other, seed, arm_recipe(recipe, other, seed)) if its_seed == seed else None
        if run is not None and run["inputs"] == model.inputs and run["model"] != model.digest:
            raise OtherInputsError(
                f"{finished.at(*_place(other, seed))}: its model is {run['model'][:16]}, the same training made"
                f" {model.digest[:16]} for {arm.name}: delete that result to ask this model for both"
            )


def _make_way(recipe: Recipe, root: Root, own: Recipe) -> None:
    """Deletes another arm's model and checkpoints; raises StageError where ROOT/model is none of the study's."""
    standing = root.manifest("model")
    if standing is None or standing.inputs == train.inputs(own, root):
        return
    if not any(standing.inputs == train.inputs(arm_recipe(recipe, *run), root) for run in in_order(recipe)):
        raise StageError(
            f"{root.uri}: model/ was trained with other settings than any arm of the study: give the study a root of"
            " its own, or delete model/"
        )
    trained = json.loads(root.read("model", "perceptio.json") or b"{}")["run"]
    root.delete("model", MANIFEST_NAME)  # first: without it nothing of the folder counts
    root.delete_many([*root.files_below("model"), *root.files_below("runs", trained)])


def _result(finished: Root, arm: StudyArm, seed: int, own: Recipe) -> Row | None:
    """What a finished run found, None where it is not finished; raises OtherInputsError for another setting's."""
    data = finished.read(*_place(arm, seed))
    if data is None:
        return None
    found: Row = json.loads(data)
    if found["settings"] != own.digest:
        raise OtherInputsError(
            f"{finished.at(*_place(arm, seed))}: was made with settings {found['settings']}, the recipe's are"
            f" {own.digest}: delete it to run it again, or give another folder with --results"
        )
    return found


def _place(arm: StudyArm, seed: int) -> tuple[str, str]:
    return study_page.FOLDER, f"{arm.name}-{seed}.json"


def _curves(root: Root) -> dict[str, list[float]]:
    """The training's losses and gradient norm, means of EVERY steps; {} where no log is kept."""
    lines = read_metrics(root, json.loads(root.read("model", "perceptio.json") or b"{}")["run"])
    lines = [line for line in lines if not line.get("skipped")]
    parts = [lines[i : i + EVERY] for i in range(0, len(lines), EVERY)]
    if not parts:
        return {}
    values = {
        name: [[line["terms"][name] for line in part if name in line["terms"]] for part in parts] for name in CURVES
    }
    found = {name: [_mean(part) for part in of_parts] for name, of_parts in values.items() if all(of_parts)}
    norms = [_mean([line["gradient_norm"] for line in part]) for part in parts]
    return {"step": [part[-1]["step"] for part in parts], **found, "gradient_norm": norms}


def _mean(values: Sequence[float]) -> float:
    return float(f"{np.mean(values):.4g}")


def _marks(root: Root, evaluation: str) -> Row:
    """The sums of each figure by scene, for paired comparisons: `scenes`, and arrays in their order."""
    data = root.read("eval", evaluation, evaluate.MARKS)
    assert data is not None
    table = pq.read_table(io.BytesIO(data))
    scenes = sorted(pc.unique(table["scene"]).to_pylist())
    place, marks = {scene: i for i, scene in enumerate(scenes)}, {}
    for figure in dict.fromkeys(table["figure"].to_pylist()):
        part = table.filter(pc.field("figure") == figure)
        at = np.array([place[scene] for scene in part["scene"].to_pylist()])
        sums_2S = np.zeros((2, len(scenes)))
        sums_2S[:, at] = part["numerator"].to_numpy(), part["denominator"].to_numpy()
        marks[figure] = [[_short(value) for value in row] for row in sums_2S]
    return {"scenes": scenes, "marks": marks}


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else round(float(value), DIGITS)
