"""Training on real Ray Train and DeepSpeed, two workers: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file
from trainings import STEPS, lines_of, prepared

from perceptio.generate import Perceiver
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import Request
from perceptio.train.step import TERMS
from schemas.recipe import Recipe
from tests.tables import published, recipe_in
from tests.tiny import tiny_parts
from workflows import export, train
from workflows.commits import Table
from workflows.store import StageError, open_root

SHARES = f"what {STEPS} steps drew of the mixture, as shares:"


@dataclass(frozen=True)
class Parts:
    folder: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    tiny_parts(folder)
    return Parts(folder)


@contextmanager
def messages_of(logger: str) -> Iterator[list[str]]:
    """What is logged while the block runs; `caplog` is no fixture for a whole module."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, source = Handler(), logging.getLogger(logger)
    level = source.level
    source.addHandler(handler)
    source.setLevel(logging.INFO)
    try:
        yield said
    finally:
        source.removeHandler(handler)
        source.setLevel(level)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Recipe:
    recipe = prepared(tmp_path_factory.mktemp("trained"), parts.folder, train__peak_flops=1e12)
    with messages_of("workflows.train") as said:
        train.run(recipe)
    assert any(SHARES in message for message in said), said
    return recipe


def test_every_term_is_logged_by_source(trained: Recipe) -> None:
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[0]["terms"]) == set(TERMS)
    assert set(lines[0]["by_source"]) == {"training"}
    assert lines[-1]["learning_rate"] > 0, "a step's own rate: the schedule ends at 0 behind the last"
    assert np.mean([line["loss"] for line in lines[-3:]]) < lines[0]["loss"]


def test_where_time_and_operations_went_is_logged(trained: Recipe) -> None:
    lines = lines_of(trained)
    for before, line in itertools.pairwise(lines):
        assert list(line["times"]) == ["forward", "backward", "optimizer"] and min(line["times"].values()) > 0
        apart = sum(line["times"].values()) + line["waited"]
        assert apart <= line["seconds"] - before["seconds"] + 0.01, "phases lie within their step"
        assert line["mfu"] == pytest.approx(line["flops"] / (2e12 * (line["seconds"] - before["seconds"])), rel=1e-3)
        assert line["mixture"]["training"] == line["mixture"]["training"] | {"asked": 1, "share": 1, "period": 1}
    assert lines[-1]["mixture"]["training"]["samples"] == STEPS * trained.train.global_batch


def test_the_model_folder_answers_and_differs_from_its_start(trained: Recipe, parts: Parts) -> None:
    root = open_root(trained.root)
    manifest = root.manifest("model")
    assert manifest is not None
    names = {entry.path for entry in manifest.files}
    assert {"config.json", "model.safetensors", "perceptio.json", "codebook/model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]
    blank = Request(np.zeros((64, 64, 3), np.uint8), "Please segment the lamp.", "on", "on")
    perceiver = Perceiver.from_pretrained(root.at("model"))
    assert perceiver.perceive([blank], max_new_tokens=3)[0].reply.well_formed
    with safe_open(Path(root.at("model")) / "model.safetensors", "np") as weights:
        types = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    places = [name for name in types if "gaussian_matrix" in name]  # of SAM2, never rounded
    assert places and {types.pop(name) for name in places} == {"F32"}
    assert set(types.values()) == {"F16"}
    assert manifest.seconds == lines_of(trained)[-1]["seconds"] > 0
    assert manifest.extra["precision"] in ("bf16_autocast", "fp32")
    made_with = json.loads((Path(root.at("model")) / "perceptio.json").read_text())
    assert made_with["codebook_digest"] == perceiver.codec.digest


def test_low_rank_layers_under_zero_3_are_published_merged(tmp_path: Path, parts: Parts) -> None:
    settings = {"model__language": "lora", "model__lora": {"rank": 2, "alpha": 4, "dropout": 0.05}}
    recipe = prepared(
        tmp_path, parts.folder, **settings, train__zero_stage=3, train__steps=2, train__publish_dtype="float32"
    )
    train.run(recipe)
    found = load_file(Path(open_root(recipe.root).at("model")) / "model.safetensors")
    base = load_file(parts.folder / "base" / "model.safetensors")
    assert not [name for name in found if "lora" in name or "base_layer" in name]
    linear = [name for name in base if "language_model" in name and name.endswith("_proj.weight")]
    assert len(linear) == 14  # 2 layers of 7 linear maps
    for name in linear:
        size_R = np.linalg.svd(found[f"model.{name}"] - base[name], compute_uv=False)
        assert size_R[0] > 0 and (size_R[2:] <= 1e-3 * size_R[0]).all(), name
    assert Perceiver.from_pretrained(open_root(recipe.root).at("model")).model.config.depth_codes == 8


def test_a_checkpoint_is_exported_merged_or_with_its_adapter_apart(tmp_path: Path, parts: Parts) -> None:
    settings = {"model__language": "lora", "model__lora": {"rank": 2, "alpha": 4, "dropout": 0.05}}
    sizes = {"train__zero_stage": 2, "train__steps": 4, "train__checkpoint_every": 2, "train__publish_dtype": "float32"}
    recipe = prepared(tmp_path / "root", parts.folder, **settings, **sizes)
    train.run(recipe)
    root = open_root(recipe.root)
    (name,) = (path.name for path in Path(root.at("runs")).iterdir())
    published_ = load_file(Path(root.at("model")) / "model.safetensors")
    merged = load_file(export.run(recipe, tmp_path / "merged", name) / "model.safetensors")
    assert merged.keys() == published_.keys()
    for key, weight in published_.items():
        np.testing.assert_allclose(merged[key], weight, rtol=1e-6, atol=1e-7, err_msg=key)
    out = export.run(recipe, tmp_path / "apart", name, adapter=True)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = PerceptioForConditionalGeneration.from_pretrained(root.at("model"))(input_ids=ids).logits
        plain = PerceptioForConditionalGeneration.from_pretrained(out)
        assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-4, "without its adapter it is another model"
        adapted = PeftModel.from_pretrained(plain, str(out / "adapter")).eval()
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    earlier = load_file(export.run(recipe, tmp_path / "earlier", name, step=2) / "model.safetensors")
    assert any((earlier[key] != weight).any() for key, weight in merged.items())
    with pytest.raises(StageError, match=r"has checkpoints of steps \[2, 4\], none of 3"):
        export.run(recipe, tmp_path / "none", name, step=3)
    with pytest.raises(StageError, match="is not empty, expected a new folder"):
        export.run(recipe, tmp_path / "merged", name)
    (state,) = Path(root.at("runs")).glob("*/step-00000004/state/mp_rank_00_model_states.pt")
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match=r"mp_rank_00_model_states\.pt has digest"):
        export.run(recipe, tmp_path / "damaged", name, step=4)
    again = load_file(export.run(recipe, tmp_path / "before", name) / "model.safetensors")
    assert all((again[key] == weight).all() for key, weight in earlier.items()), "the one before is used"


def test_a_finished_run_is_left_alone(trained: Recipe) -> None:
    before = open_root(trained.root).manifest("model")
    began = time.monotonic()
    train.run(trained)
    assert open_root(trained.root).manifest("model") == before
    assert time.monotonic() - began < 5


def test_other_settings_are_refused(trained: Recipe) -> None:
    other = trained.model_copy(update={"train": trained.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(StageError, match=r"model was made from other inputs.*train"):
        train.run(other)


def test_codes_of_another_codebook_are_refused(tmp_path: Path, parts: Parts) -> None:
    recipe = prepared(tmp_path / "root", parts.folder)
    tiny_parts(tmp_path / "other", seed=9)
    root = open_root(recipe.root)
    old = root.manifest("codebook")
    new = published(root, tmp_path / "other" / "codebook", "codebook", {})
    assert old is not None
    with pytest.raises(StageError, match=f"{old.digest[:16]}.*{new.digest[:16]}"):
        train.run(recipe)


def test_depth_tables_are_named_where_one_is_missing(tmp_path: Path, parts: Parts) -> None:
    recipe = recipe_in(tmp_path / "root", parts.folder)
    root = open_root(recipe.root)
    published(root, parts.folder / "codebook", "codebook", {})
    with pytest.raises(StageError, match=r"samples/training.*run `assemble` first"):
        train.run(recipe)
    assert Table(root, "samples", "training").manifest() is None
