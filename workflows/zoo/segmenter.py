"""Trains the shipped segmenter: a small SAM2 image model on rooms, with point and box prompts.

    python -m workflows.zoo.segmenter --minutes 20 --out perceptio/rooms/zoo/segmenter

Reads nothing: rooms of the training seed are rendered while it trains. Writes config.json, model.safetensors (fp16),
card.json and README.md with held-out quality beside blind baselines. `--score` only scores the folder again.

Shape legend: B images, M prompts, K = 3 candidate masks, S input size, H, W mask or image size, P points, D = B rooms.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.rooms.render import render_room
from perceptio.segmentation.sam2_image import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND_POINT,
    Sam2Features,
    Sam2ImageConfig,
    Sam2ImageModel,
    preprocess,
)
from perceptio.segmentation.teacher import MaskTeacher

log = logging.getLogger(__name__)

TRAIN_SEED, HELD_OUT_SEED = 101, 900  # recipes render with seeds 1 to 20
TRAIN_SIZES = (128, 160)  # pixels; both are resized to the model's input
COARSE_SIZE, COARSE_SHARE = 128, 0.5  # the first half of the time at a quarter of the cost: no weight knows the size
HELD_OUT_ROOMS, HELD_OUT_SIZE = (100, 200), 128  # scored over the first so many
MIN_OBJECT_SHARE = 0.0015  # of the image; smaller visible objects are no target
FIRST_ROOMS, STEPS_PER_ROOM = 64, 2  # each room is seen about eight times, half of them mirrored
IMAGES_PER_STEP, PROMPTS_PER_IMAGE = 4, 6  # half of the prompts are boxes, half clicks
PEAK_RATE, WEIGHT_DECAY, WARM_UP, CLIP = 6e-4, 0.02, 0.04, 1.0
BCE_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 5.0, 1.0, 1.0
SPREAD_WEIGHT = 0.1  # of the mean over the three candidates: min-loss alone leaves two of them untrained
DISC_RADII = (0.04, 0.07, 0.1, 0.15, 0.2)  # of the image side; the blind disc takes the best of them
SAVE_SECONDS = 120.0
LICENCE = "apache-2.0"

Rng = np.random.Generator
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A room, reduced to what training needs."""

    rgb_HW3: npt.NDArray[np.uint8]
    masks: tuple[npt.NDArray[np.bool_], ...]  # [H, W] per object that is large enough


def example(seed: int, index: int, size: int) -> Example:
    """The room (seed, index), with the masks of its objects above MIN_OBJECT_SHARE; pure."""
    room = render_room(seed, index, size)
    floor = MIN_OBJECT_SHARE * size * size
    masks = tuple(room.instance_HW == i for i, pixels in enumerate(room.visible_pixels) if pixels >= floor)
    return Example(room.rgb_HW3, masks)


def box_of(mask_HW: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The tight box x0, y0, x1, y1 in pixels, x1 and y1 one past the last."""
    ys, xs = np.nonzero(mask_HW)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def click_on(mask_HW: npt.NDArray[np.bool_], rng: Rng) -> tuple[float, float]:
    """A random pixel (x, y) of the mask."""
    ys, xs = np.nonzero(mask_HW)
    pick = rng.integers(len(xs))
    return float(xs[pick]), float(ys[pick])


def _mirrored(item: Example) -> Example:
    return Example(item.rgb_HW3[:, ::-1], tuple(mask[:, ::-1] for mask in item.masks))


def _jittered(box: tuple[float, float, float, float], side: int, rng: Rng) -> tuple[float, ...]:
    """The box with each edge moved by up to a tenth of the box's own width or height."""
    x0, y0, x1, y1 = box
    noise = np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    return tuple(np.clip(np.array(box) + noise, 0, side).tolist())


@dataclass(frozen=True)
class Batch:
    """Prompts of one kind, with their targets."""

    image_index_M: Tensor
    points_MP2: Tensor  # input pixels
    labels_MP: Tensor
    target_MHW: Tensor  # [0, 1], the share of the cell that the object covers


def draw_prompts(items: list[Example], *, boxes: bool, size: int, rng: Rng) -> Batch:
    """PROMPTS_PER_IMAGE / 2 prompts of each image, on objects drawn at random, as boxes or single clicks."""
    index, points, targets = [], [], []
    for i, item in enumerate(items):
        side = len(item.rgb_HW3)
        for pick in rng.integers(len(item.masks), size=PROMPTS_PER_IMAGE // 2):
            mask_HW = item.masks[pick]
            prompt = _jittered(box_of(mask_HW), side, rng) if boxes else click_on(mask_HW, rng)
            index.append(i)
            points.append(torch.tensor(prompt).view(-1, 2) * size / side)
            full_11HW = torch.from_numpy(np.ascontiguousarray(mask_HW))[None, None].float()
            targets.append(F.interpolate(full_11HW, (size // 4, size // 4), mode="area")[0, 0])
    labels = (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT) if boxes else (FOREGROUND_POINT,)
    labels_MP = torch.tensor(labels).expand(len(index), -1)
    return Batch(torch.tensor(index), torch.stack(points), labels_MP, torch.stack(targets))


def loss_of(model: Sam2ImageModel, features: Sam2Features, batch: Batch) -> tuple[Tensor, float]:
    """The loss of a batch and the mean IoU of the candidates that the model itself would keep.

    Mask loss of the best of three candidates, and the IoU head against the true IoU of all three (lineage: SAM2).
    """
    sparse_MTC = model.embed_points(batch.points_MP2, batch.labels_MP)
    logits_MKHW, predicted_MK = model.decode_all(features, batch.image_index_M, sparse_MTC)
    target_MKHW = batch.target_MHW[:, None].expand_as(logits_MKHW)
    bce_MK = F.binary_cross_entropy_with_logits(logits_MKHW, target_MKHW, reduction="none").mean((2, 3))
    share_MKHW = logits_MKHW.sigmoid()
    overlap_MK = (share_MKHW * target_MKHW).sum((2, 3))
    dice_MK = 1 - (2 * overlap_MK + 1) / ((share_MKHW + target_MKHW).sum((2, 3)) + 1)
    mask_MK = BCE_WEIGHT * bce_MK + DICE_WEIGHT * dice_MK
    with torch.no_grad():
        drawn, meant = logits_MKHW > 0, target_MKHW > 0.5
        iou_MK = (drawn & meant).sum((2, 3)) / (drawn | meant).sum((2, 3)).clamp(min=1)
        kept = iou_MK.gather(1, predicted_MK.argmax(1, keepdim=True)).mean().item()
    iou_loss = F.l1_loss(predicted_MK, iou_MK)
    return mask_MK.min(dim=1).values.mean() + SPREAD_WEIGHT * mask_MK.mean() + IOU_WEIGHT * iou_loss, kept


def train(out: Path, minutes: float) -> dict[str, Any]:
    """Trains for `minutes` of processor time, saving into `out` as it goes; returns what the card says of it."""
    torch.manual_seed(TRAIN_SEED)
    rng = np.random.default_rng(TRAIN_SEED)
    full_size = Sam2ImageConfig().image_size
    model = Sam2ImageModel(Sam2ImageConfig()).train()
    model.set_image_size(COARSE_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    start = saved = time.process_time()
    rooms: list[Example] = []
    rendered = step = 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        if progress > COARSE_SHARE:
            model.set_image_size(full_size)
        for _ in range(FIRST_ROOMS if step == 0 else step % STEPS_PER_ROOM == 0):
            room = example(TRAIN_SEED, rendered, TRAIN_SIZES[rendered % len(TRAIN_SIZES)])
            rendered += 1
            rooms += [room] if room.masks else []
        picked = [rooms[i] for i in rng.integers(len(rooms), size=IMAGES_PER_STEP)]
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        report = train_step(model, optimizer, picked, rng)
        step += 1
        if step % 25 == 0:
            log.info("step %d, %.0f %% of the time, rooms %d: %s", step, 100 * progress, rendered, report)
        if time.process_time() - saved > SAVE_SECONDS:
            _save(model, out)
            saved = time.process_time()
    _save(model, out)
    return {"seed": TRAIN_SEED, "steps": step, "rooms": rendered, "seconds": round(time.process_time() - start)}


def train_step(model: Sam2ImageModel, optimizer: torch.optim.Optimizer, items: list[Example], rng: Rng) -> str:
    """One step on boxes and clicks of the same images, so that they share the trunk's cost; says how it went."""
    items = [_mirrored(item) if rng.random() < 0.5 else item for item in items]
    size = model.config.image_size
    features = model.encode(preprocess([item.rgb_HW3 for item in items], size))
    box_loss, box_iou = loss_of(model, features, draw_prompts(items, boxes=True, size=size, rng=rng))
    click_loss, click_iou = loss_of(model, features, draw_prompts(items, boxes=False, size=size, rng=rng))
    optimizer.zero_grad()
    torch.autograd.backward(box_loss + click_loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return f"box loss {box_loss:.3f} IoU {box_iou:.3f}, click loss {click_loss:.3f} IoU {click_iou:.3f}"


def _save(model: Sam2ImageModel, out: Path) -> None:
    size = model.config.image_size
    model.set_image_size(Sam2ImageConfig().image_size)
    model.save_pretrained(out, torch.float16)
    model.set_image_size(size)


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

Licence: Apache-2.0. Made by `python -m workflows.zoo.segmenter` in {training["seconds"]} seconds of one
processor: {training["steps"]} steps on {training["rooms"]} rooms of seed {training["seed"]}.

Held out: {max(HELD_OUT_ROOMS)} rooms of seed {HELD_OUT_SEED} at {HELD_OUT_SIZE} pixels, every object that shows at
least {MIN_OBJECT_SHARE:.2%} of the image. Mean IoU over objects, and the paired 95 % interval over rooms of the gain on
the best blind baseline (the disc: best of {len(DISC_RADII)} radii, in shares of the side, chosen on these very rooms).

| prompt | mean IoU | blind | gain |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Trains and scores, or only scores."""
    parser = argparse.ArgumentParser(description="Train the shipped segmenter.")
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time, on one thread")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score", action="store_true", help="score the folder again, without training")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if options.score:
        training = json.loads((options.out / "card.json").read_text())["training"]
    else:
        training = train(options.out, options.minutes)
    write_card(options.out, training)


if __name__ == "__main__":
    main()
