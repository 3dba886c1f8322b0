"""Peak memory of the token losses at InternVL2.5-1B's vocabulary, beside transformers' own loss over all positions.

2,048 tokens of which a tenth is supervised, one depth block among them, width 896, fp32; forward and backward. Each
side is a process of its own; memory is what its peak adds to what stood before, weights and states. Ours computes the
text, marker, token and count terms, theirs the cross-entropy alone, whose mean must be the same.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from perceptio import losses
from perceptio.data.template import LossKind

VOCABULARY, WIDTH, LENGTH, CODES, TOKENS = 151_674, 896, 2_048, 128, 100
SUPERVISED, FIRST_CODE = LENGTH // 10, 151_674 - CODES - 1
BAR, NEAR = 0.25, 1e-5


def _peak() -> int:
    """The process's peak of resident memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _measured(side: str) -> dict[str, float]:
    """The loss of one side, and what it added to the memory that stood before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden_TD = torch.randn(LENGTH, WIDTH, requires_grad=True)
    targets_T = torch.randint(0, FIRST_CODE, (LENGTH,))
    kind_T = torch.zeros(LENGTH, dtype=torch.long)
    kind_T[-SUPERVISED:] = LossKind.TEXT
    kind_T[-SUPERVISED : -SUPERVISED + TOKENS] = LossKind.TOKEN
    targets_T[kind_T == LossKind.TOKEN] = torch.randint(FIRST_CODE, FIRST_CODE + CODES, (TOKENS,))
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    if side == "ours":
        (at_P,) = (kind_T != LossKind.IGNORE).nonzero(as_tuple=True)
        logits_PV = head(hidden_TD[at_P - 1])
        nll = losses.token_cross_entropy(logits_PV, targets_T[at_P]).mean()
        sample_P = torch.zeros_like(at_P)
        count = losses.count(
            logits_PV,
            kind_T[at_P] == LossKind.TOKEN,
            sample_P,
            samples=1,
            first_code=FIRST_CODE,
            codes=CODES,
            tokens=TOKENS,
        ).sum()
        (nll + count).backward()
    else:
        labels_T = torch.where(kind_T != LossKind.IGNORE, targets_T, -100)
        nll = ForCausalLMLoss(head(hidden_TD[None]), labels_T[None], VOCABULARY)
        nll.backward()
    return {"loss": nll.item(), "gigabytes": (_peak() - before) / 1e9}


def run() -> dict[str, Any]:
    """The benchmark's result."""
    found = {}
    for side in ("ours", "transformers"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[side] = pool.apply(_measured, (side,))
    ours, theirs = found["ours"], found["transformers"]
    assert abs(ours["loss"] - theirs["loss"]) < NEAR * theirs["loss"], f"{ours['loss']} beside {theirs['loss']}"
    value = ours["gigabytes"] / theirs["gigabytes"]
    return {
        "name": "loss_memory",
        "what": "peak memory of the token losses, of full-sequence logits'",
        "value": value,
        "unit": "x",
        "bar": BAR,
        "higher_is_better": False,
        "holds": value <= BAR,
        "rows": [{"side": side} | row for side, row in found.items()],
    }
