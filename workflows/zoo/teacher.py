"""Trains the shipped depth teacher: a small Depth Anything, distilled from the exact depth of rendered rooms.

    python -m workflows.zoo.teacher --minutes 6 --out perceptio/rooms/zoo/teacher

Reads nothing but rooms that it renders itself (kept in --cache for the next run); writes a folder that
`DepthTeacher.from_pretrained` and transformers' depth-estimation pipeline load, and a model card with held-out
figures. Needs one core and about 2 GB. Training rooms use seed 100, held-out rooms seed 900; recipes use neither.

Shape legend: B batch, N rooms, H, W pixels, 3 channels.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

from perceptio.depth.teacher import STEPS, DepthTeacher, TeacherMap, inv_depth_from_metric
from perceptio.rooms.render import render_room
from perceptio.train.optim import computes_bf16
from workflows.zoo.aims import TEACHER_SHARE, aim
from workflows.zoo.muon import Muon

SIZE = 128
PATCH = 16
TRAIN_SEED, HELD_OUT_SEED = 100, 900
HELD_OUT_ROOMS = 200
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]


def small_config() -> DepthAnythingConfig:
    """A Depth Anything of about 1.4 million parameters: the published design, narrow and shallow."""
    backbone = Dinov2Config(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        out_indices=[2, 3, 4, 5],  # type: ignore[call-arg]
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=128,
        neck_hidden_sizes=[24, 32, 48, 64],
        fusion_hidden_size=32,
        head_hidden_size=16,
        depth_estimation_type="relative",
    )


def start_from_scratch(model: DepthAnythingForDepthEstimation) -> None:
    """Spreads the first weights of neck, head and positions: transformers' start, meant for a pretrained backbone's
    features, is so small that every pixel comes out alike."""
    for weight in (*model.neck.parameters(), *model.head.parameters()):
        if weight.ndim > 1:
            torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # the start of torch.nn.Conv2d
    torch.nn.init.normal_(model.get_parameter("backbone.embeddings.position_embeddings"), std=0.5)
    torch.nn.init.constant_(model.get_parameter("head.conv3.bias"), 0.5)  # the last ReLU has no gradient below 0


def rooms_as_arrays(cache: Path, seed: int, count: int, size: int = SIZE) -> Arrays:
    """(rgb_NHW3, inv_depth_NHW) of rooms 0..count-1, rendered in pieces that a rerun finds in `cache`."""
    piece, rgb, inv_depth = 250, [], []
    for start in range(0, count, piece):
        path = cache / f"rooms-{seed}-{size}-{start}-{min(start + piece, count)}.npz"
        if not path.exists():
            rooms = [render_room(seed, index, size) for index in range(start, min(start + piece, count))]
            maps = [inv_depth_from_metric(room.depth_HW).inv_depth_HW for room in rooms]
            partial = path.with_suffix(".partial.npz")
            np.savez_compressed(partial, rgb=np.stack([room.rgb_HW3 for room in rooms]), inv_depth=np.stack(maps))
            partial.rename(path)
            print(f"rendered {start + len(rooms)} of {count} rooms of seed {seed}", flush=True)
        with np.load(path, allow_pickle=False) as saved:
            rgb.append(saved["rgb"])
            inv_depth.append(saved["inv_depth"])
    return np.concatenate(rgb), np.concatenate(inv_depth)


def depth_loss(predicted_BHW: torch.Tensor, target_BHW: torch.Tensor) -> torch.Tensor:
    """L1 plus gradient matching at four scales, the distance to the scaled inverse depth (lineage: MiDaS)."""
    difference_BHW = predicted_BHW - target_BHW
    loss = difference_BHW.abs().mean()
    # a weight of 0.5 holds the first hundreds of steps at flat maps, which have the gradients of most pixels right
    for scale in range(4):
        step = difference_BHW[:, :: 2**scale, :: 2**scale]
        loss = loss + 0.1 * (
            (step[:, 1:] - step[:, :-1]).abs().mean() + (step[:, :, 1:] - step[:, :, :-1]).abs().mean()
        )
    return loss


def augmented(
    rgb_BHW3: npt.NDArray[np.uint8], inv_depth_BHW: npt.NDArray[np.uint16], processor: DPTImageProcessor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels_B3HW, inv_depth_BHW): mirrored half the time, with light, contrast and sharpness varied."""
    x_B3HW = torch.from_numpy(rgb_BHW3).permute(0, 3, 1, 2).float() / 255
    target_BHW = torch.from_numpy(inv_depth_BHW.astype(np.float32) / STEPS)
    mirror = torch.rand(len(x_B3HW)) < 0.5
    x_B3HW[mirror] = x_B3HW[mirror].flip(-1)
    target_BHW[mirror] = target_BHW[mirror].flip(-1)
    # larger renderings reach the model through an antialiased resize: it has to know soft edges too
    soft = torch.rand(len(x_B3HW), 1, 1, 1) * (torch.rand(len(x_B3HW), 1, 1, 1) < 0.5)
    x_B3HW = x_B3HW.lerp(F.avg_pool2d(F.pad(x_B3HW, (1, 1, 1, 1), mode="replicate"), 3, 1), soft)
    x_B3HW = (x_B3HW * (0.8 + 0.4 * torch.rand(len(x_B3HW), 3, 1, 1))).clamp(0, 1)
    mean_311, std_311 = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (x_B3HW - mean_311) / std_311, target_BHW


def train(model: DepthAnythingForDepthEstimation, rooms: Arrays, processor: DPTImageProcessor, seconds: float) -> int:
    """Number of steps taken in `seconds` of processor time, with a cosine schedule over that time.

    Muon for the backbone's matrices, AdamW for all else.

    Processor time, so that other work on the machine makes the run longer and not worse.
    """
    batch, peak = 16, 2e-3
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "encoder.layer" in name]
    by_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in by_muon]
    optimizers = [Muon(matrices, lr=peak, weight_decay=0.05), torch.optim.AdamW(others, lr=peak, weight_decay=0.0)]
    bf16 = computes_bf16(torch.device("cpu"))
    order, began, step = np.random.default_rng(0), time.process_time(), 0
    while (spent := (time.process_time() - began) / seconds) < 1:
        rows = order.permutation(len(rooms[0]))
        for start in range(0, len(rows) - batch + 1, batch):
            spent = min(1.0, (time.process_time() - began) / seconds)
            if spent == 1:
                break
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * spent))
            chosen = rows[start : start + batch]
            pixels_B3HW, target_BHW = augmented(rooms[0][chosen], rooms[1][chosen], processor)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                predicted_BHW = model(pixels_B3HW).predicted_depth
            loss = depth_loss(predicted_BHW.float(), target_BHW)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"step {step}  loss {loss.item():.4f}  {spent:.0%} of the time", flush=True)
    return step


def held_out_figures(teacher: DepthTeacher, rooms: Arrays, mean_map_HW: npt.NDArray[np.float64]) -> dict[str, float]:
    """MAE and delta < 1.25 in inv_depth of the teacher and of the blind mean map, each a mean over rooms.

    `first_100_mae` is the teacher's on the first 100 rooms, for a quicker check of the card.
    """
    figures: dict[str, list[float]] = {"mae": [], "delta1": [], "mean_map_mae": [], "mean_map_delta1": []}
    for rgb_HW3, target_HW in zip(*rooms, strict=True):
        (found,) = teacher([rgb_HW3])
        if not isinstance(found, TeacherMap):
            raise found
        for name, guess_HW in (("", found.inv_depth_HW / STEPS), ("mean_map_", mean_map_HW)):
            truth_HW = target_HW / STEPS
            figures[f"{name}mae"].append(float(np.abs(guess_HW - truth_HW).mean()))
            least = 1e-3  # of the range: the farthest pixel is 0 by construction and has no ratio
            ratio_HW = np.maximum(guess_HW, least) / np.maximum(truth_HW, least)
            figures[f"{name}delta1"].append(float((np.maximum(ratio_HW, 1 / ratio_HW) < 1.25).mean()))
    means = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    return {**means, "first_100_mae": round(float(np.mean(figures["mae"][:100])), 4)}


def write_card(out: Path, card: dict[str, Any]) -> None:
    """README.md and card.json beside the weights: what it is, how it was made, how good it is."""
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    held_out = card["held_out"]
    share = held_out["mae"] / held_out["mean_map_mae"]
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: depth-estimation\n---\n",
        "# Depth teacher for rendered rooms\n",
        f"A Depth Anything of {card['parameters']:,} parameters (transformers' `DepthAnythingForDepthEstimation`), "
        f"trained from scratch on {card['training_rooms']:,} rendered rooms at {SIZE} px against their exact depth. It "
        "predicts relative inverse depth (larger = closer) from the picture alone, and knows nothing but such rooms.\n",
        f"Held-out rooms: {held_out['rooms']} of seed {held_out['seed']}; both sides in inv_depth, scaled to [0, 1].\n",
        "| | MAE (lower is better) | delta < 1.25 (higher is better) |\n|---|---|---|",
        f"| this teacher | {held_out['mae']} | {held_out['delta1']} |",
        f"| mean training map (blind) | {held_out['mean_map_mae']} | {held_out['mean_map_delta1']} |\n",
        f"Aim. {aim('Error, of the mean map', share, TEACHER_SHARE, at_most=True)}\n",
        f"Made by `{card['command']}` in {card['training_seconds']} s of one core's time.\n",
        f"```json\n{json.dumps(card, indent=2)}\n```",
    ]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Renders, trains, writes the folder, measures what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=6, help="of one core's time")
    parser.add_argument("--rooms", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for rendered rooms; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        cache = args.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        rooms = rooms_as_arrays(cache, TRAIN_SEED, args.rooms)
        held_out = rooms_as_arrays(cache, HELD_OUT_SEED, HELD_OUT_ROOMS)
    processor = DPTImageProcessor(size={"height": SIZE, "width": SIZE}, ensure_multiple_of=PATCH)
    model = DepthAnythingForDepthEstimation(small_config())
    start_from_scratch(model)
    steps = train(model, rooms, processor, args.minutes * 60)
    model.half().save_pretrained(args.out)  # type: ignore[no-untyped-call]
    processor.save_pretrained(args.out)
    mean_map_HW = rooms[1].mean(axis=0) / STEPS
    figures = held_out_figures(DepthTeacher.from_pretrained(args.out), held_out, mean_map_HW)
    card = {
        "command": f"python -m workflows.zoo.teacher --minutes {args.minutes:g} --rooms {args.rooms} --out FOLDER",
        "licence": "apache-2.0",
        "parameters": model.num_parameters(),
        "steps": steps,
        "training_rooms": args.rooms,
        "training_seed": TRAIN_SEED,
        "training_seconds": round(args.minutes * 60),
        "held_out": {"seed": HELD_OUT_SEED, "rooms": HELD_OUT_ROOMS, "size": SIZE, **figures},
    }
    write_card(args.out, card)
    print(json.dumps(card["held_out"]))


if __name__ == "__main__":
    main()
