"""How good the segmenter is on rooms it never saw, beside guesses that need no look at the image; its card.

Shape legend: H, W image height and width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perceptio.segmentation.teacher import MaskTeacher
from workflows.zoo.aims import BOX_MIOU, aim
from workflows.zoo.segmenter_rooms import MIN_OBJECT_SHARE, Floats, box_of, click_on, example

HELD_OUT_SEED = 900
HELD_OUT_ROOMS, HELD_OUT_SIZE = (100, 200), 128  # scored over the first so many
DISC_RADII = (0.04, 0.07, 0.1, 0.15, 0.2)  # of the image side; the blind disc takes the best of them
LICENCE = "apache-2.0"


def iou(a_HW: npt.NDArray[np.bool_], b_HW: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of which one at least is not empty."""
    return float((a_HW & b_HW).sum() / (a_HW | b_HW).sum())


def score(teacher: MaskTeacher, counts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Mean IoU over the objects of the first so many held-out rooms, for each count: teacher and blind baselines."""
    rows: dict[str, list[float]] = {}
    room_of: list[int] = []
    for index in range(max(counts)):
        item = example(HELD_OUT_SEED, index, HELD_OUT_SIZE)
        rng = np.random.default_rng((HELD_OUT_SEED, index))
        boxes = [box_of(mask_HW) for mask_HW in item.masks]
        clicks = [click_on(mask_HW, rng) for mask_HW in item.masks]
        drawn = teacher(item.rgb_HW3, boxes, clicks)
        room_of += [index] * len(boxes)
        for i, mask_HW in enumerate(item.masks):
            guesses = {"box": drawn[i].mask_HW, "click": drawn[len(boxes) + i].mask_HW} | _blind(boxes[i], clicks[i])
            for name, guess_HW in guesses.items():
                rows.setdefault(name, []).append(iou(guess_HW, mask_HW))
    arrays = {name: np.array(values) for name, values in rows.items()}
    rooms = np.array(room_of)
    return {str(n): _summary({name: v[rooms < n] for name, v in arrays.items()}, rooms[rooms < n]) for n in counts}


def _summary(rows: dict[str, Floats], rooms: npt.NDArray[np.int64]) -> dict[str, Any]:
    best_disc = max((name for name in rows if name.startswith("disc")), key=lambda name: float(rows[name].mean()))
    return {
        "box_prompt": _beside(rows["box"], {"filled box": rows["filled box"]}, rooms),
        "point_prompt": _beside(rows["click"], {k: rows[k] for k in (best_disc, "whole image")}, rooms),
    }


def _blind(box: tuple[float, ...], click: tuple[float, float]) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks that need no look at the image."""
    y_HW, x_HW = np.mgrid[:HELD_OUT_SIZE, :HELD_OUT_SIZE]
    x0, y0, x1, y1 = box
    squared_HW = (x_HW - click[0]) ** 2 + (y_HW - click[1]) ** 2
    discs = {f"disc {radius}": squared_HW <= (radius * HELD_OUT_SIZE) ** 2 for radius in DISC_RADII}
    filled_HW = (x_HW >= x0) & (x_HW < x1) & (y_HW >= y0) & (y_HW < y1)
    return discs | {"filled box": filled_HW, "whole image": np.ones_like(filled_HW)}


def _beside(ours: Floats, blind: dict[str, Floats], rooms: npt.NDArray[np.int64]) -> dict[str, Any]:
    """The mean, its blind baselines, and the paired 95 % interval of the gain over the best of them, over rooms."""
    baselines = {name: round(float(values.mean()), 4) for name, values in blind.items()}
    gain = ours - blind[max(baselines, key=lambda name: baselines[name])]
    per_room = np.array([gain[rooms == room].mean() for room in np.unique(rooms)])
    half = 1.96 * per_room.std(ddof=1) / math.sqrt(len(per_room))
    return {
        "miou": round(float(ours.mean()), 4),
        "objects": len(ours),
        "blind": baselines,
        "gain_per_room_95": [round(float(per_room.mean() - half), 4), round(float(per_room.mean() + half), 4)],
    }


def write_card(out: Path, training: dict[str, Any]) -> None:
    """Scores the folder on held-out rooms and writes card.json and README.md."""
    card: dict[str, Any] = {"name": "segmenter of the rooms", "license": LICENCE, "training": training}
    teacher = MaskTeacher.from_pretrained(out)
    card["digest"] = teacher.digest
    card["held_out"] = {"seed": HELD_OUT_SEED, "size": HELD_OUT_SIZE, "min_object_share": MIN_OBJECT_SHARE}
    card["scores"] = score(teacher, HELD_OUT_ROOMS)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "README.md").write_text(_readme(card))


def _readme(card: dict[str, Any]) -> str:
    training, scores = card["training"], card["scores"][str(max(HELD_OUT_ROOMS))]
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {row['miou']:.3f} | "
        + ", ".join(f"{blind} {value:.3f}" for blind, value in row["blind"].items())
        + f" | {row['gain_per_room_95'][0]:+.3f} to {row['gain_per_room_95'][1]:+.3f} |"
        for name, row in scores.items()
    )
    return f"""---
license: {card["license"]}
---

# Segmenter of the rooms

A small SAM2 image model (package `sam2`: Hiera trunk of 32 channels, 256 x 256 input, no memory modules), trained
from scratch on rendered rooms with box and single-click prompts. It stands where a full-size run has SAM2. It knows
rooms and nothing else; its single-mask token (`multimask=False`) is untrained.

Licence: Apache-2.0. Made by `python -m workflows.zoo.segmenter` in {training["runs"]} run(s) (the later ones with
`--more`) of {training["seconds"]} processor seconds in all, on one thread: {training["steps"]} steps on
{training["rooms"]} rooms of seed {training["seed"]}. While it trained, a throw-away head named the kind and the colour
of every pixel from the same features, so that the trunk learnt from more than the prompts; and the decoder was also
prompted with what objects of a kind and colour look like, the mean of their image embedding, so that it follows content
as well as places. Neither is part of the model.

Held out: {max(HELD_OUT_ROOMS)} rooms of seed {HELD_OUT_SEED} at {HELD_OUT_SIZE} pixels, every object that shows at
least {MIN_OBJECT_SHARE:.2%} of the image. Mean IoU over objects, and the paired 95 % interval over rooms of the gain on
the best blind baseline (the disc: best of {len(DISC_RADII)} radii, in shares of the side, chosen on these very rooms).

| prompt | mean IoU | blind | gain |
|---|---|---|---|
{rows}

Aim. {aim("Mean IoU from a box", scores["box_prompt"]["miou"], BOX_MIOU)}
"""
