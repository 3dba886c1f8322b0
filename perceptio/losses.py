"""The named terms of the objective, each a small pure function.

Every function returns one value per token, sample or mask; the trainer sums them, by data set too, and divides by the
counts of the whole global batch, which it knows before the first backward, so that neither world size nor accumulation
changes the result.

Shape legend: P supervised positions, V vocabulary, K codes, N depth tokens, B samples, M masks, H, W pixels, S points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """-log p(target) per position: [P], in fp32 or better; the text, marker and token terms choose among them."""
    return F.cross_entropy(_precise(logits_PV), targets_P, reduction="none")


def count(
    logits_PV: Tensor, depth_P: Tensor, sample_P: Tensor, *, samples: int, first_code: int, codes: int, tokens: int
) -> Tensor:
    """((|D| - n_in) / N)^2 + (n_out / N)^2 per sample: [B], the count term (reconstruction).

    D are the positions of a sample whose target is a depth code (`depth_P`); n_in is the probability mass on codes
    summed over D, n_out the same over the sample's other reply positions. Zero exactly when every depth position
    carries all its mass on codes and no other position any. `sample_P` in [0, samples) names each position's sample;
    samples without a depth block give 0.
    """
    log_p_PV = torch.log_softmax(_precise(logits_PV), dim=-1)
    mass_P = log_p_PV[:, first_code : first_code + codes].exp().sum(-1)
    zeros_B = mass_P.new_zeros(samples)
    missing_B = zeros_B.index_add(0, sample_P, torch.where(depth_P, 1 - mass_P, 0.0))
    misplaced_B = zeros_B.index_add(0, sample_P, torch.where(depth_P, 0.0, mass_P))
    has_depth_B = zeros_B.index_add(0, sample_P, depth_P.to(zeros_B.dtype)) > 0
    penalty_B = (missing_B / tokens) ** 2 + (misplaced_B / tokens) ** 2
    return torch.where(has_depth_B, penalty_B, 0.0)


def gradient_difference(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients, per map: [B]."""
    error_BHW = a_BHW - b_BHW
    horizontal_B = error_BHW.diff(dim=2).abs().mean(dim=(1, 2))
    vertical_B = error_BHW.diff(dim=1).abs().mean(dim=(1, 2))
    return horizontal_B + vertical_B


def depth_reconstruction(predicted_BHW: Tensor, target_BHW: Tensor, *, gradient: float) -> Tensor:
    """Mean |predicted - target| + gradient * gradient difference per sample: [B], in inv_depth.

    The soft-merging term (paper; its form: reconstruction, after AiT): `predicted_BHW` is the map that the model's
    distribution over codes implies. Raises ValueError where the shapes differ.
    """
    if predicted_BHW.shape != target_BHW.shape:
        raise ValueError(
            f"depth maps differ in shape: predicted {tuple(predicted_BHW.shape)}, target {tuple(target_BHW.shape)}"
        )
    l1_B = (predicted_BHW - target_BHW).abs().mean(dim=(1, 2))
    return l1_B + gradient * gradient_difference(predicted_BHW, target_BHW)


def sample_points(
    logits_MHW: Tensor, *, points: int, seeds: Sequence[int], oversample: float, importance: float
) -> Tensor:
    """Point coordinates [M, S, 2] in [0, 1] (x, y), most where the mask is uncertain (lineage: Sa2VA, PointRend).

    `oversample` * S candidates are drawn; the `importance` share of S with the smallest |logit| is kept, the rest is
    uniform. Each mask has its own seed, so that a mask's points do not depend on its neighbours, rank or device.
    """
    if len(seeds) != len(logits_MHW):
        raise ValueError(f"{len(seeds)} seeds for {len(logits_MHW)} masks: give one each")
    candidates, certain = int(points * oversample), int(importance * points)
    drawn = [
        torch.rand(candidates + points - certain, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    drawn_MX2 = torch.stack(drawn).to(logits_MHW.device) if drawn else logits_MHW.new_zeros(0, candidates, 2)
    candidates_MC2, uniform_MS2 = drawn_MX2[:, :candidates], drawn_MX2[:, candidates:]
    with torch.no_grad():
        doubt_MC = -values_at(logits_MHW, candidates_MC2).abs()
    chosen_MS = doubt_MC.topk(certain, dim=1).indices
    uncertain_MS2 = torch.gather(candidates_MC2, 1, chosen_MS[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain_MS2, uniform_MS2], dim=1)


def values_at(maps_MHW: Tensor, points_MS2: Tensor) -> Tensor:
    """Bilinear values [M, S] of the maps at points in [0, 1] (x, y).

    Outside the outermost pixels' centres a map goes on as it is there. (Lineage: it fades to 0, so that a mask which
    reaches the border is wrong there whatever is predicted; ours is a reconstruction.)
    """
    grid_MS12 = (2 * points_MS2 - 1)[:, :, None].to(maps_MHW.dtype)
    return F.grid_sample(maps_MHW[:, None], grid_MS12, padding_mode="border", align_corners=False)[:, 0, :, 0]


def mask_bce(logits_MS: Tensor, targets_MS: Tensor) -> Tensor:
    """Mean binary cross-entropy at the sampled points, per mask: [M] (lineage: Sa2VA)."""
    logits_MS = _precise(logits_MS)
    per_point_MS = F.binary_cross_entropy_with_logits(logits_MS, targets_MS.to(logits_MS.dtype), reduction="none")
    return per_point_MS.mean(1)


def mask_dice(logits_MS: Tensor, targets_MS: Tensor) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) at the sampled points, per mask: [M] (lineage: Sa2VA)."""
    p_MS = _precise(logits_MS).sigmoid()
    t_MS = targets_MS.to(p_MS.dtype)
    overlap_M = 2 * (p_MS * t_MS).sum(1) + 1
    return 1 - overlap_M / (p_MS.sum(1) + t_MS.sum(1) + 1)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
