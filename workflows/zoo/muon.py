"""Muon (Jordan et al., 2024) in fp32, for the zoo's small models on a CPU.

torch.optim.Muon iterates in bfloat16, which a CPU without it emulates: on one with AVX2 alone a training step took
seven times as long. Matrices of one shape go through the iteration together.

Shape legend: M matrices of one shape; R, C their rows and columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as torch.optim.Muon has them
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, at AdamW's root mean square (`match_rms_adamw`); decoupled weight decay.

    What torch.optim.Muon computes, but for rounding.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            moved: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                moved[parameter.shape].append((parameter, parameter.grad.lerp(state["momentum"], group["momentum"])))
            for shape, pairs in moved.items():
                update_MRC = orthogonal(torch.stack([towards for _, towards in pairs]))
                for (parameter, _), update_RC in zip(pairs, update_MRC, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update_RC, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(matrix_MRC: torch.Tensor) -> torch.Tensor:
    """[M, R, C]: the same singular vectors, singular values drawn towards 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix_MRC.shape[1] > matrix_MRC.shape[2]
    found = matrix_MRC.mT if tall else matrix_MRC
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found
