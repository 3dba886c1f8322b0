"""InternVL2.5 as its authors publish it, in transformers' terms: configuration, and names and shapes of the weights.

Their model is remote code; here its files are read and nothing of it is run. The text part is a Qwen2 (1B, 4B), whose
names stay, or an InternLM2 (2B, 8B, 26B): a Llama whose query, key and value are one matrix by groups of heads.

Shape legend: C a layer's input channels, G key-value heads, R query heads for each of them, H a head's channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

MODEL_TYPE = "internvl_chat"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT_TYPES = {"qwen2": "qwen2", "internlm2": "llama"}
# theirs: ours, of the fields that matter and are not called alike
VISION_FIELDS = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
SAME_VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "norm_type", "attention_dropout",
)  # fmt: skip
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings",
    "use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# names of parts, theirs and ours, the first that fits; what follows them in a name stays
TOP = {
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding": "model.vision_tower.embeddings.patch_embeddings.projection",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",
    "language_model.output": "lm_head",
    "language_model.lm_head": "lm_head",
    "language_model.model.tok_embeddings": "model.language_model.embed_tokens",
    "language_model.model": "model.language_model",
}
VISION_LAYER = {
    "attn.proj": "attention.projection_layer",
    "attn": "attention",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
INTERNLM2_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "attention.wqkv": "self_attn.wqkv",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
LAYER = re.compile(r"(vision_model\.encoder|language_model\.model)\.layers\.(\d+)\.(.+)")


def config_of(original: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """The configuration of an original checkpoint, from its config.json as it stands (lineage: InternVL2.5).

    Raises ValueError for another kind of model, another text model, and settings that transformers' class has not.
    """
    if original.get("model_type") != MODEL_TYPE:
        raise ValueError(f"config.json has model_type {original.get('model_type')!r}, expected {MODEL_TYPE!r}")
    text, vision = original["llm_config"], original["vision_config"]
    text_type = TEXT_TYPES.get(text.get("model_type"))
    if text_type is None:
        raise ValueError(
            f"config.json: llm_config.model_type is {text.get('model_type')!r}, expected one of {sorted(TEXT_TYPES)}"
        )
    for name, wanted in (("select_layer", -1), ("ps_version", "v2")):
        if original.get(name, wanted) != wanted:
            raise ValueError(f"config.json: {name} is {original[name]!r}, expected {wanted!r}: not an InternVL2.5")
    scaling = text.get("rope_scaling")
    if scaling and "type" in scaling:
        text = {
            **text,
            "rope_scaling": {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}},
        }
    tied = bool(text.get("tie_word_embeddings", False))
    side, ratio = vision["image_size"] // vision["patch_size"], original["downsample_ratio"]
    return InternVLConfig(
        vision_config={key: vision[key] for key in SAME_VISION_FIELDS if key in vision}
        | {ours: vision[theirs] for theirs, ours in VISION_FIELDS.items() if theirs in vision},
        text_config={"model_type": text_type}
        | {key: text[key] for key in TEXT_FIELDS if text.get(key) is not None}
        | {"tie_word_embeddings": tied},
        image_token_id=image_token_id,
        image_seq_length=int(side * ratio) ** 2,
        downsample_ratio=ratio,
        tie_word_embeddings=tied,
    )


def converted(name: str, tensor: Tensor, config: InternVLConfig) -> Iterator[tuple[str, Tensor]]:
    """An original weight under transformers' names: one, or three where it is query, key and value.

    Raises ValueError for a name that no part of an InternVL2.5 has.
    """
    ours = _renamed(name)
    parts = ("q_proj", "k_proj", "v_proj")
    if ".attention.qkv." in ours:
        yield from ((ours.replace("qkv", part), third) for part, third in zip(parts, tensor.chunk(3), strict=True))
    elif ".self_attn.wqkv." in ours:
        text = config.get_text_config()
        groups = text.num_key_value_heads
        # each key-value head's rows are its R query heads, its key, its value
        shared_GXHC = tensor.reshape(groups, text.num_attention_heads // groups + 2, -1, *tensor.shape[1:])
        heads = (shared_GXHC[:, :-2], shared_GXHC[:, -2:-1], shared_GXHC[:, -1:])
        yield from (
            (ours.replace("wqkv", part), own.flatten(0, 2).contiguous()) for part, own in zip(parts, heads, strict=True)
        )
    else:
        yield ours, tensor


def _renamed(name: str) -> str:
    if layer := LAYER.fullmatch(name):
        tower, number, rest = layer.groups()
        if tower == "vision_model.encoder":
            return f"model.vision_tower.encoder.layer.{number}.{_begun(rest, VISION_LAYER) or rest}"
        return f"model.language_model.layers.{number}.{_begun(rest, INTERNLM2_LAYER) or rest}"
    found = _begun(name, TOP)
    if found is None:
        raise ValueError(f"weight {name!r} is of no part of an InternVL2.5: is this another model's checkpoint?")
    return found


def _begun(name: str, parts: Mapping[str, str]) -> str | None:
    """The name with its first part's name replaced, None where no part of these is its first."""
    return next((new + name[len(old) :] for old, new in parts.items() if f"{name}.".startswith(f"{old}.")), None)


def convert_folder(source: Path, out: Path, *, processor: str | Path | None = None) -> None:
    """Writes an original checkpoint's folder anew in transformers' layout, one file of weights at a time.

    The processor is that of `processor`, a folder or hub id in transformers' layout, or made from the checkpoint's own
    tokenizer where that needs no remote code (Qwen2's do not, InternLM2's does). Raises ValueError where the weights
    are not exactly those of the configuration, where their index names a file elsewhere, where `out` is `source`, and
    where there is no tokenizer that can be read.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"out is {out}, the checkpoint's own folder, expected another one: it would be written over")
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    made = _processor(source, original) if processor is None else InternVLProcessor.from_pretrained(str(processor))
    config = config_of(original, made.image_token_id)
    # what ends a turn, by the tokenizer: InternLM2's own configuration names the token that ends a document
    config.get_text_config().eos_token_id = made.tokenizer.eos_token_id
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in InternVLForConditionalGeneration(config).state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    index = source / INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index}: it names {outside[0]!r}, expected files of this folder alone")
    places: dict[str, str] = {}
    for file in files:
        theirs = load_file(source / file)
        ours = {new: part.contiguous() for name in theirs for new, part in converted(name, theirs[name], config)}
        for name, tensor in ours.items():
            if wanted.get(name) != tuple(tensor.shape):
                raise ValueError(
                    f"{file}: {name} is {tuple(tensor.shape)}, expected {wanted.get(name, 'no such weight')} by the"
                    " configuration: is config.json another checkpoint's?"
                )
        places |= dict.fromkeys(ours, file)
        save_file(ours, out / file, metadata={"format": "pt"})
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(wanted.keys() - places.keys() - tied):
        raise ValueError(f"{source}: {len(missing)} weights are missing, the first {missing[0]}: is a file missing?")
    if index.exists():
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1), encoding="utf-8")
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(out)
    ends = {"eos_token_id": made.tokenizer.eos_token_id, "pad_token_id": made.tokenizer.pad_token_id}
    GenerationConfig(**ends).save_pretrained(out)  # type: ignore[no-untyped-call]
    made.save_pretrained(out)


def _processor(source: Path, original: Mapping[str, Any]) -> InternVLProcessor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, extra_special_tokens=IMAGE_TOKENS, padding_side="left"
        )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{source}: its tokenizer cannot be read without remote code ({error}): name a processor in transformers'"
            " layout, such as the -hf release of the same model"
        ) from error
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = "<|im_end|>"
    size = dict.fromkeys(("height", "width"), original["force_image_size"])
    side = original["force_image_size"] // original["vision_config"]["patch_size"]
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            crop_to_patches=original["dynamic_image_size"],
            min_patches=original["min_dynamic_patch"],
            max_patches=original["max_dynamic_patch"],
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=int(side * original["downsample_ratio"]) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
