"""Makes the small Perceptio that is shipped: the recipe rooms_shipped from its rooms to its figures, and a card.

    python -m workflows.zoo.perceptio --root runs/rooms_shipped --out perceptio/rooms/zoo/perceptio

Reads nothing. Goes on where it was interrupted, like `perceptio run`. Writes OUT/model, which `perceptio serve` takes
where a recipe has no model yet (serve.fallback), OUT/card.json and OUT/README.md. The figures are of the weights as
they are shipped. Needs two cores and 12 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import workflows.evaluate
from perceptio.depth.teacher import inv_depth_from_metric
from perceptio.generate import Perceiver
from perceptio.metrics.choices import is_right
from perceptio.processor import Request
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from perceptio.rooms.room import Question, Room
from schemas.recipe_file import load_recipe
from workflows import pipeline
from workflows.cli import RECIPES
from workflows.folders import local_copy, require
from workflows.held_out import STEPS
from workflows.logs import configure
from workflows.store import open_root
from workflows.zoo.aims import REFERRING_CIOU, aim

RECIPE = "rooms_shipped"
FIRST_SEED, FIRST_ROOMS, BATCH = 900, 24, 24
Metrics = dict[str, dict[str, Any]]


def main() -> None:
    """Runs the recipe and ships what it made."""
    parser = argparse.ArgumentParser(description="Make the shipped Perceptio.")
    parser.add_argument("--root", required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    configure("text")
    recipe = load_recipe(RECIPES / f"{RECIPE}.yaml", root=options.root)
    pipeline.run(recipe)
    root = open_root(recipe.root)
    folder = local_copy(root, "model", stage="train")
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / "model", ignore_errors=True)
    shutil.copytree(folder, options.out / "model")
    report = json.loads(root.read("eval", workflows.evaluate.METRICS) or b"{}")
    held_out = next(source for source in recipe.sources if source.held_out)
    card = {
        "name": "a small Perceptio of the rooms",
        "license": "apache-2.0",
        "recipe": RECIPE,
        "model": require(root, "model", stage="train").digest,
        "steps": recipe.train.steps,
        "training_seconds": require(root, "model", stage="train").seconds,
        "global_batch": recipe.train.global_batch,
        "held_out": held_out.model_dump(include={"seed", "size"}) | {"scenes": recipe.evaluate.limit},
        "metrics": report["metrics"],
        "first": {"seed": FIRST_SEED, "rooms": FIRST_ROOMS, **first_figures(options.out / "model")},
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (options.out / "README.md").write_text(readme(card))


def first_figures(folder: Path, rooms: int = FIRST_ROOMS) -> dict[str, float]:
    """Accuracy by kind of question, cIoU and error of depth, over one question a room of each kind: a quick check.

    Depth is compared with the room's own, not its teacher's.
    """
    perceiver, limit = Perceiver.from_pretrained(str(folder)), load_recipe(RECIPES / f"{RECIPE}.yaml").evaluate
    asked: list[tuple[Room, Question]] = []
    for index in range(rooms):
        room = render_room(FIRST_SEED, index, 128)
        firsts = {question.kind: question for question in reversed(ask(room))}
        asked += [(room, question) for question in firsts.values()]
    asked.sort(key=lambda pair: pair[1].kind)  # replies of one length together
    marks: dict[str, list[float]] = defaultdict(list)
    shared = union = 0
    errors: list[float] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        requests = [_request(room, question) for room, question in part]
        for (room, question), found in zip(
            part, perceiver.perceive(requests, max_new_tokens=limit.max_new_tokens), strict=True
        ):
            if question.kind == "referring":
                true_HW = np.isin(room.instance_HW, question.objects)
                said_HW = found.masks_MHW.any(0)
                shared, union = shared + int((true_HW & said_HW).sum()), union + int((true_HW | said_HW).sum())
                errors.append(_depth_error(room, found.inv_depth_HW))
            else:
                marks[question.kind].append(is_right(found.text, question.answer, question.choices))
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(marks.items())} | {
        "referring_ciou": round(shared / max(union, 1), 4),
        "generated_depth_mae": round(float(np.mean(errors)), 4),
    }


def _depth_error(room: Room, found_HW: npt.NDArray[np.float32] | None) -> float:
    assert found_HW is not None, "the grammar writes whole blocks"
    true_HW = inv_depth_from_metric(room.depth_HW).inv_depth_HW / STEPS
    return float(np.abs(found_HW - true_HW).mean())


def _request(room: Room, question: Question) -> Request:
    rgb_HW3 = room.rgb_HW3 if question.image_HW3 is None else question.image_HW3
    return Request(rgb_HW3, question.prompt, "on" if question.kind == "referring" else "off", "on")


def readme(card: dict[str, Any]) -> str:
    """The model card: what it is, how it was made, how good it is beside blind guesses."""
    metrics: Metrics = card["metrics"]
    rows = [_row(name.replace("_", " "), metric) for name, metric in metrics.items()]
    return CARD.format(
        rows="\n".join(rows),
        aims=f"{aim('Referring cIoU', metrics['referring_ciou']['value'], REFERRING_CIOU)}\n{_kinds_apart(metrics)}",
        seed=card["held_out"]["seed"],
        scenes=card["held_out"]["scenes"],
        minutes=card["training_seconds"] / 60,
        **{key: card[key] for key in ("recipe", "steps", "global_batch")},
    )


def _kinds_apart(metrics: Metrics) -> str:
    """Which kinds of question are answered better than by every blind guess, and which are not."""
    kinds = sorted(name.removesuffix("_accuracy") for name in metrics if name.endswith("_accuracy"))
    lost = []
    for kind in kinds:
        names = [n for n in metrics if n == f"{kind}_accuracy" or n.startswith(f"{kind}_accuracy_vs_")]
        if kind != "code" and not all(metrics[name]["difference_low"] > 0 for name in names):
            lost.append(kind.replace("_", " "))
    verdict = f"missed by {', '.join(lost)}" if lost else "met"
    return f"Every kind of question told apart from its blind guesses: {verdict}."


def _row(label: str, metric: dict[str, Any]) -> str:
    apart = metric["difference_low"] > 0 or metric["difference_high"] < 0
    better = (metric["difference"] > 0) == metric["higher_is_better"]
    verdict = ("yes, better" if better else "yes, worse") if apart else "no"
    return (
        f"| {label} | {metric['n']} | **{metric['value']:.3f}** ({metric['low']:.3f} to {metric['high']:.3f}) "
        f"| {metric['baseline']:.3f}, {metric['against']} | {verdict} |"
    )


CARD = """---
license: apache-2.0
library_name: transformers
---

# A small Perceptio that knows rooms

`PerceptioForConditionalGeneration`: the shipped base with the shipped segmenter, trained on rendered rooms to write
masks, then depth, then its answer. `perceptio serve --recipe rooms` answers with it until that recipe has a model of
its own. Stored in fp16.

    python -m workflows.zoo.perceptio --root runs/{recipe} --out perceptio/rooms/zoo/perceptio

{steps} steps of {global_batch} samples, {minutes:.0f} minutes on two cores, by the recipe
[`{recipe}`](../../../../workflows/recipes/{recipe}.yaml).

Held-out rooms: {scenes} of seed {seed}, asked once, after all choices were made, with 95 % intervals over rooms. The
last column says whether the paired interval of the difference to the guess leaves out 0. Depth errors are in inv_depth,
in [0, 1].

| figure | rooms | value | guess | told apart |
|---|---|---|---|---|
{rows}

Aims. {aims}

Rendered rooms are all it has seen: it says nothing of use about photographs. Licence: Apache-2.0, data and weights are
the project's own.
"""


if __name__ == "__main__":
    main()
