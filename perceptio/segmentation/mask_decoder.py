"""From the language model's hidden state at [SEG] to a mask: a projector into SAM2's prompt space, then its decoder.

Shape legend: B images, M masks ([SEG] tokens of the whole batch), D the language model's width, C = 256 channels, S the
square input size, H and W mask height and width = S/4, T sparse prompt tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceptio.segmentation.sam2_image import FOREGROUND_POINT, PROMPT_DIM, Sam2Features, Sam2ImageModel


@dataclass(frozen=True)
class MaskPrediction:
    """The masks of M [SEG] tokens."""

    logits_MHW: Tensor  # [M, S/4, S/4]; a pixel belongs to the object above 0
    iou_M: Tensor  # [0, 1], SAM2's own estimate; no loss of ours trains it


class SegMaskDecoder(nn.Module):
    """SAM2 prompted by [SEG] states (lineage: Sa2VA); owns SAM2 and trains its mask decoder alone.

    The projected state follows the two "not a point" tokens of an empty point prompt, the dense prompt is the no-mask
    embedding, and of three candidate masks the one with the best predicted IoU stays.

    Frozen: image encoder, prompt encoder, no-memory embedding, and the decoder's heads for IoU and object presence,
    which no mask loss reaches. Trained unless `set_trainable` says otherwise: projector and the rest of the decoder,
    with its two high-res convolutions.
    """

    def __init__(self, sam2: Sam2ImageModel, hidden_size: int) -> None:
        super().__init__()
        self.sam2 = sam2
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, PROMPT_DIM)
        )
        self.set_trainable(projector=True, decoder=True)

    def set_trainable(self, *, projector: bool, decoder: bool) -> None:
        """Sets whether the projector trains, and SAM2's mask decoder but for the heads that no mask loss reaches."""
        self.projector.requires_grad_(projector)
        self.sam2.requires_grad_(False)
        part = self.sam2.sam_mask_decoder
        part.requires_grad_(decoder)
        part.iou_prediction_head.requires_grad_(False)
        part.pred_obj_score_head.requires_grad_(False)

    @torch.no_grad()
    def start_as_clicks(self) -> None:
        """Makes an untrained projector's prompts clicks on an object, at places that hidden states of unit size choose.

        A click in SAM2 is the embedding of "a foreground point" plus the encoding of its place, sines and cosines. So
        that embedding becomes the projector's last bias, and its weights make the rest as large as such an encoding.
        From torch's own start, prompts are far smaller than any prompt that SAM2 knows, and it soon learns to draw
        nothing (reconstruction).
        """
        click_1C = self.sam2.sam_prompt_encoder.point_embeddings[FOREGROUND_POINT].weight
        self.projector.get_parameter("2.bias").copy_(click_1C[0])
        # torch's start gives each layer weights of variance 1 / (3 fan-in), and ReLU halves a second moment
        self.projector.get_parameter("2.weight").mul_(math.sqrt(1 / 2) * math.sqrt(18))

    def encode(self, pixels_B3SS: Tensor) -> Sam2Features:
        """Features of B >= 1 preprocessed images; only the high-res convolutions on top get gradients."""
        return self.sam2.encode(pixels_B3SS)

    def forward(self, hidden_MD: Tensor, features: Sam2Features, image_index_M: Tensor) -> MaskPrediction:
        """The masks of M >= 0 [SEG] states; `image_index_M` says which of the B images each belongs to.

        `hidden_MD` is the post-norm state of the last layer where [SEG] is the *input* (lineage: Sa2VA). With M = 0 the
        result is empty and still reaches every trained weight with gradient 0, so that each rank runs the same parts.
        Raises ValueError where the lengths differ, and IndexError on an image that does not exist.
        """
        if len(hidden_MD) != len(image_index_M):
            raise ValueError(f"{len(hidden_MD)} [SEG] states but {len(image_index_M)} image indices; give one each")
        images = len(features.embedding_BCHW)
        if len(image_index_M) and not 0 <= int(image_index_M.min()) <= int(image_index_M.max()) < images:
            raise IndexError(f"image indices {image_index_M.tolist()} do not all lie in 0..{images - 1}")
        count = len(hidden_MD)
        if count == 0:  # a dummy state, cut away below
            hidden_MD = hidden_MD.new_zeros(1, hidden_MD.shape[1]) + hidden_MD.sum()
            image_index_M = torch.zeros(1, dtype=torch.long, device=hidden_MD.device)
        prompt_M1C = self.projector(hidden_MD)[:, None]
        empty_M2C = self.sam2.sam_prompt_encoder.not_a_point_embed.weight.expand(len(prompt_M1C), 2, -1)
        logits_MHW, iou_M = self.sam2.decode(features, image_index_M, torch.cat([empty_M2C, prompt_M1C], dim=1))
        return MaskPrediction(logits_MHW[:count], iou_M[:count])
