"""SAM2 for still images: encoder, prompt encoder and mask decoder of the `sam2` package, without its video memory.

The parts are the package's own classes under the names of the official checkpoints, so that official weights load as
they are. The whole SAM2 carries memory modules that an image never uses (lineage: SAM2, arXiv 2408.00714).

Shape legend: B images, M masks (prompts), S square input size in pixels, P points, T sparse prompt tokens, C = 256
channels, H and W mask height and width = S/4, K = 3 candidate masks.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sam2
import torch
import yaml
from safetensors.torch import load_file, save_file
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

PROMPT_DIM = 256  # channels of prompt tokens and image embedding, in every SAM2
STRIDE = 16  # input pixels per cell of the image embedding
NOT_A_POINT, BACKGROUND_POINT, FOREGROUND_POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3  # SAM's point labels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFICIAL_SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
OFFICIAL_NAME = re.compile(rf"(sam2(?:\.1)?)_hiera_({'|'.join(OFFICIAL_SIZES)})\.pt")
# What an official checkpoint holds for video only, and nothing else may be left out.
MEMORY_PARTS = (
    "memory_attention.",
    "memory_encoder.",
    "mask_downsample.",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
)


@dataclass(frozen=True)
class Sam2ImageConfig:
    """The shape of a SAM2 image model; the defaults are the small one that the embedded rooms ship (256 pixels)."""

    image_size: int = 256
    embed_dim: int = 32
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 3, 1)
    global_att_blocks: tuple[int, ...] = (4,)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (7, 7)

    def __post_init__(self) -> None:
        if self.image_size % (2 * STRIDE):
            raise ValueError(f"image_size is {self.image_size}; SAM2's trunk needs a multiple of {2 * STRIDE}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sam2ImageConfig:
        """The config of a dictionary as `to_dict` writes it; ValueError on an unknown key."""
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown SAM2 config keys {sorted(unknown)}; remove them")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)

    @classmethod
    def from_official(cls, name: str) -> Sam2ImageConfig:
        """The config of a model of the `sam2` package, by file name such as "configs/sam2.1/sam2.1_hiera_t.yaml"."""
        path = Path(sam2.__path__[0]) / name
        if not path.is_file():
            raise FileNotFoundError(f"{name} is no config of the installed sam2 package; see its configs folder")
        model = yaml.safe_load(path.read_text())["model"]
        trunk = model["image_encoder"]["trunk"]
        shipped = inspect.signature(Hiera).parameters  # a trunk field that the file leaves out is the package's default
        names = [field.name for field in dataclasses.fields(cls) if field.name != "image_size"]
        fields = {name: trunk.get(name, shipped[name].default) for name in names}
        return cls.from_dict(fields | {"image_size": model["image_size"]})

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-able values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Sam2Features:
    """What the encoder knows of B images: all that decoding needs."""

    embedding_BCHW: Tensor  # [B, 256, S/16, S/16]
    high_res_s0: Tensor  # [B, 32, S/4, S/4]
    high_res_s1: Tensor  # [B, 64, S/8, S/8]


def preprocess(images_HW3: Sequence[npt.NDArray[np.uint8]], image_size: int) -> Tensor:
    """Pixels [B, 3, S, S] of uint8 RGB images: resized straight to a square, ImageNet mean and std (lineage: SAM2)."""
    squares = []
    for image_HW3 in images_HW3:
        if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
            raise ValueError(
                f"image is {image_HW3.dtype} {image_HW3.shape}, expected uint8 [H, W, 3]; decode it as RGB"
            )
        pixels_13HW = torch.from_numpy(np.array(image_HW3)).permute(2, 0, 1)[None].float() / 255
        squares.append(F.interpolate(pixels_13HW, (image_size, image_size), mode="bilinear", antialias=True))
    pixels_B3SS = torch.cat(squares) if squares else torch.zeros(0, 3, image_size, image_size)
    return (pixels_B3SS - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


class Sam2ImageModel(nn.Module):
    """SAM2's image encoder, prompt encoder and mask decoder; state-dict keys are those of the official checkpoints."""

    def __init__(self, config: Sam2ImageConfig) -> None:
        super().__init__()
        self.config = config
        trunk = Hiera(
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            stages=config.stages,
            global_att_blocks=config.global_att_blocks,
            window_spec=config.window_spec,
            window_pos_embed_bkg_spatial_size=config.window_pos_embed_bkg_spatial_size,
        )
        neck = FpnNeck(
            position_encoding=PositionEmbeddingSine(PROMPT_DIM, normalize=True, temperature=10000, warmup_cache=False),
            d_model=PROMPT_DIM,
            backbone_channel_list=trunk.channel_list,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        )
        self.image_encoder = ImageEncoder(trunk, neck, scalp=1)
        grid = config.image_size // STRIDE
        self.sam_prompt_encoder = PromptEncoder(
            PROMPT_DIM, (grid, grid), (config.image_size, config.image_size), mask_in_chans=16
        )
        self.sam_mask_decoder = MaskDecoder(
            transformer_dim=PROMPT_DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, num_heads=8, mlp_dim=2048),
            use_high_res_features=True,
            iou_prediction_use_sigmoid=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=True,
        )
        # The official predictor adds it to the embedding of an image that has no memory of earlier frames.
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, PROMPT_DIM))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    def set_image_size(self, image_size: int) -> None:
        """Makes the model take another square input; no weight depends on it."""
        self.config = dataclasses.replace(self.config, image_size=image_size)
        grid = image_size // STRIDE
        self.sam_prompt_encoder.image_embedding_size = (grid, grid)
        self.sam_prompt_encoder.input_image_size = (image_size, image_size)
        self.sam_prompt_encoder.mask_input_size = (4 * grid, 4 * grid)

    def encode(self, pixels_B3SS: Tensor) -> Sam2Features:
        """Features of B preprocessed images; ValueError where the pixels are not [B, 3, S, S] of this model's size."""
        size = self.config.image_size
        if pixels_B3SS.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixels are {tuple(pixels_B3SS.shape)}, expected [B, 3, {size}, {size}]; use preprocess()"
            )
        # in the weights' type: the package's neck adds its levels up in float32 whatever they are in
        features = self.image_encoder(pixels_B3SS)["backbone_fpn"]
        s0, s1, embedding_BCHW = (level.to(self.no_mem_embed.dtype) for level in features)
        return Sam2Features(
            embedding_BCHW + self.no_mem_embed.view(1, PROMPT_DIM, 1, 1),
            self.sam_mask_decoder.conv_s0(s0),
            self.sam_mask_decoder.conv_s1(s1),
        )

    def embed_points(self, points_MP2: Tensor, labels_MP: Tensor) -> Tensor:
        """Sparse prompt tokens [M, P + 1, 256] of points (x, y) in input pixels [0, S), labelled as SAM labels them.

        A box is two points with the labels BOX_TOP_LEFT and BOX_BOTTOM_RIGHT, as in the official image predictor.
        """
        sparse_MTC: Tensor
        sparse_MTC, _ = self.sam_prompt_encoder(points=(points_MP2, labels_MP), boxes=None, masks=None)
        return sparse_MTC

    def decode_all(
        self, features: Sam2Features, image_index_M: Tensor, sparse_MTC: Tensor, *, multimask: bool = True
    ) -> tuple[Tensor, Tensor]:
        """All candidates of M >= 1 prompts: mask logits [M, K, S/4, S/4] and predicted IoU [M, K].

        K = 3 with `multimask`, else 1 (the token that answers prompts without ambiguity).
        """
        position = self.sam_prompt_encoder.pe_layer
        grid = features.embedding_BCHW.shape[-2:]
        # In float whatever the weights are in: the package multiplies float32 coordinates by this buffer.
        matrix = {name: buffer.float() for name, buffer in position.named_buffers()}
        image_pe = torch.func.functional_call(position, matrix, (grid,))[None].to(features.embedding_BCHW.dtype)
        dense_1C11 = self.sam_prompt_encoder.no_mask_embed.weight.view(1, PROMPT_DIM, 1, 1)
        logits_MKHW, iou_MK, _, _ = self.sam_mask_decoder(
            image_embeddings=features.embedding_BCHW[image_index_M],
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_MTC,
            dense_prompt_embeddings=dense_1C11,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[features.high_res_s0[image_index_M], features.high_res_s1[image_index_M]],
        )
        return logits_MKHW, iou_MK

    def decode(
        self, features: Sam2Features, image_index_M: Tensor, sparse_MTC: Tensor, *, multimask: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The best candidate by predicted IoU of M >= 1 prompts: mask logits [M, S/4, S/4] and predicted IoU [M]."""
        logits_MKHW, iou_MK = self.decode_all(features, image_index_M, sparse_MTC, multimask=multimask)
        best_M = iou_MK.detach().argmax(dim=1)
        rows_M = torch.arange(len(best_M), device=best_M.device)
        return logits_MKHW[rows_M, best_M], iou_MK[rows_M, best_M]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors; float16 halves the file and rounds the weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Sam2ImageModel:
        """The model of a folder that `save_pretrained` wrote, in float32 and eval mode; RuntimeError on other keys."""
        folder = Path(folder)
        model = cls(Sam2ImageConfig.from_dict(json.loads((folder / "config.json").read_text())))
        model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
        return model.eval()

    @classmethod
    def from_official(cls, checkpoint: Path) -> Sam2ImageModel:
        """The model of an official checkpoint under its official name, such as sam2.1_hiera_large.pt.

        Raises ValueError for another name, and as `load_official` does.
        """
        named = OFFICIAL_NAME.fullmatch(checkpoint.name)
        if named is None:
            raise ValueError(
                f"{checkpoint}: expected an official name, sam2_hiera_SIZE.pt or sam2.1_hiera_SIZE.pt with SIZE one of"
                f" {', '.join(OFFICIAL_SIZES)}, for it says which configuration the weights have"
            )
        release, size = named.groups()
        model = cls(Sam2ImageConfig.from_official(f"configs/{release}/{release}_hiera_{OFFICIAL_SIZES[size]}.yaml"))
        model.load_official(checkpoint)
        return model.eval()

    def load_official(self, checkpoint: str | Path) -> None:
        """Takes the weights of an official checkpoint (.pt), of which only MEMORY_PARTS may be left out.

        The config comes from `Sam2ImageConfig.from_official`. Raises RuntimeError on any other missing or unknown key.
        """
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
        self.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(MEMORY_PARTS)})
