"""The loss terms: values computed by hand, gradients of the right sign, zero exactly where they should be zero."""

from __future__ import annotations

import math

import pytest
import torch

from perceptio import losses

FIRST, CODES, TOKENS, VOCABULARY = 4, 3, 2, 8


def one_hot_logits(ids: list[int]) -> torch.Tensor:
    logits_PV = torch.full((len(ids), VOCABULARY), -1e9, dtype=torch.float64)
    logits_PV[range(len(ids)), ids] = 0.0
    return logits_PV


def count_of(logits_PV: torch.Tensor, depth: list[bool], sample: list[int] | None = None) -> torch.Tensor:
    sample_P = torch.tensor(sample or [0] * len(depth))
    return losses.count(
        logits_PV,
        torch.tensor(depth),
        sample_P,
        samples=int(sample_P.max()) + 1,
        first_code=FIRST,
        codes=CODES,
        tokens=TOKENS,
    ).sum()


def test_cross_entropy_by_hand() -> None:
    logits_PV = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    values_P = losses.token_cross_entropy(logits_PV, torch.tensor([1, 0]))
    assert values_P.tolist() == pytest.approx([-math.log(0.75), -math.log(0.5)], rel=1e-6)


def test_cross_entropy_of_nothing_is_zero_and_connected() -> None:
    logits_PV = torch.randn(0, 5, requires_grad=True)
    losses.token_cross_entropy(logits_PV, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert logits_PV.grad is not None


def test_count_is_zero_exactly_on_a_well_formed_distribution() -> None:
    assert count_of(one_hot_logits([0, 4, 6, 1]), [False, True, True, False]).item() == 0


def test_count_by_hand() -> None:
    p_PV = torch.tensor([[0.5, 0, 0, 0, 0.5, 0, 0, 0], [0.25, 0, 0, 0, 0.25, 0.25, 0.25, 0]], dtype=torch.float64)
    value = count_of(torch.log(p_PV + 1e-300), [False, True]).item()
    assert value == pytest.approx((0.25 / TOKENS) ** 2 + (0.5 / TOKENS) ** 2)


@pytest.mark.parametrize(
    ("ids", "depth", "position", "more_codes_helps"),
    [
        ([0, 4, 1, 1], [False, True, True, False], 2, True),  # too few: a depth position without code mass
        ([0, 4, 5, 6], [False, True, True, False], 3, False),  # too many: a code where text belongs
        ([4, 1, 5, 0], [False, True, True, False], 0, False),  # misplaced: the pooled sum would be right
        ([4, 1, 5, 0], [False, True, True, False], 1, True),
    ],
)
def test_count_gradient_has_the_right_sign(
    ids: list[int], depth: list[bool], position: int, more_codes_helps: bool
) -> None:
    logits_PV = torch.full((4, VOCABULARY), -2.0, dtype=torch.float64)
    logits_PV[range(4), ids] = 2.0
    logits_PV.requires_grad_()
    count_of(logits_PV, depth).backward()
    assert logits_PV.grad is not None
    on_codes = logits_PV.grad[position, FIRST : FIRST + CODES].sum().item()
    assert (on_codes < 0) == more_codes_helps
    assert on_codes != 0


def test_count_leaves_out_samples_without_depth_and_keeps_samples_apart() -> None:
    logits_PV = one_hot_logits([4, 5, 6, 7, 4])
    depth = [True, True, False, False, False]
    assert count_of(logits_PV, depth, [0, 0, 1, 1, 1]).item() == 0
    assert count_of(logits_PV, depth, [0, 0, 0, 1, 1]).item() == pytest.approx((1 / TOKENS) ** 2)


def test_count_gradient_in_float64() -> None:
    torch.manual_seed(0)
    logits_PV = torch.randn(4, VOCABULARY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: count_of(x, [False, True, True, False]), (logits_PV,))


def test_reconstruction_by_hand_and_shape_error() -> None:
    predicted_BHW = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    target_BHW = torch.zeros(1, 2, 2, dtype=torch.float64)
    # L1 0.5; horizontal gradient 1, vertical 0
    assert losses.depth_reconstruction(predicted_BHW, target_BHW, gradient=0.5).tolist() == [pytest.approx(1.0)]
    steep_BHW = torch.tensor([[[0.0, 0.25], [0.5, 1.0]]], dtype=torch.float64)
    # L1 1.75 / 4; horizontal (0.25 + 0.5) / 2, vertical (0.5 + 0.75) / 2
    assert losses.depth_reconstruction(steep_BHW, target_BHW, gradient=0.5).tolist() == [pytest.approx(0.9375)]
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 3, 2\)"):
        losses.depth_reconstruction(predicted_BHW, torch.zeros(1, 3, 2), gradient=0.5)


def test_other_gradients_in_float64() -> None:
    torch.manual_seed(0)
    logits_PV = torch.randn(3, VOCABULARY, dtype=torch.float64, requires_grad=True)
    targets_P = torch.tensor([1, 7, 0])
    assert torch.autograd.gradcheck(lambda x: losses.token_cross_entropy(x, targets_P), (logits_PV,))
    predicted_BHW = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    target_BHW = torch.rand(2, 4, 5, dtype=torch.float64)  # no difference is 0, where L1 has no gradient
    assert torch.autograd.gradcheck(
        lambda x: losses.depth_reconstruction(x, target_BHW, gradient=0.5), (predicted_BHW,)
    )
    logits_MS = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    targets_MS = torch.rand(2, 6, dtype=torch.float64).round()
    assert torch.autograd.gradcheck(lambda x: losses.mask_bce(x, targets_MS), (logits_MS,))
    assert torch.autograd.gradcheck(lambda x: losses.mask_dice(x, targets_MS), (logits_MS,))


def test_points_prefer_the_uncertain_border() -> None:
    logits_MHW = torch.full((1, 64, 64), 9.0)
    logits_MHW[:, :, 31:33] = 0.0
    points_MS2 = losses.sample_points(logits_MHW, points=200, seeds=[0], oversample=3.0, importance=0.75)
    near = ((points_MS2[..., 0] - 0.5).abs() < 0.04).float().mean().item()
    assert points_MS2.shape == (1, 200, 2)
    assert near > 0.15  # uniform points would give 0.08
    assert points_MS2.min() >= 0
    assert points_MS2.max() <= 1


def test_values_at_pixel_centres() -> None:
    maps_MHW = torch.arange(16.0).reshape(1, 4, 4)
    points_MS2 = torch.tensor([[[0.125, 0.125], [0.875, 0.625]]])
    assert losses.values_at(maps_MHW, points_MS2).tolist() == [[0.0, 11.0]]


def test_a_right_mask_at_the_border_costs_nothing() -> None:
    mask_MHW = torch.zeros(1, 16, 16)
    mask_MHW[:, :, :4] = 1.0
    logits_MHW = 40.0 * (2 * mask_MHW - 1)
    edge_MS2 = torch.stack([torch.linspace(0, 0.2, 9), torch.zeros(9)], dim=-1)[None]
    assert losses.values_at(torch.ones(1, 16, 16), edge_MS2).tolist() == [[1.0] * 9]
    found_MS, target_MS = losses.values_at(logits_MHW, edge_MS2), losses.values_at(mask_MHW, edge_MS2)
    assert losses.mask_bce(found_MS, target_MS).item() < 1e-6
    assert losses.mask_dice(found_MS, target_MS).item() < 1e-6


def test_mask_terms_by_hand() -> None:
    logits_MS = torch.zeros(1, 4)
    targets_MS = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert losses.mask_bce(logits_MS, targets_MS).item() == pytest.approx(math.log(2))
    assert losses.mask_dice(logits_MS, targets_MS).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


@pytest.mark.parametrize("term", [losses.mask_bce, losses.mask_dice])
def test_mask_terms_of_no_masks_are_zero_and_connected(term) -> None:  # type: ignore[no-untyped-def]
    logits_MS = torch.zeros(0, 4, requires_grad=True)
    total = term(logits_MS, torch.zeros(0, 4)).sum()
    total.backward()
    assert total.item() == 0
