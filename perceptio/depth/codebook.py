"""The depth codebook: a VQ-VAE that turns an inverse-depth map into a short grid of codes.

Architecture and defaults are lineage (AURORA, MolmoAct); k-means start, restart of dead codes and the gradient term
are reconstruction.

Shape legend: B batch, S image side in pixels, G grid side, N = G * G tokens row-major, K codes, D code dimension.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class CodebookConfig:
    """Sizes and loss weights of a depth codebook; the defaults are the full size (lineage)."""

    image_size: int = 320  # side in pixels, S
    codes: int = 128  # K
    dim: int = 512  # D
    channels: tuple[int, ...] = (16, 32, 64, 128, 256)  # of the stride-2 convolutions: 2 ** len = stride
    residual_blocks: int = 2
    ema_decay: float = 0.99
    commitment: float = 0.25
    gradient_weight: float = 0.0  # ancestors: none (reconstruction)
    dead_below: float = 1.0  # a code whose running count of uses per global batch falls below this is restarted

    def __post_init__(self) -> None:
        if not self.channels or self.image_size < self.stride or self.image_size % self.stride:
            raise ValueError(
                f"image_size is {self.image_size}, expected a positive multiple of stride {self.stride} "
                f"(2 to the number of channels, {len(self.channels)}): change image_size or channels"
            )

    @property
    def stride(self) -> int:
        """Pixels per token along a side."""
        return int(2 ** len(self.channels))

    @property
    def grid(self) -> int:
        """Tokens along a side, G."""
        return self.image_size // self.stride


@dataclass(frozen=True)
class CodebookOutput:
    """One forward pass: the reconstruction, the codes (None without quantizing), and the loss terms by name."""

    inv_depth_BSS: Tensor  # not clamped
    codes_BN: Tensor | None
    losses: dict[str, Tensor]  # "total" is the weighted sum of the others


class DepthCodebook(nn.Module):
    """Encoder, vector quantizer with EMA codes, mirrored decoder; sees inverse depth in [0, 1] only from outside."""

    def __init__(self, config: CodebookConfig, *, synchronised: bool = False) -> None:
        """A codebook with random weights, its codes unset until the first quantizing pass (k-means).

        synchronised: share k-means, EMA statistics and restarts among the ranks of the default process group, so that
        every rank holds the same codes. It is passed on explicitly: the library's own guess is cached at first use.
        """
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.quantizer = VectorQuantize(
            dim=config.dim,
            codebook_size=config.codes,
            decay=config.ema_decay,
            commitment_weight=1.0,  # weighted below, with the other terms
            kmeans_init=True,
            threshold_ema_dead_code=config.dead_below,
            rotation_trick=False,  # straight-through gradients, as the ancestors
            sync_codebook=synchronised,
        )

    @property
    def vectors_KD(self) -> Tensor:
        """The code vectors, (K, D)."""
        embed: Tensor = self.quantizer._codebook.embed[0]
        return embed

    @property
    def is_set(self) -> bool:
        """Whether the codes have been set, by k-means or by loading."""
        return bool(self.quantizer._codebook.initted)

    def features(self, inv_depth_BSS: Tensor) -> Tensor:
        """Continuous vectors z_BND of maps in [0, 1], before quantizing."""
        z_BDGG = self.encoder((2 * inv_depth_BSS - 1).unsqueeze(1))
        return torch.as_tensor(z_BDGG.flatten(2).transpose(1, 2))

    def nearest(self, z_BND: Tensor) -> Tensor:
        """Codes (B, N) of the nearest vectors; changes nothing, in eval mode."""
        _, codes_BN, _ = self.quantizer(z_BND, freeze_codebook=True)
        return torch.as_tensor(codes_BN)

    def picture(self, z_BND: Tensor) -> Tensor:
        """Inverse depth (B, S, S) of vectors laid on the grid, not clamped."""
        grid = self.config.grid
        z_BDGG = z_BND.transpose(1, 2).reshape(len(z_BND), self.config.dim, grid, grid)
        return torch.as_tensor((self.decoder(z_BDGG).squeeze(1) + 1) / 2)

    def forward(self, inv_depth_BSS: Tensor, *, quantize: bool = True) -> CodebookOutput:
        """Reconstruction, codes and losses of maps in [0, 1] at the codebook's size; `quantize=False` is a plain
        autoencoder, whose features give k-means something to start from.

        Terms: mse (on the [-1, 1] scale, lineage), commitment, gradient (L1 of neighbour differences), total.
        """
        z_BND = self.features(inv_depth_BSS)
        commitment = z_BND.new_zeros(())
        codes_BN = None
        if quantize:
            z_BND, codes_BN, commitment = self.quantizer(z_BND)
        found_BSS = self.picture(z_BND)
        error_BSS = 2 * (found_BSS - inv_depth_BSS)
        mse = error_BSS.square().mean()
        gradient = error_BSS.diff(dim=1).abs().mean() + error_BSS.diff(dim=2).abs().mean()
        total = mse + self.config.commitment * commitment + self.config.gradient_weight * gradient
        losses = {"mse": mse, "commitment": commitment, "gradient": gradient, "total": total}
        return CodebookOutput(found_BSS, codes_BN, losses)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the config and every weight, in memory as on disk: the codebook's name for ever."""
        digest = hashlib.sha256(_config_json(self.config).encode())
        for name, tensor in sorted(self.state_dict().items()):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(_config_json(self.config))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DepthCodebook:
        """The codebook in `folder`, on the CPU in fp32, in eval mode.

        Raises FileNotFoundError for a missing file, ValueError for a config with other keys, RuntimeError for weights
        of other names or shapes.
        """
        folder = Path(folder)
        if missing := [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder}: {' and '.join(missing)} missing, expected a depth codebook: make one with"
                " `perceptio codebook`, or name its folder"
            )
        values = json.loads((folder / CONFIG_NAME).read_text())
        known = {field.name for field in fields(CodebookConfig)}
        if set(values) != known:
            raise ValueError(
                f"{folder / CONFIG_NAME}: keys are {sorted(values)}, expected {sorted(known)}: not a depth codebook, "
                "or one of another release"
            )
        codebook = cls(CodebookConfig(**{**values, "channels": tuple(values["channels"])}))
        codebook.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return codebook.eval()


class _Residual(nn.Module):
    """x + f(x), f two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, width, 1)

    def forward(self, x_BCGG: Tensor) -> Tensor:
        return x_BCGG + torch.as_tensor(self.narrow(F.relu(self.wide(F.relu(x_BCGG)))))


def _encoder(config: CodebookConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((1, *config.channels), config.channels, strict=False):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    width = config.channels[-1]
    layers += [_Residual(width) for _ in range(config.residual_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(width, config.dim, 1))


def _decoder(config: CodebookConfig) -> nn.Sequential:
    widths = config.channels[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.dim, widths[0], 1)]
    layers += [_Residual(widths[0]) for _ in range(config.residual_blocks)]
    for before, after in zip(widths, (*widths[1:], 1), strict=True):
        layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def _config_json(config: CodebookConfig) -> str:
    return json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"
