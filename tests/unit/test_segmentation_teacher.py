"""The mask teacher: prompts in image pixels, masks at the image's size, and the shipped one on rooms it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from perceptio.segmentation.teacher import MaskTeacher

SHIPPED = Path(__file__).parents[2] / "perceptio/rooms/zoo/segmenter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam2")
    torch.manual_seed(0)
    config = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    Sam2ImageModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> MaskTeacher:
    return MaskTeacher.from_pretrained(folder)


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_boxes_come_first_then_points_at_the_images_own_size(teacher: MaskTeacher) -> None:
    box, point = (5.0, 5.0, 60.0, 40.0), (59.0, 39.0)
    both = teacher(picture(), [box], [point])
    assert [mask.mask_HW.shape for mask in both] == [(40, 60), (40, 60)]
    assert both[0].mask_HW.dtype == np.bool_
    for mask, alone in zip(both, [*teacher(picture(), [box]), *teacher(picture(), [], [point])], strict=True):
        np.testing.assert_array_equal(mask.mask_HW, alone.mask_HW)
        assert 0 <= mask.predicted_iou <= 1 and 0 <= mask.stability <= 1
    assert teacher(picture(), []) == []


@pytest.mark.parametrize("box", [(5.0, 5.0, 5.0, 9.0), (0.0, 0.0, 61.0, 9.0), (-1.0, 0.0, 9.0, 9.0)])
def test_a_box_that_is_empty_or_outside_is_refused(teacher: MaskTeacher, box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="60 x 40"):
        teacher(picture(), [box])


def test_a_point_outside_is_refused(teacher: MaskTeacher) -> None:
    with pytest.raises(ValueError, match="point"):
        teacher(picture(), [], [(60.0, 3.0)])


def test_stability_is_the_overlap_of_the_masks_at_logits_plus_and_minus_one(teacher: MaskTeacher) -> None:
    logits_MHW = torch.full((2, 32, 32), -5.0)
    logits_MHW[0, :8] = 3.0  # 8 rows above +1, 16 above -1
    logits_MHW[0, 8:16] = 0.5

    def decoded(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_MHW, torch.tensor([0.7, 0.2])

    model = Sam2ImageModel(teacher.model.config)
    model.decode = decoded  # type: ignore[method-assign]
    half, nothing = MaskTeacher(model, digest="", licence="")(picture(32, 32), [(0, 0, 9, 9), (1, 1, 3, 3)])
    assert half.stability == 0.5
    assert half.mask_HW.sum() == 16 * 32
    assert nothing.stability == 0.0 and not nothing.mask_HW.any()


def test_the_digest_names_the_weights_and_the_licence_is_the_cards(folder: Path, tmp_path: Path) -> None:
    model = Sam2ImageModel.from_pretrained(folder)
    assert MaskTeacher.from_pretrained(folder).licence == "unknown"
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    same = MaskTeacher.from_pretrained(tmp_path)
    assert (same.digest, same.licence) == (MaskTeacher.from_pretrained(folder).digest, "apache-2.0")
    with torch.no_grad():
        model.no_mem_embed += 1
    model.save_pretrained(tmp_path)
    assert MaskTeacher.from_pretrained(tmp_path).digest != same.digest


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MaskTeacher.from_pretrained(tmp_path)
