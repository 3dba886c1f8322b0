"""A teacher's maps are those of the model's own pipeline, and a bad image costs its neighbours nothing."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    pipeline,
)

from perceptio.depth.teacher import DepthError, DepthTeacher, TeacherMap, inv_depth_from_metric, scaled_map
from schemas.tables import Reason


def image(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_model(folder: Path, kind: str = "relative", scale: float = 1.0) -> Path:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    model = DepthAnythingForDepthEstimation(config)
    for weight in (weight for weight in model.parameters() if weight.ndim > 1):
        torch.nn.init.kaiming_normal_(weight)  # the usual start is too small to tell one pixel from another
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)
    model.head.conv3.weight.data *= scale
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    DPTImageProcessor(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "teacher")


def test_a_map_equals_the_reference_pipelines(folder: Path) -> None:
    rgb = image(45, 70)
    (found,) = DepthTeacher.from_pretrained(folder)([rgb])
    reference = pipeline("depth-estimation", model=str(folder), device="cpu")(Image.fromarray(rgb))["predicted_depth"]
    reference = reference.double().numpy()
    assert isinstance(found, TeacherMap)
    assert found.inv_depth_HW.shape == (45, 70)
    assert found.inv_depth_HW.dtype == np.uint16
    assert (found.raw_min, found.raw_max) == pytest.approx((reference.min(), reference.max()))
    expected = (reference - reference.min()) / (reference.max() - reference.min()) * 65535
    np.testing.assert_allclose(found.inv_depth_HW, expected, atol=0.51)


def test_maps_come_back_in_order_for_mixed_sizes(folder: Path) -> None:
    teacher = DepthTeacher.from_pretrained(folder)
    sizes = [(30, 30), (20, 60), (31, 31), (60, 20), (12, 40)]
    images = [image(h, w, seed=h) for h, w in sizes]
    together = teacher(images)
    for rgb, found in zip(images, together, strict=True):
        (alone,) = teacher([rgb])
        assert isinstance(found, TeacherMap) and isinstance(alone, TeacherMap)
        assert found.inv_depth_HW.shape == rgb.shape[:2]
        assert np.abs(found.inv_depth_HW.astype(int) - alone.inv_depth_HW).max() <= 8  # rounding of another batch size
    assert teacher([]) == []


def test_an_image_too_narrow_for_the_model_leaves_its_neighbours_alone(folder: Path) -> None:
    good, narrow = DepthTeacher.from_pretrained(folder)([image(28, 28), image(3, 40)])
    assert isinstance(good, TeacherMap)
    assert isinstance(narrow, DepthError)
    assert narrow.reason == Reason.TOO_SMALL
    assert "40 x 3" in str(narrow)


def test_a_metric_teacher_gives_the_inverse(tmp_path: Path) -> None:
    teacher = DepthTeacher.from_pretrained(write_model(tmp_path, kind="metric"))
    rgb = image(28, 28)
    (found,) = teacher([rgb])
    pixels = teacher.processor(images=rgb, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        depth = teacher.model(pixels).predicted_depth[0].numpy()
    assert isinstance(found, TeacherMap)
    assert found.raw_max == pytest.approx(1 / depth.min(), rel=1e-4)
    assert np.unravel_index(found.inv_depth_HW.argmax(), depth.shape) == np.unravel_index(depth.argmin(), depth.shape)


def test_an_image_without_depth_leaves_its_neighbours_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = DepthTeacher.from_pretrained(folder)
    images = [image(28, 28, seed) for seed in range(4)]
    good = teacher(images)
    forward = teacher.model.forward

    def spoil(pixel_values: torch.Tensor) -> object:
        outputs = forward(pixel_values=pixel_values)
        outputs.predicted_depth[1] = 0.7
        outputs.predicted_depth[2, 3, 4] = float("nan")
        return outputs

    monkeypatch.setattr(teacher.model, "forward", spoil)
    found = teacher(images)
    assert [getattr(slot, "reason", None) for slot in found] == [
        None,
        Reason.CONSTANT_DEPTH,
        Reason.NOT_FINITE_DEPTH,
        None,
    ]
    for place in (0, 3):
        assert isinstance(found[place], TeacherMap) and isinstance(good[place], TeacherMap)
        assert np.array_equal(found[place].inv_depth_HW, good[place].inv_depth_HW)


def test_the_digest_and_licence_name_the_weights(folder: Path, tmp_path: Path) -> None:
    teacher = DepthTeacher.from_pretrained(folder)
    again = DepthTeacher.from_pretrained(write_model(tmp_path / "same"))
    other = DepthTeacher.from_pretrained(write_model(tmp_path / "other", scale=1.5))
    assert teacher.licence == "apache-2.0"
    assert teacher.digest == again.digest != other.digest
    (one,), (two,) = teacher([image(28, 28)]), other([image(28, 28)])
    assert isinstance(one, TeacherMap) and isinstance(two, TeacherMap)
    assert one.raw_max != two.raw_max  # other weights, another answer


def test_a_folder_without_weights_is_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected config\.json and at least one \*\.safetensors"):
        DepthTeacher.from_pretrained(folder)


def test_recorded_depth_becomes_inverse_depth() -> None:
    depth = np.array([[1.0, 2.0], [4.0, np.inf]])
    found = inv_depth_from_metric(depth)
    assert found.inv_depth_HW.tolist() == [[65535, round(65535 / 2)], [round(65535 / 4), 0]]
    assert (found.raw_min, found.raw_max) == (0.0, 1.0)
    assert np.array_equal(inv_depth_from_metric(np.array([[1.0, 2.0], [4.0, 0.0]])).inv_depth_HW, found.inv_depth_HW)


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        ([[1.0, np.nan]], Reason.NOT_FINITE_DEPTH),
        ([[1.0, -2.0]], Reason.BAD_RECORD),
        ([[2.0, 2.0]], Reason.CONSTANT_DEPTH),
        ([[0.0, 0.0]], Reason.CONSTANT_DEPTH),
    ],
)
def test_unusable_recorded_depth_says_why(depth: list[list[float]], reason: Reason) -> None:
    with pytest.raises(DepthError) as error:
        inv_depth_from_metric(np.array(depth))
    assert error.value.reason == reason


def test_rounding_noise_on_a_constant_map_is_not_depth() -> None:
    noise = np.random.default_rng(0).normal(0, 1e-8, (8, 8))
    with pytest.raises(DepthError, match="nothing is closer or farther"):
        scaled_map(0.7 + noise)
