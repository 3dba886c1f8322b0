"""Trains the shipped segmenter: a small SAM2 image model on rooms, with point and box prompts.

    python -m workflows.zoo.segmenter --minutes 20 --out perceptio/rooms/zoo/segmenter

Reads nothing: rooms of the training seed are rendered first. Writes config.json, model.safetensors (fp16),
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
from perceptio.segmentation.sam2_image import PROMPT_DIM, Sam2Features, Sam2ImageConfig, Sam2ImageModel, preprocess
from workflows.zoo.muon import Muon
from workflows.zoo.segmenter_rooms import Batch, Example, Floats, Rng, draw_names, draw_prompts, mirrored, rooms_of
from workflows.zoo.segmenter_score import write_card

log = logging.getLogger(__name__)

TRAIN_SEED = 101  # recipes render with seeds 1 to 20, the card is scored on 900
TRAIN_SIZES = (128, 160)  # pixels; both are resized to the model's input
FULL_SIZE = Sam2ImageConfig().image_size
COARSE_SIZE, COARSE_SHARE = 128, 0.6  # most of the time at a quarter of the cost: no weight knows the size
PROMPTS, COARSE_PROMPTS = 2, 3  # of each sort, an image
IMAGES_PER_STEP = 4
PEAK_RATE, BETAS, WEIGHT_DECAY, WARM_UP, CLIP = 1.5e-3, (0.9, 0.95), 0.02, 0.03, 1.0
MORE_RATE = 6e-4  # peak of a run that goes on from a trained model
CLOSENESS_GAIN = 1.5
POSITION_STD = 0.7  # of the trunk's position embedding at the start, about that of what the patches carry
BCE_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 5.0, 1.0, 1.0
SPREAD_WEIGHT = 0.1  # of the mean over the three candidates: min-loss alone leaves two of them untrained
SAVE_SECONDS, LOG_STEPS = 120.0, 50
NAMES = 2 + len(KINDS) + len(COLORS)
AROUND_WEIGHT = 0.2  # of walls and floor among the names
LOOK_MOMENTUM = 0.05


def loss_of(model: Sam2ImageModel, head: NameHead, features: Sam2Features, batch: Batch) -> tuple[Tensor, float]:
    """The loss of a batch and the mean IoU of the candidates that the model itself would keep.

    Mask loss of the best of three candidates, and the IoU head against the true IoU of all three (lineage: SAM2).
    """
    if len(batch.names_M2):
        sparse_MTC = head.prompt(model, batch.names_M2)
    else:
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

    A prompt teaches the trunk one object at a time, names teach it every pixel of the image at once. What a name looks
    like, the mean of the image embedding over objects so named, is also a prompt in itself: the decoder learns to find
    what resembles a vector, so that later a [SEG] state has a slope to follow towards the features of what it means.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.s1, self.s0 = (nn.Conv2d(width, NAMES, 1) for width in (256, 64, 32))
        shape = (1 + len(KINDS), 1 + len(COLORS))
        self.looks_KCE = torch.zeros(*shape, PROMPT_DIM)  # mean image embedding by kind and colour, 0 is any
        self.known_KC = torch.zeros(shape, dtype=torch.bool)

    @torch.no_grad()
    def remember(self, features: Sam2Features, items: list[Example]) -> None:
        """Moves the looks of kinds and colours towards what this batch shows."""
        side = features.embedding_BCHW.shape[-1]
        for embedding_EHW, item in zip(features.embedding_BCHW, items, strict=True):
            for i in item.large:
                mask_11HW = torch.from_numpy(item.instance_HW == i)[None, None].float()
                share_HW = F.interpolate(mask_11HW, (side, side), mode="area")[0, 0]
                look_E = (embedding_EHW * share_HW).sum((1, 2)) / share_HW.sum()
                kind, color = item.names_O2[i].tolist()
                for name in ((kind, color), (kind, 0), (0, color)):
                    weight = LOOK_MOMENTUM if self.known_KC[name] else 1.0
                    self.looks_KCE[name] += weight * (look_E - self.looks_KCE[name])
                    self.known_KC[name] = True

    def prompt(self, model: Sam2ImageModel, names_M2: Tensor) -> Tensor:
        """Sparse tokens [M, 3, 256] of names: two "not a point" tokens and a look, as a [SEG] state will come.

        The look is blurred and scaled at random, so that the decoder knows the surroundings of looks as well.
        """
        empty_M2E = model.sam_prompt_encoder.not_a_point_embed.weight.expand(len(names_M2), 2, -1)
        look_ME = self.looks_KCE[names_M2[:, 0], names_M2[:, 1]]
        spread_M1 = look_ME.std(dim=1, keepdim=True)
        look_ME = look_ME + torch.rand(len(look_ME), 1) * spread_M1 * torch.randn_like(look_ME)
        look_ME = look_ME * torch.exp(0.4 * torch.randn(len(look_ME), 1))
        return torch.cat([empty_M2E, look_ME[:, None]], 1)

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


def train(out: Path, minutes: float, rooms: int, before: dict[str, int]) -> dict[str, int]:
    """Trains for `minutes` of processor time, saving into `out` as it goes; returns what the card says of it.

    before: what this returned when it trained the model in `out`, to go on from there; {} to start anew.
    """
    done = before or {"seed": TRAIN_SEED, "runs": 0, "steps": 0, "rooms": 0, "seconds": 0}
    torch.manual_seed(TRAIN_SEED + done["runs"])
    rng = np.random.default_rng((TRAIN_SEED, done["runs"]))
    model = Sam2ImageModel.from_pretrained(out).train() if before else _placed()
    head = NameHead()
    optimizers = _optimizers(model, head)
    peak = MORE_RATE if before else PEAK_RATE
    seen = rooms_of(TRAIN_SEED, rooms, TRAIN_SIZES)
    start = saved = time.process_time()
    recent: list[Floats] = []
    order: list[int] = []
    step = 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        model.set_image_size(COARSE_SIZE if not before and progress < COARSE_SHARE else FULL_SIZE)
        if len(order) < IMAGES_PER_STEP:
            order = rng.permutation(len(seen)).tolist()
        picked = [seen[order.pop()] for _ in range(IMAGES_PER_STEP)]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = peak * min(1.0, progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        recent.append(train_step(model, head, optimizers, picked, rng))
        step += 1
        if step % LOG_STEPS == 0:
            means = np.mean(recent, axis=0).round(3).tolist()
            log.info("step %d, %.0f %%: pixels; boxes, clicks, names and IoU: %s", step, 100 * progress, means)
            recent.clear()
        if time.process_time() - saved > SAVE_SECONDS:
            _save(model, out)
            saved = time.process_time()
    _save(model, out)
    seconds = done["seconds"] + round(time.process_time() - start)
    return done | {"runs": done["runs"] + 1, "steps": done["steps"] + step, "rooms": rooms, "seconds": seconds}


def _optimizers(model: Sam2ImageModel, head: NameHead) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLPs, AdamW for all else; the rate is set at each step."""
    inner = ("trunk.blocks.", "transformer.layers.")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and any(part in name for part in inner)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *head.parameters()) if id(p) not in chosen]
    return [
        Muon(matrices, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=PEAK_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True),
    ]


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
    model: Sam2ImageModel, head: NameHead, optimizers: list[torch.optim.Optimizer], items: list[Example], rng: Rng
) -> Floats:
    """Pixel loss, then loss and IoU of boxes, clicks and names; all share the trunk's cost on the same images."""
    items = [mirrored(item) if rng.random() < 0.5 else item for item in items]
    size = model.config.image_size
    features = model.encode(preprocess([item.rgb_HW3 for item in items], size))
    count = PROMPTS if size == FULL_SIZE else COARSE_PROMPTS
    head.remember(features, items)
    asked = [draw_prompts(items, boxes=boxes, size=size, count=count, rng=rng) for boxes in (True, False)]
    asked.append(draw_names(items, size=size, count=count, rng=rng))
    found = [loss_of(model, head, features, batch) for batch in asked]
    pixel_loss = head.loss(features, items)
    torch.autograd.backward(pixel_loss + sum(loss for loss, _ in found))
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return np.array([pixel_loss.item(), *(value for loss, kept in found for value in (loss.item(), kept))])


def _save(model: Sam2ImageModel, out: Path) -> None:
    size = model.config.image_size
    model.set_image_size(FULL_SIZE)
    model.save_pretrained(out, torch.float16)
    model.set_image_size(size)


def main() -> None:
    """Trains and scores, goes on training, or only scores."""
    parser = argparse.ArgumentParser(description="Train the shipped segmenter.")
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time, on one thread")
    parser.add_argument("--rooms", type=int, default=4000, help="rooms to learn from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--more", action="store_true", help="go on from the model in --out")
    parser.add_argument("--score", action="store_true", help="score the model in --out again, without training")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    known = options.more or options.score
    before: dict[str, int] = json.loads((options.out / "card.json").read_text())["training"] if known else {}
    write_card(options.out, before if options.score else train(options.out, options.minutes, options.rooms, before))


if __name__ == "__main__":
    main()
