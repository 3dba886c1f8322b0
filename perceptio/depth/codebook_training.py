"""The training of a codebook: data-parallel over the ranks of the default process group, or alone without one.

Every step is a function of the weights, the optimizer and (seed, rank, step), so that a training which was saved and
resumed ends with the codebook of an undisturbed one.

Shape legend: R rows of this rank, B its part of a batch, S the codebook's image side, K codes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from perceptio.depth.codebook import DepthCodebook
from perceptio.depth.codebook_state import Progress, snapshot

WARM_UP = 0.2  # share of the steps without quantizing: k-means on an untrained encoder's features finds nothing
RAMP = 20  # steps in which the learning rate rises
MEASURES = 6  # times that the held-out error is taken; the best weights are kept
STEPS16 = 65535  # inv_depth 1.0 in 16 bits

# Of DistributedDataParallel. No broadcast of buffers: the quantizer shares its statistics itself, and a difference must
# show. Without find_unused_parameters gradients are regrouped after the first step, and three ranks or more then add
# them in another order: a resumed training would end elsewhere.
PARALLEL: dict[str, Any] = {"broadcast_buffers": False, "find_unused_parameters": True}


@dataclass(frozen=True)
class Share:
    """The maps of one rank at the codebook's size, in 16 bits."""

    train_RSS: Tensor
    held_out_RSS: Tensor
    names: tuple[str, ...]  # of the held-out maps


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; the same on every rank."""

    steps: int
    batch: int  # of one rank
    learning_rate: float
    seed: int
    checkpoint_every: int


@dataclass(frozen=True)
class Measured:
    """Figures over the held-out maps of all ranks, and what stands behind them."""

    figures: dict[str, float]  # mae (inv_depth), usage (share of the codes), perplexity
    counts_K: Tensor  # uses of each code, all ranks
    errors_R: Tensor  # MAE of each of this rank's maps


def learn(
    codebook: DepthCodebook,
    model: nn.Module,
    optimizer: Optimizer,
    share: Share,
    plan: Plan,
    progress: Progress,
    save: Callable[[Progress], None],
) -> None:
    """Trains from `progress.step` to the end; `progress` then holds the best weights by held-out error.

    model: the codebook as it is called in training, itself or wrapped for data-parallel work. save: called by every
    rank after each `checkpoint_every` steps but not after the last one.
    """
    rank, device = _rank(), codebook.vectors_KD.device
    warm_up = int(WARM_UP * plan.steps)
    measured = {plan.steps - 1 - i * (plan.steps - warm_up) // MEASURES for i in range(MEASURES)}
    model.train()
    for step in range(progress.step, plan.steps):
        torch.manual_seed(mixed(plan.seed, rank, step))  # k-means and the restart of dead codes draw from it
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate(step, plan.steps)
        rows = batch_rows(len(share.train_RSS), plan.batch, plan.seed, rank, step)
        maps_BSS = (share.train_RSS[rows].float() / STEPS16).to(device)
        losses = model(maps_BSS, quantize=step >= warm_up).losses
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()
        progress.step = step + 1
        if step in measured:
            _note(codebook, share.held_out_RSS, losses, progress)
            model.train()
        if progress.step % plan.checkpoint_every == 0 and progress.step < plan.steps:
            save(progress)


def rate(step: int, steps: int) -> float:
    """The learning rate at a step as a share of its peak: a short ramp, then half a cosine."""
    return min(1.0, (step + 1) / RAMP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def batch_rows(rows: int, batch: int, seed: int, rank: int, step: int) -> Tensor:
    """The rows of one step's batch (B,): every row once a pass, in a new order each pass."""
    places = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(rows, seed, rank, place // rows)[place % rows] for place in places])


@torch.no_grad()
def measure(codebook: DepthCodebook, maps_RSS: Tensor) -> Measured:
    """Figures of a codebook, which is left in eval mode. Every rank calls it, also with no maps of its own."""
    codebook.eval()
    counts_K, errors = torch.zeros(codebook.config.codes), [torch.zeros(0)]
    for maps_BSS in torch.split(maps_RSS, 64) if len(maps_RSS) else ():
        truth_BSS = maps_BSS.float().to(codebook.vectors_KD.device) / STEPS16
        found = codebook(truth_BSS)
        errors.append((found.inv_depth_BSS.clamp(0, 1) - truth_BSS).abs().mean(dim=(1, 2)).cpu())
        counts_K += torch.bincount(found.codes_BN.flatten(), minlength=codebook.config.codes).cpu()
    errors_R = torch.cat(errors)
    total, rows = total_of(errors_R.double().sum()), total_of(torch.tensor(float(len(maps_RSS))))
    counts_K = total_of(counts_K)
    share_K = counts_K / counts_K.sum()
    figures = {
        "mae": float(total / rows),
        "usage": float((counts_K > 0).float().mean()),
        "perplexity": float(torch.special.entr(share_K).sum().exp()),
    }
    return Measured(figures, counts_K, errors_R)


def mean_map_error(share: Share) -> float:
    """Held-out MAE of the mean training map: what can be had without looking."""
    rows = total_of(torch.tensor(float(len(share.train_RSS))))
    mean_SS = total_of(share.train_RSS.double().sum(dim=0)) / rows / STEPS16
    error = (share.held_out_RSS.double() / STEPS16 - mean_SS).abs().mean(dim=(1, 2)).sum()
    return float(total_of(error) / total_of(torch.tensor(float(len(share.held_out_RSS)))))


def total_of(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def mixed(*numbers: int) -> int:
    """A seed of 56 bits from whole numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")


def _note(codebook: DepthCodebook, held_out_RSS: Tensor, losses: dict[str, Tensor], progress: Progress) -> None:
    """Adds the figures of now to the history, and the weights where they are the best so far."""
    figures = {"step": progress.step, **measure(codebook, held_out_RSS).figures}
    progress.history.append({**figures, **{name: float(value.detach()) for name, value in losses.items()}})
    if progress.best is None or figures["mae"] < progress.figures["mae"]:
        progress.best, progress.figures = snapshot(codebook), figures


@lru_cache(maxsize=2)  # a batch reaches over the end of a pass at times
def _order(rows: int, seed: int, rank: int, turn: int) -> Tensor:
    """The rows in the order of one pass."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed(seed, rank, turn)))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
