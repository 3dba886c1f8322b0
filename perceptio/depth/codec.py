"""Maps to codes and back, with a frozen codebook: what tokenizing, decoding and soft merging share.

Shape legend: B batch, H, W any size in pixels, S the codebook's image side, N tokens row-major, K codes, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.depth.codebook import DepthCodebook

# Every encoder pass has this many maps, the last one padded: the kernels chosen for another batch size round
# differently, and a map on the border between two codes would change its code with its neighbours.
ENCODE_BATCH = 8


class DepthCodec:
    """Codes of inverse-depth maps, and maps of codes or of distributions over codes.

    Not a module on purpose: nobody's `.to(bfloat16)`, optimizer or checkpoint reaches the frozen weights.
    """

    def __init__(self, codebook: DepthCodebook) -> None:
        """Takes over `codebook`: puts it in eval mode and freezes it. Raises ValueError if its codes are unset."""
        if not codebook.is_set:
            raise ValueError("the codebook's codes are unset (never trained or loaded): train or load it first")
        self.codebook = codebook.eval().requires_grad_(False)
        self.digest = codebook.digest
        self.size = codebook.config.image_size  # S
        self.grid = (codebook.config.grid, codebook.config.grid)  # rows, columns of tokens
        self.tokens = self.grid[0] * self.grid[1]  # N
        self.codes = codebook.config.codes  # K

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> DepthCodec:
        """The codec of the codebook in `folder`, in fp32 on `device`."""
        return cls(DepthCodebook.from_pretrained(folder)).to(device)

    def to(self, device: str | torch.device) -> DepthCodec:
        """This codec, its weights moved to `device`."""
        self.codebook.to(device)
        return self

    @property
    def vectors_KD(self) -> Tensor:
        """The code vectors, (K, D)."""
        return self.codebook.vectors_KD

    @torch.no_grad()
    def resize(self, inv_depth_BHW: Tensor) -> Tensor:
        """Maps (B, S, S) in [0, 1] at the codebook's size: bilinear, antialiased; fp32 on the codec's device.

        Raises ValueError for another rank, maps without a pixel, and values that are not finite or outside [0, 1].
        """
        if inv_depth_BHW.ndim != 3:
            raise ValueError(f"inv_depth has shape {tuple(inv_depth_BHW.shape)}, expected three dimensions B, H, W")
        if 0 in inv_depth_BHW.shape[1:]:
            raise ValueError(f"inv_depth has shape {tuple(inv_depth_BHW.shape)}, expected maps of at least one pixel")
        x_BHW = inv_depth_BHW.to(self.vectors_KD.device, self._precise())
        if x_BHW.numel():
            low, high = x_BHW.min().item(), x_BHW.max().item()
            if not (low >= 0 and high <= 1):  # NaN compares false, so it lands here too
                raise ValueError(
                    f"inv_depth lies in [{low:g}, {high:g}], expected finite values in [0, 1]: scale the maps first"
                )
        if x_BHW.shape[1:] == (self.size, self.size):
            return x_BHW
        size = (self.size, self.size)
        return F.interpolate(x_BHW.unsqueeze(1), size, mode="bilinear", antialias=True).squeeze(1).clamp(0, 1)

    @torch.no_grad()
    def encode(self, inv_depth_BHW: Tensor) -> Tensor:
        """Codes (B, N), int64, of maps of any size in [0, 1].

        Always fp32, since in bf16 and TF32 codes change, and the same for a map alone as in any batch. Raises
        ValueError as `resize` does, TypeError if the codebook was cast below fp32.
        """
        x_BSS = self.resize(inv_depth_BHW)
        codes = []
        with _exact(x_BSS.device):
            for chunk_BSS in torch.split(x_BSS, ENCODE_BATCH):
                full_BSS = F.pad(chunk_BSS, (0, 0, 0, 0, 0, ENCODE_BATCH - len(chunk_BSS)))
                codes.append(self.codebook.nearest(self.codebook.features(full_BSS))[: len(chunk_BSS)])
        return torch.cat(codes) if codes else torch.empty(0, self.tokens, dtype=torch.long, device=x_BSS.device)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """Inverse depth (B, S, S), clamped to [0, 1], of codes.

        Raises ValueError for another number of tokens than N and for codes outside 0 .. K - 1.
        """
        if codes_BN.ndim != 2 or codes_BN.shape[1] != self.tokens:
            raise ValueError(f"codes have shape {tuple(codes_BN.shape)}, expected (B, {self.tokens})")
        if codes_BN.numel():
            low, high = int(codes_BN.min()), int(codes_BN.max())
            if low < 0 or high >= self.codes:
                raise ValueError(f"codes lie in {low} .. {high}, expected 0 .. {self.codes - 1}: another codebook's?")
        return self._picture(self.vectors_KD[codes_BN.to(self.vectors_KD.device).long()])

    def decode_soft(self, logits_BNK: Tensor, temperature: float) -> Tensor:
        """Inverse depth (B, S, S), clamped to [0, 1], that distributions over codes imply; differentiable.

        q = softmax(logits / temperature), z = q @ vectors, through the frozen decoder (soft merging: paper; this form:
        reconstruction). A pixel that leaves [0, 1] is read as the border, and has no gradient. As temperature -> 0 it
        equals `decode` of the most likely codes. Raises ValueError for temperature <= 0 or another shape than
        (B, N, K).
        """
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected > 0; for hard codes use decode()")
        if logits_BNK.shape[1:] != (self.tokens, self.codes):
            raise ValueError(f"logits have shape {tuple(logits_BNK.shape)}, expected (B, {self.tokens}, {self.codes})")
        with _exact(logits_BNK.device):
            q_BNK = F.softmax(logits_BNK.to(self._precise()) / temperature, dim=-1)
            z_BND = q_BNK @ self.vectors_KD
        return self._picture(z_BND)

    def _picture(self, z_BND: Tensor) -> Tensor:
        self._precise()
        with _exact(z_BND.device):
            return self.codebook.picture(z_BND).clamp(0, 1)

    def _precise(self) -> torch.dtype:
        """The weights' type, refused below fp32."""
        dtype = self.vectors_KD.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the codebook's weights are {dtype}, expected float32: load the codec anew, do not cast it"
            )
        return dtype


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32: a GPU's convolutions use it for fp32 by themselves, its products where a host asks."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    with (
        torch.autocast(device.type, enabled=False),
        cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False),
    ):
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = precision
