"""Every kind of depth model gives the maps of transformers' own pipeline, on the same images in the same batch."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
    ZoeDepthImageProcessor,
    pipeline,
)

from perceptio.depth.teacher import STEPS, DepthTeacher, TeacherCard, TeacherMap

BOUND = 2 / STEPS


def images(*sizes: tuple[int, int]) -> list[npt.NDArray[np.uint8]]:
    """Smooth pictures with some noise: maps of pure noise lie within a step of flat."""
    found = []
    for seed, (height, width) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width] / 20
        waves = 127 + 100 * np.sin(x[..., None] + np.arange(3) + seed) * np.cos(y[..., None])
        noise = np.random.default_rng(seed).integers(0, 28, (height, width, 3))
        found.append((waves + noise).astype(np.uint8))
    return found


def lively(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights that tell one pixel from another, which the usual start is too small for."""
    torch.manual_seed(0)
    model = kind(config)
    for weight in (weight for weight in model.parameters() if weight.ndim > 1):
        torch.nn.init.kaiming_normal_(weight)
    return model


def dinov2(patch: int) -> Dinov2Config:
    return Dinov2Config(
        image_size=2 * patch,
        patch_size=patch,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )


def depth_anything(folder: Path) -> Path:
    config = DepthAnythingConfig(
        backbone_config=dinov2(14),
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type="relative",
    )
    model = lively(DepthAnythingForDepthEstimation, config)
    torch.nn.init.constant_(model.get_parameter("head.conv3.bias"), 0.5)
    model.save_pretrained(folder)
    size = {"height": 42, "width": 42}
    DPTImageProcessor(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(folder)
    return folder


def dpt(folder: Path) -> Path:
    config = DPTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
    )
    lively(DPTForDepthEstimation, config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def glpn(folder: Path) -> Path:
    config = GLPNConfig(
        hidden_sizes=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_attention_heads=(1, 1, 2, 2), decoder_hidden_size=8
    )
    torch.manual_seed(0)
    GLPNForDepthEstimation(config).save_pretrained(folder)
    GLPNImageProcessor().save_pretrained(folder)
    return folder


def zoedepth(folder: Path) -> Path:
    backbone = BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_indices=[1, 2, 3, 4],
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        bin_embedding_dim=8,
        num_relative_features=4,
    )
    lively(ZoeDepthForDepthEstimation, config).save_pretrained(folder)
    ZoeDepthImageProcessor(size={"height": 32, "width": 32}, ensure_multiple_of=8).save_pretrained(folder)
    return folder


def inv_depth(found: object) -> npt.NDArray[np.float64]:
    assert isinstance(found, TeacherMap), found
    return found.inv_depth_HW / STEPS


def scaled(raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (raw - raw.min()) / (raw.max() - raw.min())


@pytest.mark.parametrize("write", [depth_anything, dpt])
def test_relative_maps_are_the_pipelines_in_a_batch_of_mixed_sizes(tmp_path: Path, write: object) -> None:
    assert callable(write)
    folder = write(tmp_path)
    pictures = images((45, 70), (90, 140), (45, 70), (50, 78))  # of one shape once they are prepared
    teacher = DepthTeacher.from_pretrained(folder)
    assert teacher.kind == "relative"
    assert len({teacher.prepare(picture).shape for picture in pictures}) == 1
    reference = pipeline("depth-estimation", model=str(folder), device="cpu")
    expected = reference([Image.fromarray(picture) for picture in pictures], batch_size=4)
    for picture, found, want in zip(pictures, teacher(pictures), expected, strict=True):
        assert inv_depth(found).shape == picture.shape[:2]
        assert np.abs(inv_depth(found) - scaled(want["predicted_depth"].double().numpy())).max() < BOUND


def test_a_batch_of_shapes_that_differ_is_run_shape_by_shape(tmp_path: Path) -> None:
    folder = depth_anything(tmp_path)
    pictures = images((45, 70), (70, 45), (45, 70), (60, 60))
    found = DepthTeacher.from_pretrained(folder)(pictures)
    reference = pipeline("depth-estimation", model=str(folder), device="cpu")
    for group in ([0, 2], [1], [3]):
        expected = reference([Image.fromarray(pictures[i]) for i in group], batch_size=len(group))
        for i, want in zip(group, expected, strict=True):
            assert np.abs(inv_depth(found[i]) - scaled(want["predicted_depth"].double().numpy())).max() < BOUND


def test_metric_maps_are_the_inverse_of_the_pipelines_where_it_does_not_resize(tmp_path: Path) -> None:
    folder = glpn(tmp_path)
    pictures = images((64, 96), (64, 96), (64, 96))  # multiples of 32 go in as they are
    teacher = DepthTeacher.from_pretrained(folder)
    assert teacher.kind == "metric"
    reference = pipeline("depth-estimation", model=str(folder), device="cpu")
    expected = reference([Image.fromarray(picture) for picture in pictures], batch_size=3)
    for found, want in zip(teacher(pictures), expected, strict=True):
        z = want["predicted_depth"].double().numpy()
        assert np.abs(inv_depth(found) - scaled(1 / z)).max() < BOUND


def test_metric_maps_keep_the_models_own_way_back_to_the_images_size(tmp_path: Path) -> None:
    """ZoeDepth pads what it sees and cuts the margin off again."""
    folder = zoedepth(tmp_path)
    pictures = images((40, 60), (40, 60))
    assert TeacherCard.read(folder).kind == "metric"
    teacher = DepthTeacher.from_pretrained(folder, kind="relative")  # shows the metres themselves
    reference = pipeline("depth-estimation", model=str(folder), device="cpu")
    expected = reference([Image.fromarray(picture) for picture in pictures], batch_size=2)
    for found, want in zip(teacher(pictures), expected, strict=True):
        assert np.abs(inv_depth(found) - scaled(want["predicted_depth"].double().numpy())).max() < BOUND


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_is_near_full_precision_and_no_more(tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    folder = depth_anything(tmp_path)
    pictures = images((45, 70), (45, 70))
    full = DepthTeacher.from_pretrained(folder)(pictures)
    half = DepthTeacher.from_pretrained(folder, dtype=dtype)(pictures)
    errors = [np.abs(inv_depth(one) - inv_depth(other)).mean() for one, other in zip(full, half, strict=True)]
    assert 0 < max(errors) < bound


def test_a_model_of_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    folder = dpt(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "dpt"', '"model_type": "depth_pro"'))
    with pytest.raises(ValueError, match=r"model_type 'depth_pro', depth_estimation_type None; expected 'relative'"):
        TeacherCard.read(folder)
    assert TeacherCard.read(folder, "metric").kind == "metric"
