"""[SEG] states become masks; gradients reach the projector and the mask decoder, and nothing that is frozen."""

from __future__ import annotations

import pytest
import torch

from perceptio.segmentation.mask_decoder import SegMaskDecoder
from perceptio.segmentation.sam2_image import FOREGROUND_POINT, Sam2ImageConfig, Sam2ImageModel

WIDTH = 24
PIXELS_B3SS = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoder() -> SegMaskDecoder:
    torch.manual_seed(0)
    config = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    return SegMaskDecoder(Sam2ImageModel(config), WIDTH)


def test_each_state_gives_one_mask_of_its_own_image(decoder: SegMaskDecoder) -> None:
    hidden_MD = torch.randn(3, WIDTH)
    index_M = torch.tensor([1, 0, 1])
    with torch.no_grad():
        features = decoder.encode(PIXELS_B3SS)
        masks = decoder(hidden_MD, features, index_M)
        alone = decoder(hidden_MD[1:2], decoder.encode(PIXELS_B3SS[:1]), torch.tensor([0]))
    assert masks.logits_MHW.shape == (3, 32, 32)
    assert masks.iou_M.shape == (3,)
    torch.testing.assert_close(masks.logits_MHW[1:2], alone.logits_MHW, atol=1e-4, rtol=1e-4)


def test_the_empty_prompt_is_what_sams_prompt_encoder_makes_of_no_point(decoder: SegMaskDecoder) -> None:
    prompt_encoder = decoder.sam2.sam_prompt_encoder
    nothing = prompt_encoder(points=(torch.zeros(1, 1, 2), -torch.ones(1, 1)), boxes=None, masks=None)[0]
    assert torch.equal(nothing, prompt_encoder.not_a_point_embed.weight.expand(1, 2, -1))


def test_first_prompts_can_be_clicks(decoder: SegMaskDecoder) -> None:
    torch.manual_seed(0)
    wide = SegMaskDecoder(decoder.sam2, 256)
    hidden_MD, sam2 = torch.randn(400, 256), decoder.sam2
    assert wide.projector(hidden_MD).std().item() == pytest.approx(0.24, rel=0.1)
    wide.start_as_clicks()
    prompt_MC = wide.projector(hidden_MD)
    places_M12 = torch.rand(400, 1, 2) * sam2.config.image_size
    click_MC = sam2.embed_points(places_M12, torch.full((400, 1), FOREGROUND_POINT))[:, 0]
    place_MC = click_MC - sam2.sam_prompt_encoder.point_embeddings[FOREGROUND_POINT].weight
    assert torch.allclose(wide.projector[2].bias, (click_MC - place_MC)[0], atol=1e-6)
    assert (prompt_MC - wide.projector[2].bias).std().item() == pytest.approx(place_MC.std().item(), rel=0.1)


def test_gradients_reach_every_trained_weight_and_no_frozen_one(decoder: SegMaskDecoder) -> None:
    hidden_MD = torch.randn(2, WIDTH, requires_grad=True)
    decoder(hidden_MD, decoder.encode(PIXELS_B3SS), torch.tensor([0, 1])).logits_MHW.square().mean().backward()
    trained = {name for name, weight in decoder.named_parameters() if weight.requires_grad}
    assert {name for name, weight in decoder.named_parameters() if weight.grad is not None} == trained
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in trained} == {
        "projector.0",
        "projector.2",
        "sam2.sam_mask_decoder",
    }
    assert any(name.startswith("sam2.sam_mask_decoder.conv_s0") for name in trained)
    assert hidden_MD.grad is not None and hidden_MD.grad.abs().sum() > 0


@pytest.mark.parametrize("part", ["projector", "decoder"])
def test_either_part_trains_alone(decoder: SegMaskDecoder, part: str) -> None:
    decoder.set_trainable(projector=part == "projector", decoder=part == "decoder")
    trained = {name for name, weight in decoder.named_parameters() if weight.requires_grad}
    start = "projector." if part == "projector" else "sam2.sam_mask_decoder."
    assert trained and all(name.startswith(start) for name in trained)
    hidden_MD = torch.randn(2, WIDTH)
    decoder(hidden_MD, decoder.encode(PIXELS_B3SS), torch.tensor([0, 1])).logits_MHW.square().mean().backward()
    assert {name for name, weight in decoder.named_parameters() if weight.grad is not None} == trained


def test_no_states_give_no_masks_but_zero_gradients_everywhere(decoder: SegMaskDecoder) -> None:
    hidden_MD = torch.randn(0, WIDTH, requires_grad=True)
    masks = decoder(hidden_MD, decoder.encode(PIXELS_B3SS), torch.zeros(0, dtype=torch.long))
    assert masks.logits_MHW.shape == (0, 32, 32)
    masks.logits_MHW.sum().backward()
    for name, weight in decoder.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and not weight.grad.any(), name
    assert hidden_MD.grad is not None


def test_another_state_gives_another_mask(decoder: SegMaskDecoder) -> None:
    with torch.no_grad():
        features = decoder.encode(PIXELS_B3SS)
        masks = decoder(torch.randn(2, WIDTH) * 5, features, torch.tensor([0, 0])).logits_MHW
    assert not torch.allclose(masks[0], masks[1])


def test_wrong_indices_are_refused(decoder: SegMaskDecoder) -> None:
    features = decoder.encode(PIXELS_B3SS)
    with pytest.raises(IndexError, match=r"\[2\]"):
        decoder(torch.randn(1, WIDTH), features, torch.tensor([2]))
    with pytest.raises(ValueError, match="1 image indices"):
        decoder(torch.randn(2, WIDTH), features, torch.tensor([0]))
