"""Pseudo-masks from boxes and points: a SAM2 image model behind one call.

Shape legend: H, W image height and width in pixels; M prompts; S the model's square input size; P points, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import ModelCard
from sam2.utils.amg import calculate_stability_score
from torch import Tensor
from torch.nn import functional as F

from perceptio.segmentation.sam2_image import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND_POINT,
    Sam2Features,
    Sam2ImageModel,
    preprocess,
)

STABILITY_OFFSET = 1.0  # logits above and below the threshold 0 (lineage: SAM's automatic mask generator)

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, x1 and y1 one past the last pixel
Point = tuple[float, float]  # x, y in pixels


@dataclass(frozen=True)
class PseudoMask:
    """A mask that a teacher drew, and what it thinks of it."""

    mask_HW: npt.NDArray[np.bool_]
    predicted_iou: float  # [0, 1], the model's own estimate
    stability: float  # [0, 1], IoU of the masks at the logit thresholds +1 and -1


class MaskTeacher:
    """A SAM2 image model that answers box and point prompts; never shown an exact mask."""

    def __init__(self, model: Sam2ImageModel, *, digest: str, licence: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.digest = digest
        self.licence = licence

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> MaskTeacher:
        """The teacher of a folder that `Sam2ImageModel.save_pretrained` wrote; its README.md may name the licence.

        Raises FileNotFoundError where config.json or model.safetensors is missing.
        """
        folder = Path(folder)
        digest = folder_digest(folder)
        model = Sam2ImageModel.from_pretrained(folder).to(device)
        return cls(model, digest=digest, licence=_licence(folder))

    @torch.inference_mode()
    def __call__(
        self, rgb_HW3: npt.NDArray[np.uint8], boxes: Sequence[Box], points: Sequence[Point] = ()
    ) -> list[PseudoMask]:
        """One mask per box, then one per point, at the image's own size; [] for no prompts.

        Raises ValueError on a box that is empty or outside the image, or a point outside it.
        """
        height, width = rgb_HW3.shape[:2]
        for x0, y0, x1, y1 in boxes:
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(f"box {(x0, y0, x1, y1)} is empty or outside the {width} x {height} image; clip it")
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(f"point {(x, y)} is outside the {width} x {height} image; drop or clip it")
        if not boxes and not points:
            return []
        size = self.model.config.image_size
        device = self.model.no_mem_embed.device
        features = self.model.encode(preprocess([rgb_HW3], size).to(device))
        scale_2 = torch.tensor([size / width, size / height], device=device)
        masks: list[PseudoMask] = []
        if boxes:
            corners_MP2 = torch.tensor(boxes, dtype=torch.float32, device=device).view(-1, 2, 2) * scale_2
            masks += self._decode(features, corners_MP2, (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT), (height, width))
        if points:
            clicks_MP2 = torch.tensor(points, dtype=torch.float32, device=device).view(-1, 1, 2) * scale_2
            masks += self._decode(features, clicks_MP2, (FOREGROUND_POINT,), (height, width))
        return masks

    def _decode(
        self, features: Sam2Features, points_MP2: Tensor, labels: tuple[int, ...], image_size: tuple[int, int]
    ) -> list[PseudoMask]:
        count = len(points_MP2)
        labels_MP = torch.tensor(labels, device=points_MP2.device).expand(count, -1)
        sparse_MTC = self.model.embed_points(points_MP2, labels_MP)
        image_index_M = torch.zeros(count, dtype=torch.long, device=points_MP2.device)
        low_MHW, iou_M = self.model.decode(features, image_index_M, sparse_MTC)
        logits_MHW = F.interpolate(low_MHW[:, None].float(), image_size, mode="bilinear", align_corners=False)[:, 0]
        # An empty mask at the lower threshold has no stability: 0 / 0 counts as 0.
        stability_M = calculate_stability_score(logits_MHW, 0.0, STABILITY_OFFSET).nan_to_num(0.0)
        masks_MHW = (logits_MHW > 0).cpu().numpy()
        return [PseudoMask(masks_MHW[m], float(iou_M[m]), float(stability_M[m])) for m in range(count)]


def folder_digest(folder: Path) -> str:
    """Hex SHA-256 over a model folder's config and weights; FileNotFoundError where one is missing."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; name a folder that Sam2ImageModel.save_pretrained wrote")
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _licence(folder: Path) -> str:
    """The licence named by the folder's model card, or "unknown"."""
    card = folder / "README.md"
    return str(ModelCard.load(card).data.get("license") or "unknown") if card.exists() else "unknown"
