"""The vision-language backbone: load an InternVL, give it the spatial tokens, choose what trains, add and merge LoRA.

The text part may be a Qwen2 or a Llama, its output head tied to the input embeddings or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from perceptio.vocabulary import SpatialVocabulary, extend_tokenizer
from schemas.training import SpatialName

MODEL_TYPE = "internvl"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Language = Literal["lora", "full", "frozen"]


def load_backbone(
    folder_or_hub_id: str | Path, *, dtype: torch.dtype | str, **hub: Any
) -> tuple[InternVLForConditionalGeneration, InternVLProcessor]:
    """The model, in evaluation mode, and its processor, from a folder or a hub id in transformers' own layout.

    `hub` are transformers' options of where to find it (revision, token, subfolder, ...). Never runs remote code and
    reads safetensors only. Raises ValueError if the configuration is not an InternVL's in transformers' layout or
    weights are missing, OSError if there is nothing to read.
    """
    source = str(folder_or_hub_id)
    config, _ = PreTrainedConfig.get_config_dict(source, **hub)
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(
            f"{source}: config.json has model_type {found!r}, expected {MODEL_TYPE!r}: use an InternVL in "
            "transformers' layout (hub names that end in -hf), or make one of its authors' with `perceptio convert`"
        )
    loaded_with: Any = InternVLForConditionalGeneration.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub
    )
    model: InternVLForConditionalGeneration
    model, loaded = loaded_with
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{source}: {len(missing)} weights are missing, the first {missing[0]}: is a file missing?")
    model.train(False)
    return model, InternVLProcessor.from_pretrained(source, **hub)


def extend_vocabulary(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    codes: int,
    *,
    starts_as: Mapping[SpatialName, str] | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> SpatialVocabulary:
    """The spatial ids, after tokenizer and embeddings were given rows for them, in place (reconstruction).

    New rows are the mean of the old ones plus seeded noise, `noise` times their standard deviation, so that no two are
    alike: in the input embeddings and, where it is not tied to them, in the output head. Old rows stay as they are, and
    what is tied stays tied. Instead of that mean, "seg", "depth_start", every "code" and "depth_end" may start as the
    row of an old token that `starts_as` names: behind the token that opens a box the base knows already what is meant
    and where it is; where it would write numbers it learns codes sooner. Raises ValueError if the tokenizer has spatial
    tokens already, since whether the rows were given cannot be told from a model with spare ones, and where what
    `starts_as` names is not one token.
    """
    like = {name: _one_token(tokenizer, name, text) for name, text in (starts_as or {}).items()}
    known = len(tokenizer)
    vocabulary = extend_tokenizer(tokenizer, codes)
    if known == len(tokenizer):
        raise ValueError(
            f"tokenizer: it has the spatial tokens for {codes} codes already, expected none: start from the base's own"
        )
    rows = len(_vocabulary_weights(model)[0])
    if rows < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = min(vocabulary.all_ids)
    generator = torch.Generator().manual_seed(seed)
    for weight_VD in _vocabulary_weights(model):
        _fill_rows(weight_VD, first, first + len(vocabulary.all_ids), noise, generator)
        with torch.no_grad():
            for name, old_id in like.items():
                weight_VD[_ids(vocabulary, name)] += weight_VD[old_id] - weight_VD[:first].mean(0)
    return vocabulary


def _ids(vocabulary: SpatialVocabulary, name: SpatialName) -> list[int]:
    return {
        "seg": [vocabulary.seg_id],
        "depth_start": [vocabulary.depth_start_id],
        "code": list(vocabulary.code_ids),
        "depth_end": [vocabulary.depth_end_id],
    }[name]


def _one_token(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"starts_as.{name}: {text!r} is {len(ids)} tokens of the base, expected one")
    return int(ids[0])


def add_lora(
    model: InternVLForConditionalGeneration,
    *,
    rank: int = 128,
    alpha: int = 256,
    dropout: float = 0.05,
    target_modules: Sequence[str] = LORA_TARGETS,
) -> None:
    """Puts LoRA layers into the text model's linear layers, in place (its sizes by default: lineage, Sa2VA).

    The model keeps its class, and embeddings and head stay whole and tied as they were: they are trained directly
    (`set_trainable`) rather than through copies. What trained before still does. Raises ValueError if it has LoRA
    already or no layer is so named.
    """
    if layers := count_lora(model):
        raise ValueError(f"model: has {layers} LoRA layers already, expected none: merge_lora first")
    names = {name.rpartition(".")[2] for name, part in _text(model).named_modules() if isinstance(part, nn.Linear)}
    if missing := sorted(set(target_modules) - names):
        raise ValueError(f"target_modules: got {missing}, expected some of {sorted(names)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_places(target_modules),
    )
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    inject_adapter_in_model(config, model)
    for weight, was in trained:  # peft freezes all but its layers, parts that are none of its own too
        weight.requires_grad = was


def lora_places(targets: Sequence[str]) -> str:
    """The pattern of the layers' names in the text model alone: the vision tower has layers of the same names."""
    return rf"model\.language_model\..*\.({'|'.join(targets)})"


def count_lora(model: nn.Module) -> int:
    """The number of LoRA layers that are not merged."""
    return len(_lora_layers(model))


def merge_lora(model: InternVLForConditionalGeneration, dtype: torch.dtype | None = None) -> int:
    """The number of LoRA layers folded into plain linear layers, in place; 0 if there were none.

    Sums are made in fp32, a layer at a time, and rounded once: to `dtype`, or to the type that the layer has.
    """
    layers = _lora_layers(model)
    for name, layer in layers:
        own = layer.get_base_layer().get_parameter("weight").dtype
        layer.float()  # type: ignore[attr-defined]  # every LoraLayer is a module too
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer().to(dtype or own))
    return len(layers)


def drop_lora(model: InternVLForConditionalGeneration) -> int:
    """The number of LoRA layers taken out, in place, as if they had never been added; 0 if there were none."""
    layers = _lora_layers(model)
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return len(layers)


def set_trainable(
    model: InternVLForConditionalGeneration,
    *,
    vision: bool = False,
    projector: bool = True,
    language: Language = "lora",
    embeddings: bool = True,
) -> None:
    """Sets what trains: the four parts named, each wholly or not; `language="lora"` trains the LoRA layers alone.

    By default what the lineage trains (Sa2VA), behind `add_lora(model)`. `embeddings` covers the input embeddings and
    the output head. Raises ValueError for "lora" without LoRA layers and for an unknown `language`.
    """
    if language not in ("lora", "full", "frozen"):
        raise ValueError(f"language: got {language!r}, expected 'lora', 'full' or 'frozen'")
    if language == "lora" and not count_lora(model):
        raise ValueError("language: got 'lora', but the model has no LoRA layers: call add_lora first")
    model.model.requires_grad_(False)  # what else a subclass has is its own affair
    model.model.vision_tower.requires_grad_(vision)
    model.model.multi_modal_projector.requires_grad_(projector)
    for name, parameter in _text(model).named_parameters():
        parameter.requires_grad = language == "full" or (language == "lora" and ".lora_" in name)
    for weight_VD in _vocabulary_weights(model):
        weight_VD.requires_grad = embeddings


def _text(model: InternVLForConditionalGeneration) -> nn.Module:
    text: nn.Module = model.model.language_model
    return text


def _vocabulary_weights(model: InternVLForConditionalGeneration) -> list[nn.Parameter]:
    """The input embeddings' weight, and the output head's where it is another one."""
    given = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings().get_parameter("weight")
    return [given] if head is given else [given, head]


@torch.no_grad()
def _fill_rows(weight_VD: nn.Parameter, first: int, end: int, noise: float, generator: torch.Generator) -> None:
    """Sets rows `first` to `end` from the mean and spread of the rows before them."""
    old_VD = weight_VD[:first].float()
    noise_ND = torch.randn(end - first, weight_VD.shape[1], generator=generator).to(weight_VD.device)
    weight_VD[first:end] = (old_VD.mean(0) + noise * old_VD.std(0) * noise_ND).to(weight_VD.dtype)


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
