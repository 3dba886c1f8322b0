"""The small base model's parts before training: tokenizer, processor, and an InternVL of about 4 M parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from workflows.zoo.base_rooms import GRID, SIDE

VOCABULARY = 768  # tokens at most
SAME_STD = 0.1
PATCH = 8  # pixels; 16 x 16 patches become 8 x 8 image tokens by the pixel shuffle
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# A number of one or two digits is one token, so that a box has one token a coordinate.
PIECES = r"\d{1,2}| ?\p{L}+\n?|[^\s\p{L}\d]+ ?|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens, learnt from `texts`; a number up to 99 is one token, 07 too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN, END, *IMAGE.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = " ".join([*(str(n) for n in range(100)), *(f"0{n}" for n in range(10))])
    backend.train_from_iterator([*texts, *[numbers] * 1000], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[TURN],
        extra_special_tokens=IMAGE,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """An InternVL processor: one tile of SIDE x SIDE pixels, GRID * GRID image tokens."""
    size = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=1),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=GRID * GRID,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """An untrained InternVL: 16 x 16 patches, width 128, 5 layers; Qwen2 of width 256, 6 layers, tied embeddings."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE["context_image_token"])),  # type: ignore[arg-type]
        image_seq_length=GRID * GRID,
        downsample_ratio=GRID * PATCH / SIDE,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _attend_to_the_same(model.model.language_model)
    positions_1PD = model.model.vision_tower.embeddings.position_embeddings
    with torch.no_grad():
        positions_1PD[0, 1:] = _waves(SIDE // PATCH, positions_1PD.shape[-1])
    return model


@torch.no_grad()
def _attend_to_the_same(text_model: nn.Module) -> None:
    """One query head of each group starts as its keys, so that a word attends to what is like it: it is found sooner.

    As in mimetic initialisation (Trockman and Kolter, arXiv 2305.09828), for one head a group and no value matrices.
    """
    for layer in text_model.layers:  # type: ignore[union-attr]
        attention, width = layer.self_attn, layer.self_attn.k_proj.in_features
        keys_KHD = nn.init.normal_(attention.k_proj.weight, std=SAME_STD).view(-1, attention.head_dim, width)
        queries = attention.q_proj.weight.view(len(keys_KHD), -1, attention.head_dim, width)
        queries[:, 0] = keys_KHD


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of column and row: [side * side, width], a start from which places are learnt sooner."""
    at_S4 = torch.arange(side)[:, None] * torch.pi / side * torch.arange(1, width // 4 + 1) * 0.5
    wave_SC = torch.cat([at_S4.sin(), at_S4.cos()], -1)
    columns = wave_SC[None].expand(side, side, -1)
    return 0.5 * torch.cat([columns, columns.transpose(0, 1)], -1).reshape(side * side, width)
