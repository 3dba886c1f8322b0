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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.segmentation.sam2_image import (
    Sam2Features,
    Sam2ImageConfig,
    Sam2ImageModel,
    preprocess,
)
from workflows.zoo.segmenter_rooms import Batch, Example, Floats, Rng, draw_prompts, example, mirrored
from workflows.zoo.segmenter_score import write_card

log = logging.getLogger(__name__)

TRAIN_SEED = 101  # recipes render with seeds 1 to 20, the card is scored on 900
TRAIN_SIZES = (128, 160)  # pixels; both are resized to the model's input
FULL_SIZE = Sam2ImageConfig().image_size
COARSE_SIZE, COARSE_SHARE = 128, 0.5  # the first half of the time at a quarter of the cost: no weight knows the size
FIRST_ROOMS, STEPS_PER_ROOM = 64, 2  # each room is seen about eight times, half of them mirrored
IMAGES_PER_STEP = 4
PEAK_RATE, BETAS, WEIGHT_DECAY, WARM_UP, CLIP = 1e-3, (0.9, 0.95), 0.02, 0.03, 1.0
MORE_RATE = 6e-4  # peak of a run that goes on from a trained model
CLOSENESS_GAIN = 1.5
POSITION_STD = 0.7  # of the trunk's position embedding at the start, about that of what the patches carry
BCE_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 5.0, 1.0, 1.0
SPREAD_WEIGHT = 0.1  # of the mean over the three candidates: min-loss alone leaves two of them untrained
SAVE_SECONDS, LOG_STEPS = 120.0, 50
NAMES = 2 + len(KINDS) + len(COLORS)
AROUND_WEIGHT = 0.2  # of walls and floor among the names


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


class NameHead(nn.Module):
    """Kind and colour of every cell from SAM2's features: a guide of the trunk while it trains, then thrown away.

    A prompt teaches the trunk one object at a time, names teach it every pixel of the image at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.s1, self.s0 = (nn.Conv2d(width, NAMES, 1) for width in (256, 64, 32))

    def loss(self, features: Sam2Features, items: list[Example]) -> Tensor:
        """Cross-entropy of kind and of colour, per cell of S/4, objects weighing more than what is around them."""
        side = features.high_res_s0.shape[-1]
        coarse = [self.embedding(features.embedding_BCHW), self.s1(features.high_res_s1)]
        logits_BNHW = self.s0(features.high_res_s0) + sum(
            F.interpolate(x, (side, side), mode="bilinear") for x in coarse
        )
        maps = [torch.from_numpy(np.ascontiguousarray(item.names_2HW))[None].float() for item in items]
        names_B2HW = torch.cat([F.interpolate(x, (side, side), mode="nearest-exact") for x in maps]).long()
        kinds, colors = logits_BNHW.split([1 + len(KINDS), 1 + len(COLORS)], dim=1)
        return _weighted(kinds, names_B2HW[:, 0]) + _weighted(colors, names_B2HW[:, 1])


def _weighted(logits_BNHW: Tensor, names_BHW: Tensor) -> Tensor:
    weights_N = torch.ones(logits_BNHW.shape[1])
    weights_N[0] = AROUND_WEIGHT
    return F.cross_entropy(logits_BNHW, names_BHW, weights_N)


def train(out: Path, minutes: float, before: dict[str, int]) -> dict[str, int]:
    """Trains for `minutes` of processor time, saving into `out` as it goes; returns what the card says of it.

    before: what this returned when it trained the model in `out`, to go on from there; {} to start anew.
    """
    done = before or {"seed": TRAIN_SEED, "runs": 0, "steps": 0, "rooms": 0, "seconds": 0}
    torch.manual_seed(TRAIN_SEED + done["runs"])
    rng = np.random.default_rng((TRAIN_SEED, done["runs"]))
    model = Sam2ImageModel.from_pretrained(out).train() if before else _placed()
    head = NameHead()
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    peak = MORE_RATE if before else PEAK_RATE
    start = saved = time.process_time()
    rooms: list[Example] = []
    recent: list[Floats] = []
    rendered, step = done["rooms"], 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        model.set_image_size(COARSE_SIZE if not before and progress < COARSE_SHARE else FULL_SIZE)
        for _ in range(FIRST_ROOMS if step == 0 else step % STEPS_PER_ROOM == 0):
            room = example(TRAIN_SEED, rendered, TRAIN_SIZES[rendered % len(TRAIN_SIZES)])
            rendered += 1
            rooms += [room] if room.masks else []
        picked = [rooms[i] for i in rng.integers(len(rooms), size=IMAGES_PER_STEP)]
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        recent.append(train_step(model, head, optimizer, picked, rng))
        step += 1
        if step % LOG_STEPS == 0:
            means = np.mean(recent, axis=0).round(3).tolist()
            log.info("step %d, %.0f %%, rooms %d: names, boxes, clicks: %s", step, 100 * progress, rendered, means)
            recent.clear()
        if time.process_time() - saved > SAVE_SECONDS:
            _save(model, out)
            saved = time.process_time()
    _save(model, out)
    seconds = done["seconds"] + round(time.process_time() - start)
    total = {"runs": done["runs"] + 1, "steps": done["steps"] + step, "rooms": rendered, "seconds": seconds}
    return done | total


def _placed() -> Sam2ImageModel:
    """A new model in which attention finds the place that a prompt names.

    From the package's own start the decoder ignores its prompts for hundreds of steps. With equal query and key
    projections, attention between prompts and pixels begins as closeness in position, and learning sets in sooner.
    """
    model = Sam2ImageModel(Sam2ImageConfig()).train()
    torch.nn.init.normal_(model.image_encoder.trunk.pos_embed, std=POSITION_STD)
    torch.nn.init.normal_(model.sam_prompt_encoder.no_mask_embed.weight, std=0.02)
    for embedding in model.sam_prompt_encoder.point_embeddings:
        torch.nn.init.normal_(embedding.weight, std=0.3)
    transformer = model.sam_mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossings:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain=CLOSENESS_GAIN)
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    return model


def train_step(
    model: Sam2ImageModel, head: NameHead, optimizer: torch.optim.Optimizer, items: list[Example], rng: Rng
) -> Floats:
    """Name loss, box loss and IoU, click loss and IoU of one step; all share the trunk's cost on the same images."""
    items = [mirrored(item) if rng.random() < 0.5 else item for item in items]
    size = model.config.image_size
    features = model.encode(preprocess([item.rgb_HW3 for item in items], size))
    box_loss, box_iou = loss_of(model, features, draw_prompts(items, boxes=True, size=size, rng=rng))
    click_loss, click_iou = loss_of(model, features, draw_prompts(items, boxes=False, size=size, rng=rng))
    name_loss = head.loss(features, items)
    optimizer.zero_grad()
    torch.autograd.backward(box_loss + click_loss + name_loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return np.array([name_loss.item(), box_loss.item(), box_iou, click_loss.item(), click_iou])


def _save(model: Sam2ImageModel, out: Path) -> None:
    size = model.config.image_size
    model.set_image_size(FULL_SIZE)
    model.save_pretrained(out, torch.float16)
    model.set_image_size(size)


def main() -> None:
    """Trains and scores, goes on training, or only scores."""
    parser = argparse.ArgumentParser(description="Train the shipped segmenter.")
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time, on one thread")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--more", action="store_true", help="go on from the model in --out")
    parser.add_argument("--score", action="store_true", help="score the model in --out again, without training")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    known = options.more or options.score
    before: dict[str, int] = json.loads((options.out / "card.json").read_text())["training"] if known else {}
    write_card(options.out, before if options.score else train(options.out, options.minutes, before))


if __name__ == "__main__":
    main()
