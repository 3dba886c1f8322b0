"""What becomes of a folder: whole or refused, never with random weights; and what InternVL's classes promise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GotOcr2ImageProcessor, InternVLProcessor

from perceptio.generate import Perceiver
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor, Request
from perceptio.vlm.backbone import add_lora, load_backbone, merge_lora, set_trainable
from perceptio.vocabulary import spatial_tokens
from tests.tiny import tiny_model, tiny_parts

load = PerceptioForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


def rewritten(folder: Path, *, without: str = "", more: str = "") -> None:
    """Takes the tensors with that in their names out of a folder's weights, and puts one of another name in."""
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if not (without and without in n)}
    weights |= {more: torch.zeros(1)} if more else {}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_published_base_is_cut_into_tiles_though_its_image_processor_says_no(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    """Published folders have no crop_to_patches: InternVLProcessor sets it when it is called, and so do we."""
    base = copied(parts["base"], tmp_path / "base")
    theirs = InternVLProcessor.from_pretrained(base)
    side = theirs.image_processor.size["height"]
    theirs.image_processor = GotOcr2ImageProcessor(size={"height": side, "width": side})
    theirs.save_pretrained(base)
    assert not json.loads((base / "processor_config.json").read_text())["image_processor"].get("crop_to_patches")
    image_HW3 = np.random.default_rng(0).integers(0, 256, (3 * side, 4 * side, 3), dtype=np.uint8)
    wanted = InternVLProcessor.from_pretrained(base)(images=[image_HW3], text=["<IMG_CONTEXT>"], return_tensors="pt")
    assert len(wanted["pixel_values"]) == 12 + 1
    ours = PerceptioProcessor.from_pretrained(base, codebook=parts["codebook"])
    found = ours.ask([Request(image_HW3, "What is it?")])["pixel_values"]
    assert torch.equal(found, wanted["pixel_values"])


def test_lora_layers_are_merged_before_a_folder_is_made(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    with pytest.raises(ValueError, match=r"14 LoRA layers, expected none in a folder: merge_lora\(\) first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge_lora(model)
    model.save_pretrained(tmp_path / "model")
    load(tmp_path / "model")


@pytest.mark.parametrize("part", ["segmenter.", "vision_tower.", "layers.1.mlp.down_proj."])
def test_a_folder_with_weights_missing_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    broken = copied(folder, tmp_path / "model")
    rewritten(broken, without=part)
    with pytest.raises(ValueError, match=rf"weights are missing or too many, the first .*{part}"):
        load(broken)


def test_a_folder_with_weights_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path / "model")
    rewritten(broken, more="model.other.weight")
    with pytest.raises(ValueError, match=r"1 weights are missing or too many, the first model\.other\.weight"):
        load(broken)


def test_a_base_with_weights_missing_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    broken = copied(parts["base"], tmp_path / "base")
    names = [name for name in load_file(broken / "model.safetensors") if "vision_tower" in name]
    assert names
    rewritten(broken, without="vision_tower")
    with pytest.raises(ValueError, match=rf"{len(names)} weights are missing, the first .*vision_tower"):
        load(broken, sam2=parts["sam2"], codebook=parts["codebook"])


def test_lora_leaves_the_mask_decoder_training(folder: Path) -> None:
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    model.segmenter.set_trainable(projector=True, decoder=True)
    before = {name for name, weight in model.segmenter.named_parameters() if weight.requires_grad}
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    set_trainable(model)
    assert {name for name, weight in model.segmenter.named_parameters() if weight.requires_grad} == before
    assert any("sam_mask_decoder" in name for name in before) and any("projector" in name for name in before)
    assert not model.model.language_model.layers[0].mlp.up_proj.base_layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_in_an_image_are_never_rounded(folder: Path, dtype: torch.dtype) -> None:
    exact = PerceptioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rough = PerceptioForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert {weight.dtype for weight in rough.parameters()} == {dtype}
    buffers = dict(rough.segmenter.sam2.named_buffers())
    places = [name for name in buffers if "gaussian_matrix" in name]
    assert places
    for name in places:
        torch.testing.assert_close(buffers[name], exact.segmenter.sam2.get_buffer(name), rtol=0, atol=0)


def test_what_was_loaded_is_checked_rather_than_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="output_loading_info is true, expected false"):
        PerceptioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "model")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(other)


def test_a_base_that_has_spatial_tokens_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    base = copied(parts["base"], tmp_path / "base")
    model, processor = load_backbone(base, dtype=torch.float32)
    processor.tokenizer.add_tokens(spatial_tokens(8), special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(base)
    processor.save_pretrained(base)
    message = r"its tokenizer has \['<\|depth_end\|>', .*'\[SEG\]'\] and 8 depth codes already, expected none"
    with pytest.raises(ValueError, match=message):
        load(base, sam2=parts["sam2"], codebook=parts["codebook"])
    with pytest.raises(ValueError, match=message):
        PerceptioProcessor.from_pretrained(base, codebook=parts["codebook"])


def test_weights_that_are_not_in_memory_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder, device_map={"model": "cpu", "lm_head": "cpu", "segmenter": "disk"}, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"segmenter\..* is offloaded, expected every weight in memory"):
        Perceiver(model, PerceptioProcessor.from_pretrained(folder))


def test_options_of_transformers_are_its_own(folder: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    halves = load(
        parts["base"], sam2=parts["sam2"], codebook=parts["codebook"], dtype="bfloat16", local_files_only=True
    )
    assert {weight.dtype for weight in halves.parameters()} == {torch.bfloat16}
    frequencies = {name: buffer for name, buffer in halves.named_buffers() if name.endswith("inv_freq")}
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies.values())
    within = copied(folder, tmp_path / "models" / "small").parent
    assert load(within, subfolder="small").codec is not None
    for loads in (load, PerceptioProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"max_objects is 7, but a Perceptio's is fixed"):
            loads(folder, max_objects=7)


def test_auto_classes_know_it_in_a_process_that_imported_the_model_alone(folder: Path) -> None:
    program = (
        "import perceptio.model, sys\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
        "for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):\n"
        "    print(type(auto.from_pretrained(sys.argv[1])).__name__)\n"
    )
    told = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["PerceptioConfig", "PerceptioForConditionalGeneration", "PerceptioProcessor"]
