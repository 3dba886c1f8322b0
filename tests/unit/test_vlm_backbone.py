"""The backbone's vocabulary, LoRA and trainable parts, on tiny random models: Qwen2 and Llama, tied and untied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from perceptio.vlm.backbone import add_lora, extend_vocabulary, load_backbone, merge_lora, set_trainable
from perceptio.vocabulary import extend_tokenizer

OLD, CODES, IMAGE_ID = 12, 5, 3
Build = Callable[..., InternVLForConditionalGeneration]


def build(text: str = "qwen2", tied: bool = True, rows: int = OLD) -> InternVLForConditionalGeneration:
    torch.manual_seed(0)
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[text](
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config=config.to_dict(),
            image_token_id=IMAGE_ID,
            image_seq_length=4,
            tie_word_embeddings=tied,
        )
    ).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(OLD)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


@torch.no_grad()
def logits(model: InternVLForConditionalGeneration) -> torch.Tensor:
    ids = torch.tensor([[1, *[IMAGE_ID] * 4, 5, 6, 7]])
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    out: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return out


def trained(model: InternVLForConditionalGeneration) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("text", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_extension_leaves_old_logits_and_tying_alone(text: str, tied: bool) -> None:
    model = build(text, tied)
    before = logits(model)
    vocabulary = extend_vocabulary(model, tokenizer(), CODES)
    after = logits(model)
    assert after.shape[-1] == OLD + CODES + 3
    assert vocabulary.first_code_id == OLD + 2
    torch.testing.assert_close(after[..., :OLD], before)
    assert model.config.text_config.vocab_size == OLD + CODES + 3
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("rows", [OLD, 64])  # 64: a model with spare rows beyond its tokenizer, as Qwen2 has
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_near_the_mean_differ_and_are_seeded(rows: int, tied: bool) -> None:
    weights = []
    for seed in (0, 0, 1):
        model = build(tied=tied, rows=rows)
        extend_vocabulary(model, tokenizer(), CODES, seed=seed)
        weights.append(model.get_output_embeddings().weight.detach())
    new = weights[0][OLD : OLD + CODES + 3]
    old = weights[0][:OLD]
    assert (new - old.mean(0)).abs().max() < old.std()
    assert len(new.unique(dim=0)) == CODES + 3
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("tied", [True, False])
def test_each_spatial_token_can_start_as_an_old_one(tied: bool) -> None:
    model, words = build(tied=tied, rows=OLD), tokenizer()
    names = list(words.get_vocab())[:3]
    like = [words.encode(name, add_special_tokens=False)[0] for name in names]
    vocabulary = extend_vocabulary(
        model, words, CODES, starts_as=dict(zip(("seg", "depth_start", "code"), names, strict=True))
    )
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        near, first = table.weight[:OLD].std(), min(vocabulary.all_ids)
        for new, old in zip((vocabulary.seg_id, vocabulary.depth_start_id), like[:2], strict=True):
            assert (table.weight[new] - table.weight[old]).abs().max() < near
        codes = table.weight[list(vocabulary.code_ids)]
        assert (codes - table.weight[like[2]]).abs().max() < near
        assert len(codes.unique(dim=0)) == CODES
        assert (table.weight[vocabulary.depth_end_id] - table.weight[:first].mean(0)).abs().max() < near


def test_more_than_a_token_is_no_start() -> None:
    words = tokenizer()
    word = next(iter(words.get_vocab()))
    with pytest.raises(ValueError, match=r"starts_as.seg: '.*' is \d+ tokens of the base, expected one"):
        extend_vocabulary(build(rows=OLD), words, CODES, starts_as={"seg": f"{word} {word}"})


@pytest.mark.parametrize("rows", [OLD, 64])
def test_a_tokenizer_that_has_the_tokens_is_refused(rows: int) -> None:
    model, words = build(rows=rows), tokenizer()
    extend_tokenizer(words, CODES)
    before = logits(model)
    with pytest.raises(ValueError, match=rf"spatial tokens for {CODES} codes already, expected none"):
        extend_vocabulary(model, words, CODES)
    with pytest.raises(ValueError, match=rf"{CODES} depth codes, got {CODES + 1}"):
        extend_vocabulary(model, words, CODES + 1)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("text", "tied"), [("qwen2", True), ("llama", False)])
def test_lora_starts_neutral_trains_the_text_model_only_and_merges(text: str, tied: bool) -> None:
    model = build(text, tied)
    plain = logits(model)
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    torch.testing.assert_close(logits(model), plain)
    set_trainable(model, vision=False, projector=False, language="lora", embeddings=False)
    assert trained(model)
    assert all("language_model.layers" in name and ".lora_" in name for name in trained(model))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    assert merge_lora(model) == 14  # 2 layers of 7 linear maps
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(build(text, tied).state_dict())
    assert merge_lora(model) == 0


def test_merging_rounds_once_whatever_the_weights_were_trained_in() -> None:
    model = build()
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)  # far below what bfloat16 tells apart in a weight
    model.to(torch.bfloat16)
    layer = model.model.language_model.layers[0].mlp.up_proj
    base, down, up = (
        part.weight.detach().double() for part in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    )
    exact = base + 2 * up @ down  # alpha / rank
    merge_lora(model, torch.float32)
    merged = model.model.language_model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, atol=1e-7, rtol=1e-6)
    assert (merged.bfloat16().double() - exact).abs().max() > 1e-4, "bfloat16 would have lost it"


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_train_whole_beside_lora(tied: bool) -> None:
    model = build(tied=tied)
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    set_trainable(model, vision=False, projector=True, language="lora", embeddings=True)
    rest = {name for name in trained(model) if ".lora_" not in name and "projector" not in name}
    assert rest == {"model.language_model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert model.get_input_embeddings().weight.requires_grad
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_by_default_what_the_lineage_trains_trains() -> None:
    model = build(tied=False)
    add_lora(model)
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert (layer.r["default"], layer.lora_alpha["default"], layer.lora_dropout["default"].p) == (128, 256, 0.05)
    set_trainable(model)
    whole = ("model.multi_modal_projector.", "model.language_model.embed_tokens.", "lm_head.")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(whole) or ".lora_" in n}


@pytest.mark.parametrize("part", ["vision", "projector", "language", "embeddings"])
def test_each_part_trains_alone(part: str) -> None:
    model = build(tied=False)
    wanted = {"vision": False, "projector": False, "embeddings": False}
    if part != "language":
        wanted[part] = True
    set_trainable(model, language="full" if part == "language" else "frozen", **wanted)
    places = {
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language": ("model.language_model.layers.", "model.language_model.norm."),
        "embeddings": ("model.language_model.embed_tokens.", "lm_head."),
    }[part]
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(places)}


def test_lora_misuse_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="no LoRA layers"):
        set_trainable(model, vision=False, projector=False, language="lora", embeddings=True)
    with pytest.raises(ValueError, match="c_attn"):
        add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "c_attn"])
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    with pytest.raises(ValueError, match="14 LoRA layers already"):
        add_lora(model, rank=2, alpha=4, dropout=0.0)


def test_another_layout_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ValueError, match="'internvl_chat', expected 'internvl'"):
        load_backbone(tmp_path, dtype=torch.float32)
