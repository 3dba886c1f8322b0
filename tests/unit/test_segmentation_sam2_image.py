"""SAM2 for images behaves as the package's own predictor does, with the official names and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sam2
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor
from typer.testing import CliRunner

from perceptio.segmentation.sam2_image import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND_POINT,
    MEMORY_PARTS,
    Sam2ImageConfig,
    Sam2ImageModel,
    preprocess,
)
from workflows.cli import app

TINY = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    """The package's whole SAM2, with memory modules and random weights, in the shape of TINY."""
    config = OmegaConf.load(Path(sam2.__path__[0]) / "configs/sam2.1/sam2.1_hiera_t.yaml").model
    config.image_size = TINY.image_size
    config.image_encoder.trunk.embed_dim = TINY.embed_dim
    config.image_encoder.trunk.stages = list(TINY.stages)
    config.image_encoder.trunk.global_att_blocks = list(TINY.global_att_blocks)
    config.image_encoder.neck.backbone_channel_list = [128, 64, 32, 16]
    torch.manual_seed(0)
    return instantiate(config, _recursive_=True).eval()


@pytest.fixture(scope="module")
def checkpoint(whole: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the official layout."""
    path = tmp_path_factory.mktemp("official") / "sam2.pt"
    torch.save({"model": whole.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Sam2ImageModel:
    model = Sam2ImageModel(TINY).eval()
    model.load_official(checkpoint)
    return model


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["point", "box"])
def test_decoding_equals_the_packages_predictor(
    whole: torch.nn.Module, ours: Sam2ImageModel, picture: np.ndarray, prompt: str, multimask: bool
) -> None:
    predictor = SAM2ImagePredictor(whole)
    predictor._bb_feat_sizes = [(32, 32), (16, 16), (8, 8)]  # the predictor hard-codes those of 1024 pixels
    predictor.set_image(picture)
    if prompt == "point":
        given = {"point_coords": np.array([[40.0, 30.0]]), "point_labels": np.array([1])}
        points, labels = torch.tensor([[[40.0, 30.0]]]), torch.tensor([[FOREGROUND_POINT]])
    else:
        given = {"box": np.array([20.0, 10.0, 100.0, 70.0])}
        points = torch.tensor([[[20.0, 10.0], [100.0, 70.0]]])
        labels = torch.tensor([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]])
    _, theirs_iou, theirs = predictor.predict(**given, multimask_output=multimask, return_logits=True)
    with torch.no_grad():
        features = ours.encode(preprocess([picture], TINY.image_size))
        sparse = ours.embed_points(points * torch.tensor([128 / 150, 128 / 90]), labels)
        logits, iou = ours.decode_all(features, torch.tensor([0]), sparse, multimask=multimask)
        best, best_iou = ours.decode(features, torch.tensor([0]), sparse, multimask=multimask)
    np.testing.assert_allclose(logits[0].clamp(-32, 32).numpy(), theirs, atol=1e-4)
    np.testing.assert_allclose(iou[0].numpy(), theirs_iou, atol=1e-5)
    assert best_iou.item() == iou.max().item()
    assert torch.equal(best[0], logits[0, iou[0].argmax()])


def test_features_have_the_documented_shapes_for_each_image_of_a_batch(ours: Sam2ImageModel) -> None:
    pixels = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        features = ours.encode(pixels)
        alone = ours.encode(pixels[1:])
    assert features.embedding_BCHW.shape == (2, 256, 8, 8)
    assert features.high_res_s0.shape == (2, 32, 32, 32)
    assert features.high_res_s1.shape == (2, 64, 16, 16)
    torch.testing.assert_close(features.embedding_BCHW[1:], alone.embedding_BCHW, atol=1e-5, rtol=1e-5)


def test_an_official_checkpoint_loses_its_memory_parts_and_nothing_else(
    whole: torch.nn.Module, ours: Sam2ImageModel
) -> None:
    kept = {name for name in whole.state_dict() if not name.startswith(MEMORY_PARTS)}
    assert set(ours.state_dict()) == kept
    assert all(torch.equal(ours.state_dict()[name], whole.state_dict()[name]) for name in kept)


def test_a_checkpoint_with_a_key_that_nobody_named_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["surprise.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"surprise\.weight"):
        Sam2ImageModel(TINY).load_official(tmp_path / "other.pt")


def official(release: str, size: str) -> torch.nn.Module:
    """The package's whole SAM2 of one official config, built by the package."""
    name = f"configs/sam2{release}/sam2{release}_hiera_{size}.yaml"
    built: torch.nn.Module = instantiate(OmegaConf.load(Path(sam2.__path__[0]) / name).model, _recursive_=True)
    return built


@pytest.mark.parametrize("release", ["", ".1"])
@pytest.mark.parametrize(("size", "width", "depth"), [("t", 96, 12), ("s", 96, 16), ("b+", 112, 24), ("l", 144, 48)])
def test_official_configs_are_read_with_the_trunks_own_defaults(
    release: str, size: str, width: int, depth: int
) -> None:
    config = Sam2ImageConfig.from_official(f"configs/sam2{release}/sam2{release}_hiera_{size}.yaml")
    assert (config.embed_dim, sum(config.stages), config.image_size) == (width, depth, 1024)
    assert Sam2ImageConfig.from_dict(config.to_dict()) == config
    whole, ours = official(release, size).state_dict(), Sam2ImageModel(config).state_dict()
    kept = {name: tensor.shape for name, tensor in whole.items() if not name.startswith(MEMORY_PARTS)}
    assert {name: tensor.shape for name, tensor in ours.items()} == kept


@pytest.mark.parametrize("release", ["", ".1"])
def test_the_official_hiera_tiny_is_converted_whole(release: str, tmp_path: Path) -> None:
    whole, file = official(release, "t"), tmp_path / f"sam2{release}_hiera_tiny.pt"
    torch.save({"model": whole.state_dict()}, file)
    result = CliRunner().invoke(app, ["convert", str(file), "--out", str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    ours, theirs = Sam2ImageModel.from_pretrained(tmp_path / "ours"), whole.state_dict()
    assert ours.config.image_size == 1024
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    (tmp_path / "mine.pt").write_bytes(b"")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "mine.pt"), "--out", str(tmp_path / "none")])
    assert result.exit_code == 1 and "expected an official name" in result.output


def test_wrong_configs_are_refused_with_what_was_seen() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        Sam2ImageConfig.from_official("configs/nothing.yaml")
    with pytest.raises(ValueError, match="emb_dim"):
        Sam2ImageConfig.from_dict({"emb_dim": 3})
    with pytest.raises(ValueError, match="250"):
        Sam2ImageConfig(image_size=250)


def test_a_saved_model_comes_back_the_same(ours: Sam2ImageModel, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    back = Sam2ImageModel.from_pretrained(tmp_path)
    assert back.config == ours.config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_preprocessing_takes_any_shape_and_refuses_what_is_no_rgb_image() -> None:
    grey = np.full((7, 300, 3), 255, np.uint8)
    pixels = preprocess([grey, grey[:, :5]], 64)
    assert pixels.shape == (2, 3, 64, 64)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[1, :, 30, 30], expected)
    with pytest.raises(ValueError, match="float64"):
        preprocess([np.zeros((4, 4, 3))], 64)


def test_pixels_of_another_size_are_refused(ours: Sam2ImageModel) -> None:
    with pytest.raises(ValueError, match="128, 128"):
        ours.encode(torch.zeros(1, 3, 64, 64))
