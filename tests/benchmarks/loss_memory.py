"""Peak memory of the token losses at InternVL2.5-1B's vocabulary, beside transformers' own loss over all positions.

2,048 tokens of which a tenth is supervised, one depth block among them, width 896, fp32; forward and backward. Each
side is a process of its own; memory is what its peak adds to what stood before, weights and states. Ours is what the
trainer's objective does with those states: text, marker, token and count terms (count at weight 0: computed, forward
and backward, and worth nothing). Theirs is the cross-entropy alone, and loss and gradients must be the same.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from perceptio.data.collator import Batch
from perceptio.data.template import LossKind
from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codec import DepthCodec
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.step import TERMS, Objective, counts_by_source
from schemas.training import LossWeights
from tests.benchmarks._decoding import CODES, TOKENS, VOCABULARY, WIDTH, model

LENGTH = 2_048
SUPERVISED = LENGTH // 10
WEIGHTS = dict.fromkeys(("count", "reconstruction", "mask_bce", "mask_dice", "gradient"), 0.0)
BAR, NEAR = 0.25, 1e-5


def _peak() -> int:
    """The process's peak of resident memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _model() -> PerceptioForConditionalGeneration:
    found = model()
    codebook = DepthCodebook(CodebookConfig(image_size=80, codes=CODES, dim=8, channels=(8, 8, 8), residual_blocks=0))
    codebook.train()(torch.rand(16, 80, 80))
    codec = DepthCodec(codebook.eval())
    assert codec.tokens == TOKENS
    found.config.codebook_digest = codec.digest
    found.attach_codec(codec)
    return found


def _batch(made: PerceptioForConditionalGeneration) -> Batch:
    """One sample: words, then a depth block and words that are supervised."""
    first = made.config.first_code_token_id
    target_T = torch.randint(0, made.config.seg_token_id, (LENGTH,))
    kind_T = torch.zeros(LENGTH, dtype=torch.long)
    kind_T[-SUPERVISED:] = LossKind.TEXT
    kind_T[-SUPERVISED : -SUPERVISED + TOKENS] = LossKind.TOKEN
    target_T[kind_T == LossKind.TOKEN] = torch.randint(first, first + CODES, (TOKENS,))
    none_M, empty = torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, 64, 64)
    return Batch(
        input_ids_BT=target_T[None],
        target_ids_BT=target_T[None],
        attention_mask_BT=torch.ones(1, LENGTH, dtype=torch.long),
        loss_kind_BT=kind_T[None],
        pixel_values=empty,
        source_B=torch.zeros(1, dtype=torch.long),
        seg_sample_M=none_M,
        seg_position_M=none_M,
        seg_image_M=none_M,
        masks_MHW=torch.zeros(0, 16, 16),
        mask_seeds=(),
        sam2_pixels_B3SS=empty,
        depth_target_BHW=torch.zeros(1, 80, 80),
        has_depth_B=torch.tensor([True]),
        sample_ids=("one",),
        positions=(0,),
    )


def _measured(side: str) -> tuple[float, float, Tensor, Tensor]:
    """The loss of one side, the gigabytes that it added to what stood before, gradients of states and output head."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = _model()
    batch, hidden_BTD = _batch(made), torch.randn(1, LENGTH, WIDTH, requires_grad=True)
    # one mean over all supervised tokens, as theirs
    weights = LossWeights(text=1, marker=1, token=1, **WEIGHTS, temperature=1, mask_points=1)
    objective = Objective(made, weights, 1)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    if side == "ours":
        sums_C = objective._tokens(batch, hidden_BTD, torch.zeros(1, len(TERMS)))[0]
        weights_C = torch.tensor([getattr(weights, term) for term in TERMS])
        loss = (sums_C * weights_C).sum() / counts_by_source([batch], 1)[0, :3].sum()
    else:
        labels_BT = torch.where(batch.loss_kind_BT != LossKind.IGNORE, batch.target_ids_BT, -100)
        loss = ForCausalLMLoss(made.lm_head(hidden_BTD), labels_BT, VOCABULARY)
    loss.backward()
    added = (_peak() - before) / 1e9
    head_VD, states_BTD = made.lm_head.weight.grad, hidden_BTD.grad
    assert head_VD is not None and states_BTD is not None
    return loss.item(), added, states_BTD, head_VD[:: VOCABULARY // 1000]  # a row in 151 of the head's


def run() -> dict[str, Any]:
    """The benchmark's result."""
    found = {}
    for side in ("ours", "transformers"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[side] = pool.apply(_measured, (side,))
    ours, theirs = found["ours"], found["transformers"]
    assert abs(ours[0] - theirs[0]) < NEAR * theirs[0], f"{ours[0]} beside {theirs[0]}"
    for own, other in zip(ours[2:], theirs[2:], strict=True):
        assert other.norm() > 0 and (own - other).norm() < NEAR * other.norm(), "the gradients differ"
    value = ours[1] / theirs[1]
    return {
        "name": "loss_memory",
        "what": "peak memory of the token losses, of full-sequence logits'",
        "value": value,
        "unit": "x",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": [{"side": side, "loss": row[0], "gigabytes": row[1]} for side, row in found.items()],
    }
