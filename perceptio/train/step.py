"""One training step: the objective over a micro-batch, and the sum of its terms over a global batch.

Shape legend: B samples of a micro-batch, T tokens, D hidden size, P supervised positions, V vocabulary, M masks,
N depth tokens, K codes, S side of SAM2's input or of the codebook, C number of terms, Q number of sources.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceptio import losses
from perceptio.data.collator import Batch
from perceptio.data.template import LossKind
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.flops import Work
from perceptio.train.stopwatch import Stopwatch
from schemas.training import LossWeights

TERMS = ("text", "marker", "token", "count", "reconstruction", "mask_bce", "mask_dice")
_KINDS = {"text": LossKind.TEXT, "marker": LossKind.MARKER, "token": LossKind.TOKEN}


@dataclass(frozen=True)
class StepReport:
    """What a step over one global batch found; the same on every rank, but for `times`."""

    loss: float  # no finite number where the step was skipped, or nearly so
    terms: dict[str, float]  # unweighted, over the whole global batch; one that no sample has a part of is left out
    by_source: dict[str, dict[str, float]]  # the same, per data set
    gradient_norm: float
    samples: dict[str, int]  # of each data set in the global batch
    tokens: int  # that were read, image tokens among them and padding not
    drawn: str  # 16 hex digits of the ids of its samples, in whatever order
    skipped: tuple[str, ...] = ()  # samples that may have made loss or gradient no number, so that nothing was learnt
    work: Work = field(default_factory=Work)  # what it asked of the model's parts
    times: dict[str, float] = field(default_factory=dict, compare=False)  # of this rank, by phase (see `Stopwatch`)
    unread: dict[str, int] = field(default_factory=dict)  # samples of each row group that could not be read, left out


class Objective(nn.Module):
    """The weighted sum of the terms of METHOD.md over one micro-batch; what DeepSpeed wraps."""

    def __init__(
        self,
        model: PerceptioForConditionalGeneration,
        weights: LossWeights,
        sources: int,
        *,
        packed_to: int | None = None,
    ) -> None:
        super().__init__()
        if model.codec is None:
            raise ValueError("the model has no codec: attach_codec() before training")
        self.model, self.weights, self.sources, self.packed_to = model, weights, sources, packed_to

    def forward(self, batch: Batch, counts_C: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the detached sums of the terms by source [Q, C].

        `counts_C` are the denominators over the whole *global* batch, so that the micro-batches' losses add up.
        """
        hidden_BTD = self.model.hidden_states(
            batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values, packed_to=self.packed_to
        )
        sums_QC = hidden_BTD.new_zeros(self.sources, len(TERMS), dtype=torch.float32)
        sums_QC = self._tokens(batch, hidden_BTD, sums_QC)
        sums_QC = self._masks(batch, hidden_BTD, sums_QC)
        weights_C = torch.tensor([getattr(self.weights, term) for term in TERMS], device=sums_QC.device)
        loss = (sums_QC.sum(0) / counts_C.clamp(min=1) * weights_C).sum()
        return loss, sums_QC.detach()

    def _tokens(self, batch: Batch, hidden_BTD: Tensor, sums_QC: Tensor) -> Tensor:
        """Adds text, marker, token, count and reconstruction; only supervised positions reach the output head."""
        config = self.model.config
        supervised_BT = batch.loss_kind_BT != LossKind.IGNORE
        sample_P, position_P = supervised_BT.nonzero(as_tuple=True)
        logits_PV = self.model.lm_head(hidden_BTD[sample_P, position_P - 1])  # the state before predicts the token
        targets_P = batch.target_ids_BT[sample_P, position_P]
        kind_P, source_P = batch.loss_kind_BT[sample_P, position_P], batch.source_B[sample_P]
        nll_P = losses.token_cross_entropy(logits_PV, targets_P)
        for term, kind in _KINDS.items():
            sums_QC = _add(sums_QC, term, source_P, torch.where(kind_P == kind, nll_P, 0.0))
        depth_P = kind_P == LossKind.TOKEN
        count_B = losses.count(
            logits_PV,
            depth_P,
            sample_P,
            samples=len(batch.input_ids_BT),
            first_code=config.first_code_token_id,
            codes=config.depth_codes,
            tokens=config.depth_tokens,
        )
        sums_QC = _add(sums_QC, "count", batch.source_B, count_B)
        if self.weights.reconstruction == 0 or not batch.has_depth_B.any():
            return sums_QC
        assert self.model.codec is not None
        first = config.first_code_token_id
        logits_ENK = logits_PV[depth_P, first : first + config.depth_codes].unflatten(0, (-1, config.depth_tokens))
        implied_ESS = self.model.codec.decode_soft(logits_ENK, self.weights.temperature)
        target_ESS = batch.depth_target_BHW[batch.has_depth_B].to(implied_ESS.dtype)
        errors_E = losses.depth_reconstruction(implied_ESS, target_ESS, gradient=self.weights.gradient)
        return _add(sums_QC, "reconstruction", batch.source_B[batch.has_depth_B], errors_E)

    def _masks(self, batch: Batch, hidden_BTD: Tensor, sums_QC: Tensor) -> Tensor:
        """Adds the mask terms, a mean over the masks of each sample; the decoder runs even where there is no mask,
        since every rank must run every trained part."""
        size = self.model.segmenter.sam2.config.image_size
        pixels_E3SS = batch.sam2_pixels_B3SS
        if len(pixels_E3SS) == 0:
            pixels_E3SS = pixels_E3SS.new_zeros(1, 3, size, size)
        features = self.model.image_features(pixels_E3SS.to(hidden_BTD.dtype))
        hidden_MD = hidden_BTD[batch.seg_sample_M, batch.seg_position_M]
        logits_MHW = self.model.masks(hidden_MD, features, batch.seg_image_M).logits_MHW.float()
        if len(logits_MHW) == 0:
            return sums_QC + logits_MHW.sum()  # 0, but connected
        points_MS2 = losses.sample_points(
            logits_MHW,
            points=self.weights.mask_points,
            seeds=batch.mask_seeds,
            oversample=self.weights.mask_oversample,
            importance=self.weights.mask_importance,
        )
        found_MS = losses.values_at(logits_MHW, points_MS2)
        target_MS = losses.values_at(batch.masks_MHW.to(found_MS.dtype), points_MS2)
        masks_B = torch.bincount(batch.seg_sample_M, minlength=len(batch.input_ids_BT))
        share_M = 1.0 / masks_B[batch.seg_sample_M]
        source_M = batch.source_B[batch.seg_sample_M]
        sums_QC = _add(sums_QC, "mask_bce", source_M, share_M * losses.mask_bce(found_MS, target_MS))
        return _add(sums_QC, "mask_dice", source_M, share_M * losses.mask_dice(found_MS, target_MS))


def counts_by_source(batches: Sequence[Batch], sources: int) -> Tensor:
    """Denominators [Q, C] of this rank's share of a global batch: tokens of each kind, samples that have each part."""
    counts_QC = torch.zeros(sources, len(TERMS))
    for batch in batches:
        for term, kind in _KINDS.items():
            counts_QC = _add(counts_QC, term, batch.source_B, (batch.loss_kind_BT == kind).sum(1).float())
        has_codes_B = (batch.loss_kind_BT == LossKind.TOKEN).any(1)  # not where codes count as text
        for term in ("count", "reconstruction"):
            counts_QC = _add(counts_QC, term, batch.source_B, has_codes_B.float())
        has_mask_B = torch.bincount(batch.seg_sample_M, minlength=len(batch.input_ids_BT)) > 0
        for term in ("mask_bce", "mask_dice"):
            counts_QC = _add(counts_QC, term, batch.source_B, has_mask_B.float())
    return counts_QC


def train_step(engine: Any, batches: Sequence[Batch], sources: Sequence[str]) -> StepReport:
    """The report of one optimizer step over a global batch, of which `batches` are this rank's micro-batches.

    Where the gradient is not finite DeepSpeed leaves the step out, in silence: weights, optimizer and schedule stay.
    The report then names the samples of the micro-batches whose loss is no number, or of all where each is one. Raises
    FloatingPointError where a step was taken all the same, ValueError where all samples of the global batch were left
    out.
    """
    world, objective = dist.get_world_size(), engine.module
    counts_QC = counts_by_source(batches, len(sources)).to(engine.device)
    dist.all_reduce(counts_QC)
    counts_C = counts_QC.sum(0)
    own = _sizes(batches, len(sources)), Work.of(batches, objective.model.config.image_token_id).counts()
    sizes = torch.cat([part.flatten() for part in own]).to(engine.device)
    dist.all_reduce(sizes)
    sizes_4Q, work = sizes[: own[0].numel()].view_as(own[0]), Work(*sizes[own[0].numel() :].tolist())
    left_out = [where for batch in batches for _, where in batch.unread]
    unread = dict(sorted(Counter(_of_all_ranks(left_out)).items())) if sizes_4Q[3].any() else {}
    if not sizes_4Q[0].any():
        raise ValueError(f"none of the {sum(unread.values())} samples of a global batch can be read: {unread}")
    sums_QC = torch.zeros_like(counts_QC)
    spoilt: list[str] = []
    watch = Stopwatch(engine.device)
    for batch in batches:
        watch.begin("forward")
        loss, sums = engine(batch.to(engine.device), counts_C)
        watch.begin("backward")
        # DeepSpeed takes the mean over ranks and micro-batches; the loss is a share of a sum already
        engine.backward(loss * world * len(batches))
        watch.begin("optimizer")
        engine.step()
        watch.end()
        sums_QC += sums
        if not torch.isfinite(loss):
            spoilt += batch.sample_ids
    dist.all_reduce(sums_QC)
    terms = _means(sums_QC.sum(0), counts_C, objective.weights)
    by_source = {name: _means(sums_QC[q], counts_QC[q], objective.weights) for q, name in enumerate(sources)}
    total = sum(getattr(objective.weights, term) * value for term, value in terms.items())
    samples = {name: int(count) for name, count in zip(sources, sizes_4Q[0].tolist(), strict=True)}
    read = samples, int(sizes_4Q[1].sum()), f"{int(sizes_4Q[2].sum()) % 2**64:016x}"
    times = watch.seconds()  # the terms were copied to the host above, behind all that was timed
    if engine.was_step_applied():
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(
                f"a step was taken with loss {total} and gradient norm {norm}, expected it skipped"
            )
        return StepReport(total, terms, by_source, norm, *read, work=work, times=times, unread=unread)
    names = _of_all_ranks(spoilt) or _of_all_ranks([name for batch in batches for name in batch.sample_ids])
    skipped = tuple(filter(None, names))
    return StepReport(total, terms, by_source, math.nan, *read, skipped=skipped, work=work, times=times, unread=unread)


def _sizes(batches: Sequence[Batch], sources: int) -> Tensor:
    """Samples, the tokens that they have, a sum of their ids' digests (modulo 2^64), samples left out: [4, Q]."""
    sizes_4Q = torch.zeros(4, sources, dtype=torch.long)
    for batch in batches:
        digests = [hashlib.sha256(name.encode()).digest() for name in batch.sample_ids]
        ids_B = torch.tensor([int.from_bytes(digest[:8], signed=True) for digest in digests])
        named_B = torch.tensor([int(name != "") for name in batch.sample_ids])  # blanks are no samples
        rows = (torch.ones_like(batch.source_B), batch.attention_mask_BT.sum(1), ids_B.to(batch.source_B.device))
        for row, values_B in enumerate(rows):
            sizes_4Q[row] = sizes_4Q[row].index_add(0, batch.source_B, values_B * named_B)
        for source, _ in batch.unread:
            sizes_4Q[3, source] += 1
    return sizes_4Q


def _of_all_ranks(names: list[str]) -> list[str]:
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    return [name for part in found for name in part]


def _means(sums_C: Tensor, counts_C: Tensor, weights: LossWeights) -> dict[str, float]:
    """By term, of those that were computed for a sample: reconstruction is not where its weight is 0."""
    counted = zip(TERMS, sums_C.tolist(), counts_C.tolist(), strict=True)
    skipped = () if weights.reconstruction else ("reconstruction",)
    return {term: total / number for term, total, number in counted if number > 0 and term not in skipped}


def _add(sums_QC: Tensor, term: str, source_X: Tensor, values_X: Tensor) -> Tensor:
    """`sums_QC` with the values added in the term's column, by source."""
    column_Q = sums_QC.new_zeros(len(sums_QC)).index_add(0, source_X, values_X.to(sums_QC.dtype))
    place_C = torch.zeros(sums_QC.shape[1], dtype=sums_QC.dtype, device=sums_QC.device)
    place_C[TERMS.index(term)] = 1
    return sums_QC + column_Q[:, None] * place_C
