"""Checkpoints in InternVL2.5's own layout: every weight finds its place, at full size and in value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import InternVLForConditionalGeneration

from perceptio.vlm.backbone import load_backbone
from perceptio.vlm.original import config_of, convert_folder, converted
from tests.tiny import TEXTS
from workflows.zoo.base_model import train_tokenizer

Shapes = dict[str, tuple[int, ...]]
VISION_300M = {
    "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24, "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False, "attention_dropout": 0.0,
    "drop_path_rate": 0.1, "use_flash_attn": True,
}  # fmt: skip
QWEN_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "num_hidden_layers": 24, "vocab_size": 151674, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "rope_scaling": None, "hidden_act": "silu", "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
INTERNLM_7B = {
    "model_type": "internlm2", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 92553, "rms_norm_eps": 1e-5, "bias": False,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_act": "silu",
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


def whole(text: dict[str, Any], vision: dict[str, Any] = VISION_300M, **more: Any) -> dict[str, Any]:
    """A config.json as the authors write it."""
    fields = {"model_type": "internvl_chat", "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2"}
    fields |= {"force_image_size": vision["image_size"], "dynamic_image_size": True, "use_thumbnail": True}
    fields |= {"min_dynamic_patch": 1, "max_dynamic_patch": 12, "template": "internvl2_5"}
    return fields | {"llm_config": text, "vision_config": vision} | more


def with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vision_shapes(v: dict[str, Any]) -> Shapes:
    d, patches = v["hidden_size"], (v["image_size"] // v["patch_size"]) ** 2
    shapes: Shapes = {"vision_model.embeddings.class_embedding": (1, 1, d)}
    shapes |= {"vision_model.embeddings.position_embedding": (1, patches + 1, d)}
    shapes |= with_bias("vision_model.embeddings.patch_embedding", d, 3, v["patch_size"], v["patch_size"])
    for layer in range(v["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}"
        shapes |= {f"{at}.ls1": (d,), f"{at}.ls2": (d,)}
        shapes |= with_bias(f"{at}.attn.qkv", 3 * d, d) | with_bias(f"{at}.attn.proj", d, d)
        shapes |= with_bias(f"{at}.norm1", d) | with_bias(f"{at}.norm2", d)
        shapes |= with_bias(f"{at}.mlp.fc1", v["intermediate_size"], d)
        shapes |= with_bias(f"{at}.mlp.fc2", d, v["intermediate_size"])
    return shapes


def text_shapes(t: dict[str, Any]) -> Shapes:
    d, i, rows = t["hidden_size"], t["intermediate_size"], t["vocab_size"]
    head = d // t["num_attention_heads"]
    shared = head * t["num_key_value_heads"]
    if t["model_type"] == "qwen2":
        shapes: Shapes = {
            "language_model.model.embed_tokens.weight": (rows, d),
            "language_model.lm_head.weight": (rows, d),
        }
    else:
        shapes = {"language_model.model.tok_embeddings.weight": (rows, d), "language_model.output.weight": (rows, d)}
    shapes["language_model.model.norm.weight"] = (d,)
    for layer in range(t["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}"
        if t["model_type"] == "qwen2":
            shapes |= with_bias(f"{at}.self_attn.q_proj", d, d)
            shapes |= with_bias(f"{at}.self_attn.k_proj", shared, d) | with_bias(f"{at}.self_attn.v_proj", shared, d)
            shapes |= {f"{at}.self_attn.o_proj.weight": (d, d), f"{at}.mlp.down_proj.weight": (d, i)}
            shapes |= {f"{at}.mlp.gate_proj.weight": (i, d), f"{at}.mlp.up_proj.weight": (i, d)}
            shapes |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
        else:
            shapes |= {f"{at}.attention.wqkv.weight": (d + 2 * shared, d), f"{at}.attention.wo.weight": (d, d)}
            shapes |= {f"{at}.feed_forward.w1.weight": (i, d), f"{at}.feed_forward.w3.weight": (i, d)}
            shapes |= {f"{at}.feed_forward.w2.weight": (d, i)}
            shapes |= {f"{at}.attention_norm.weight": (d,), f"{at}.ffn_norm.weight": (d,)}
    return shapes


def all_shapes(original: dict[str, Any]) -> Shapes:
    vision, text = original["vision_config"], original["llm_config"]
    wide, d = 4 * vision["hidden_size"], text["hidden_size"]
    joint = with_bias("mlp1.0", wide) | with_bias("mlp1.1", d, wide) | with_bias("mlp1.3", d, d)
    return vision_shapes(vision) | joint | text_shapes(text)


@pytest.mark.parametrize(
    ("text", "parameters"), [(QWEN_05B, 938_000_000), (INTERNLM_7B, 8_075_000_000)], ids=["1B", "8B"]
)
def test_every_weight_of_the_full_sizes_finds_its_place(text: dict[str, Any], parameters: int) -> None:
    original = whole(text)
    config = config_of(original, image_token_id=9)
    shapes = all_shapes(original)
    found: Shapes = {}
    for name, shape in shapes.items():
        for ours, tensor in converted(name, torch.empty(shape, device="meta"), config):
            assert ours not in found
            found[ours] = tuple(tensor.shape)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == pytest.approx(parameters, rel=0.005)
    assert config.image_seq_length == 256 and config.text_config.rope_parameters["rope_theta"] == 1e6
    if text is INTERNLM_7B:
        assert config.text_config.rope_parameters["rope_type"] == "dynamic"
        assert config.text_config.rope_parameters["factor"] == 2.0


def small(kind: str) -> dict[str, Any]:
    vision = VISION_300M | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    text = QWEN_05B if kind == "qwen2" else INTERNLM_7B
    text = text | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return whole(text | {"num_hidden_layers": 2, "vocab_size": 800}, vision)


def test_heads_are_taken_apart_as_the_authors_put_them_together() -> None:
    torch.manual_seed(0)
    original = small("internlm2")
    config = config_of(original, image_token_id=9)
    heads, shared, head = 4, 2, 8
    weight = torch.randn((heads + 2 * shared) * head, 32)
    x_TC = torch.randn(5, 32)
    name = "language_model.model.layers.1.attention.wqkv.weight"
    q, k, v = ((x_TC @ part.T).unflatten(-1, (-1, head)) for _, part in converted(name, weight, config))
    # theirs: the channels as (key-value head, its query heads and then key and value, channel)
    together = (x_TC @ weight.T).reshape(5, shared, heads // shared + 2, head)
    torch.testing.assert_close(q, together[:, :, :2].reshape(5, heads, head))
    torch.testing.assert_close(k, together[:, :, 2])
    torch.testing.assert_close(v, together[:, :, 3])


def original_folder(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in two files with a tokenizer that needs no code."""
    torch.manual_seed(0)
    folder.mkdir()
    tokenizer = train_tokenizer(TEXTS)
    original = small(kind)
    original["llm_config"]["vocab_size"] = len(tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(original))
    weights = {name: torch.randn(shape) for name, shape in all_shapes(original).items()}
    half = dict(list(weights.items())[: len(weights) // 2])
    files = {"model-00001-of-00002.safetensors": half}
    files["model-00002-of-00002.safetensors"] = {n: w for n, w in weights.items() if n not in half}
    for name, part in files.items():
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {n: name for name, part in files.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, weights


def by_hand(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Where every weight of the small checkpoint belongs, spelled out and not by the converter's own table."""
    theirs, ours = "vision_model.embeddings.", "model.vision_tower.embeddings."
    found = {
        f"{ours}cls_token": weights[f"{theirs}class_embedding"],
        f"{ours}position_embeddings": weights[f"{theirs}position_embedding"],
        f"{ours}patch_embeddings.projection.weight": weights[f"{theirs}patch_embedding.weight"],
        f"{ours}patch_embeddings.projection.bias": weights[f"{theirs}patch_embedding.bias"],
    }
    for number, part in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
        for kept in ("weight", "bias"):
            found[f"model.multi_modal_projector.{part}.{kept}"] = weights[f"mlp1.{number}.{kept}"]
    for layer in range(2):
        theirs, ours = f"vision_model.encoder.layers.{layer}.", f"model.vision_tower.encoder.layer.{layer}."
        for kept in ("weight", "bias"):
            q, k, v = weights[f"{theirs}attn.qkv.{kept}"].split(16)  # the small tower's width
            found |= {f"{ours}attention.q_proj.{kept}": q, f"{ours}attention.k_proj.{kept}": k}
            found[f"{ours}attention.v_proj.{kept}"] = v
            found[f"{ours}attention.projection_layer.{kept}"] = weights[f"{theirs}attn.proj.{kept}"]
            found[f"{ours}layernorm_before.{kept}"] = weights[f"{theirs}norm1.{kept}"]
            found[f"{ours}layernorm_after.{kept}"] = weights[f"{theirs}norm2.{kept}"]
            found[f"{ours}mlp.fc1.{kept}"] = weights[f"{theirs}mlp.fc1.{kept}"]
            found[f"{ours}mlp.fc2.{kept}"] = weights[f"{theirs}mlp.fc2.{kept}"]
        found |= {f"{ours}lambda_1": weights[f"{theirs}ls1"], f"{ours}lambda_2": weights[f"{theirs}ls2"]}
        found |= text_layer_by_hand(weights, kind, layer)
    head, rows = ("lm_head", "embed_tokens") if kind == "qwen2" else ("output", "tok_embeddings")
    found["lm_head.weight"] = weights[f"language_model.{head}.weight"]
    found["model.language_model.embed_tokens.weight"] = weights[f"language_model.model.{rows}.weight"]
    found["model.language_model.norm.weight"] = weights["language_model.model.norm.weight"]
    return found


def text_layer_by_hand(weights: dict[str, torch.Tensor], kind: str, layer: int) -> dict[str, torch.Tensor]:
    theirs, ours = f"language_model.model.layers.{layer}.", f"model.language_model.layers.{layer}."
    if kind == "qwen2":  # the names of its layers stay
        return {ours + n.removeprefix(theirs): w for n, w in weights.items() if n.startswith(theirs)}
    head = 8
    groups = weights[f"{theirs}attention.wqkv.weight"].split(4 * head)  # a group: two query heads, a key, a value
    return {
        f"{ours}self_attn.q_proj.weight": torch.cat([group[: 2 * head] for group in groups]),
        f"{ours}self_attn.k_proj.weight": torch.cat([group[2 * head : 3 * head] for group in groups]),
        f"{ours}self_attn.v_proj.weight": torch.cat([group[3 * head :] for group in groups]),
        f"{ours}self_attn.o_proj.weight": weights[f"{theirs}attention.wo.weight"],
        f"{ours}mlp.gate_proj.weight": weights[f"{theirs}feed_forward.w1.weight"],
        f"{ours}mlp.up_proj.weight": weights[f"{theirs}feed_forward.w3.weight"],
        f"{ours}mlp.down_proj.weight": weights[f"{theirs}feed_forward.w2.weight"],
        f"{ours}input_layernorm.weight": weights[f"{theirs}attention_norm.weight"],
        f"{ours}post_attention_layernorm.weight": weights[f"{theirs}ffn_norm.weight"],
    }


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_a_converted_folder_is_a_base(tmp_path: Path, kind: str) -> None:
    source, weights = original_folder(tmp_path / "theirs", kind)
    with pytest.raises(ValueError, match=r"'internvl_chat', expected 'internvl'.*perceptio convert"):
        load_backbone(source, dtype=torch.float32)
    convert_folder(source, tmp_path / "ours")
    model, processor = load_backbone(tmp_path / "ours", dtype=torch.float32)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == model.config.get_text_config().eos_token_id == end
    state = model.state_dict()
    wanted = by_hand(weights, kind)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    asked = processor(images=[torch.zeros(3, 40, 60, dtype=torch.uint8)], text=text, return_tensors="pt")
    assert int((asked["input_ids"] == model.config.image_token_id).sum()) == 4 * len(asked["pixel_values"])
    assert len(asked["pixel_values"]) > 1, "tiles and a thumbnail"
    with torch.no_grad():
        assert torch.isfinite(model(**asked).logits).all()


def test_a_tokenizer_that_needs_remote_code_is_never_run(tmp_path: Path) -> None:
    """InternLM2's is such; the processor then comes from elsewhere, as the 8B's must."""
    source, weights = original_folder(tmp_path / "theirs", "internlm2")
    convert_folder(source, tmp_path / "usual")
    for file in source.glob("*token*"):
        file.unlink()
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["own.InternLM2Tokenizer", None]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass InternLM2Tokenizer: ...\n")
    with pytest.raises(ValueError, match=r"(?s)its tokenizer cannot be read without remote code .*: name a processor"):
        convert_folder(source, tmp_path / "ours")
    convert_folder(source, tmp_path / "ours", processor=tmp_path / "usual")
    assert not (tmp_path / "ran").exists()
    state = load_backbone(tmp_path / "ours", dtype=torch.float32)[0].state_dict()
    for name, tensor in by_hand(weights, "internlm2").items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    source, _ = original_folder(tmp_path / "theirs", "qwen2")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"language_model.lm_head.weight": file}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"it names '{file}', expected files of this folder alone"):
        convert_folder(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="own folder, expected another one"):
        convert_folder(source, source)


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'llava', expected 'internvl_chat'"):
        config_of({"model_type": "llava"}, 9)
    with pytest.raises(ValueError, match=r"llm_config.model_type is 'phi3', expected one of"):
        config_of(whole({"model_type": "phi3"}), 9)
    with pytest.raises(ValueError, match="ps_version is 'v1', expected 'v2'"):
        config_of(whole(QWEN_05B, ps_version="v1"), 9)
    config = config_of(small("qwen2"), 9)
    with pytest.raises(ValueError, match=r"'visual.proj' is of no part of an InternVL2.5"):
        list(converted("visual.proj", torch.zeros(1), config))
    source, _ = original_folder(tmp_path / "theirs", "qwen2")
    lost = json.loads((source / "model.safetensors.index.json").read_text())
    lost["weight_map"] = {n: f for n, f in lost["weight_map"].items() if f.endswith("1-of-00002.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(lost))
    with pytest.raises(ValueError, match=r"weights are missing, the first"):
        convert_folder(source, tmp_path / "ours")
    source, _ = original_folder(tmp_path / "others", "qwen2")
    changed = json.loads((source / "config.json").read_text())
    changed["llm_config"]["hidden_size"] = 64
    (source / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"is \(.*\), expected \(.*\) by the configuration"):
        convert_folder(source, tmp_path / "ours")
