"""The zoo's optimizer computes what torch's Muon computes, in fp32."""

from __future__ import annotations

import torch
from torch import nn

from workflows.zoo.muon import Muon, orthogonal


def test_three_steps_move_the_matrices_as_torchs_own_do() -> None:
    torch.manual_seed(0)
    shapes = [(24, 16), (24, 16), (16, 40)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    unused = nn.Parameter(torch.ones(4, 4))
    optimizers = (
        Muon([*ours, unused], lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        moved = (a - w).norm()
        assert moved > 0.1
        assert (a - b).norm() / moved < 0.03, "bfloat16's rounding alone"
    assert torch.equal(unused, torch.ones(4, 4))


def test_the_iteration_keeps_singular_vectors_and_evens_out_the_values() -> None:
    torch.manual_seed(1)
    matrix_MRC = torch.randn(3, 32, 20)
    values_MC = torch.linalg.svdvals(orthogonal(matrix_MRC))
    assert values_MC.min() > 0.5 and values_MC.max() < 1.3
    u, _, v = torch.linalg.svd(matrix_MRC, full_matrices=False)
    inside_MCC = u.mT @ orthogonal(matrix_MRC) @ v.mT
    off = inside_MCC - torch.diag_embed(inside_MCC.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
