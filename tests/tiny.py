"""A Perceptio model folder with random weights, small enough to be made in a test: no shipped part is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from workflows.zoo.base_model import build_processor, train_tokenizer

TEXTS = ["What colour is the lamp? It is red.", "Please segment the chair on the left in this image. Sure."]


def tiny_parts(folder: Path, seed: int = 0, *, text_model: str = "qwen2", tied: bool = True) -> dict[str, Path]:
    """Folders of a random InternVL ("base"), SAM2 image model ("sam2") and depth codebook ("codebook")."""
    torch.manual_seed(seed)
    parts = {name: folder / name for name in ("base", "sam2", "codebook")}
    tokenizer = train_tokenizer(TEXTS)
    processor = build_processor(tokenizer)
    side = processor.image_processor.size["height"]
    text = {
        "model_type": text_model,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [side, side],
        "patch_size": [8, 8],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.context_image_token),
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(parts["base"])
    processor.save_pretrained(parts["base"])
    sam2 = Sam2ImageConfig(image_size=64, embed_dim=16)
    Sam2ImageModel(sam2).save_pretrained(parts["sam2"])
    random_codebook().save_pretrained(parts["codebook"])
    return parts


def tiny_model(folder: Path, seed: int = 0, *, text_model: str = "qwen2", tied: bool = True) -> Path:
    """A whole Perceptio folder, as `train` would publish it: model, processor, codebook."""
    parts = tiny_parts(folder / "parts", seed, text_model=text_model, tied=tied)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def random_codebook() -> DepthCodebook:
    """A 2 x 2 grid of 8 codes, set by k-means on random maps."""
    codebook = DepthCodebook(CodebookConfig(image_size=16, codes=8, dim=8, channels=(8, 8, 8), residual_blocks=0))
    codebook.train()
    codebook(torch.rand(16, 16, 16))
    return codebook.eval()


def depth_teacher(folder: Path) -> Path:
    """The folder, with a Depth Anything of 60,000 random parameters in it."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[1, 2],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=16,
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 16],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.3,  # at the published 0.02 so small a model is flat
        depth_estimation_type="relative",
    )
    model = DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(model.get_parameter("head.conv3.bias"), 5.0)  # keeps the last ReLU alive
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}, ensure_multiple_of=16).save_pretrained(folder)
    return folder
