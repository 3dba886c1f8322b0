"""Batches: every tensor lines up with its sample, and nothing depends on who stands beside it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessor

from perceptio.data.collator import Batch, Item, collate, count_image_tokens, load_item
from perceptio.data.maps import pack_map
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import Dialogue, LossKind

SIDE, SAM2, MASK = 16, 32, 8
PROCESSOR = SimpleNamespace(
    tokenizer=SimpleNamespace(pad_token_id=99),
    image_processor=GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=False),
    image_seq_length=4,
)


def squares(images: Sequence[npt.NDArray[np.uint8]], size: int) -> torch.Tensor:
    """Stands for SAM2's preprocessing: every pixel is the image's mean."""
    return torch.stack([torch.full((3, size, size), float(image.mean())) for image in images])


def sample(name: str, *, shade: int = 100, height: int = 20, width: int = 24) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (shade,) * 3).save(stream, "PNG")
    masks = np.zeros((2, height, width), bool)
    masks[0, :, : width // 2] = True
    masks[1, 3, 5] = True
    depth = np.full((6, 6), 32768, np.uint16)
    return {
        "id": name, "image": stream.getvalue(), "width": width, "height": height, "masks": masks_to_rle(masks),
        "codes": [1, 2], "depth_target": pack_map(depth),
    }  # fmt: skip


def dialogue(name: str, *, objects: tuple[int, ...] = (), codes: tuple[int, ...] = (), words: int = 3) -> Dialogue:
    ids = [10, 11, *[50] * len(objects), *([60, *[61] * len(codes), 62] if codes else []), *[12] * words]
    kinds = [0, 0, *[1] * len(objects), *([2, *[3] * len(codes), 2] if codes else []), *[1] * words]
    return Dialogue(
        sample_id=name,
        input_ids=tuple(ids),
        target_ids=tuple(ids[:2] + [id_ + 1 for id_ in ids[2:]]),
        loss_kinds=tuple(map(LossKind, kinds)),
        image_tokens=4,
        seg_positions=tuple(range(2, 2 + len(objects))),
        objects=objects,
        codes=codes,
        turns=(0,),
    )


def item(name: str, position: int, *, shade: int = 100, source: int = 0, **parts: Any) -> Item:
    return load_item(sample(name, shade=shade), dialogue(name, **parts), source=source, key=(7, position))


def batch(*items: Item, max_length: int = 64) -> Batch:
    return collate(items, processor=PROCESSOR, sam2_pixels=squares, sam2_size=SAM2, max_length=max_length)


def three() -> tuple[Item, Item, Item]:
    return (
        item("plain", 0, words=9, source=2),
        item("both", 1, shade=50, objects=(1, 0), codes=(1, 2), source=1),
        item("one", 2, shade=200, objects=(0,)),
    )


def test_rows_are_padded_on_the_right_to_a_multiple_of_eight() -> None:
    found = batch(*three())
    assert found.input_ids_BT.shape == (3, 16)
    assert found.attention_mask_BT.sum(1).tolist() == [11, 11, 6]
    assert found.input_ids_BT[2].tolist() == [10, 11, 50, 12, 12, 12] + [99] * 10
    assert found.target_ids_BT[2].tolist() == [10, 11, 51, 13, 13, 13] + [99] * 10
    assert found.loss_kind_BT[1, :11].tolist() == [0, 0, 1, 1, 2, 3, 3, 2, 1, 1, 1]
    assert not found.loss_kind_BT[found.attention_mask_BT == 0].any()


def test_each_seg_points_at_its_sample_position_image_and_mask() -> None:
    found = batch(*three())
    assert found.seg_sample_M.tolist() == [1, 1, 2]
    assert found.input_ids_BT[found.seg_sample_M, found.seg_position_M].tolist() == [50, 50, 50]
    assert found.seg_image_M.tolist() == [0, 0, 1]
    assert found.sam2_pixels_B3SS[:, 0, 0, 0].tolist() == [50, 200]
    dot, half, other_half = found.masks_MHW
    assert half.shape == (MASK, MASK)
    assert torch.equal(half, other_half)
    assert half.mean().item() == pytest.approx(0.5, abs=0.01)
    assert half[:, 0].min() > 0.999
    assert half[:, -1].max() < 0.001
    assert 0 < dot.sum() < 1  # a single pixel covers a part of a cell, and is not lost


def test_depth_stands_with_its_sample() -> None:
    found = batch(*three())
    assert found.has_depth_B.tolist() == [False, True, False]
    assert found.depth_target_BHW.shape == (3, 6, 6)
    assert found.depth_target_BHW[1].unique().tolist() == pytest.approx([32768 / 65535])
    assert not found.depth_target_BHW[[0, 2]].any()


def test_names_and_sources_follow_the_order_of_the_items() -> None:
    found = batch(*reversed(three()))
    assert found.sample_ids == ("one", "both", "plain")
    assert found.positions == (2, 1, 0)
    assert found.source_B.tolist() == [0, 1, 2]
    assert found.pixel_values.shape == (3, 3, SIDE, SIDE)
    assert found.pixel_values[:, 0, 0, 0].argsort().tolist() == [1, 2, 0]


def test_a_batch_without_masks_and_depth_has_empty_tensors() -> None:
    found = batch(item("plain", 0))
    assert found.masks_MHW.shape == (0, MASK, MASK)
    assert found.sam2_pixels_B3SS.shape == (0, 3, SAM2, SAM2)
    assert found.seg_sample_M.shape == found.seg_position_M.shape == (0,)
    assert found.depth_target_BHW.shape == (1, 0, 0)
    assert found.mask_seeds == ()


def test_seeds_of_masks_do_not_depend_on_the_neighbours() -> None:
    _, both, one = three()
    together = batch(both, one).mask_seeds
    assert together == (*batch(both).mask_seeds, *batch(one).mask_seeds)
    assert len(set(together)) == 3


def test_to_moves_every_tensor() -> None:
    found = batch(*three()).to("meta")
    assert found.input_ids_BT.device.type == found.masks_MHW.device.type == "meta"
    assert found.sample_ids == ("plain", "both", "one")


def test_image_tokens_count_every_tile() -> None:
    tiling = GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    processor = SimpleNamespace(image_processor=tiling, image_seq_length=4)
    image = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    tiles = len(tiling([image], return_tensors="pt")["pixel_values"])
    assert count_image_tokens(processor, SIDE, 2 * SIDE) == 4 * tiles > 4
    assert count_image_tokens(PROCESSOR, SIDE, 2 * SIDE) == 4


def test_a_dialogue_that_is_too_long_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sample plain: 11 tokens, expected at most 10"):
        batch(*three()[::2], max_length=10)


def test_room_for_another_number_of_image_tokens_is_refused_where_a_neighbour_makes_up_for_it() -> None:
    items = list(three())
    for at, change in ((0, 1), (2, -1)):
        other = dataclasses.replace(items[at].dialogue, image_tokens=items[at].dialogue.image_tokens + change)
        items[at] = dataclasses.replace(items[at], dialogue=other)
    with pytest.raises(ValueError, match="sample plain: its image makes 4 image tokens, its dialogue has room for 5"):
        batch(*items)


def test_parts_that_are_not_each_others_are_refused_by_name() -> None:
    wide = sample("a") | {"masks": sample("b", width=30)["masks"]}
    with pytest.raises(ValueError, match=r"sample a: mask is \(20, 30\), expected \(20, 24\)"):
        load_item(wide, dialogue("a", objects=(0,)), source=0, key=(0, 0))
    small = sample("a") | {"image": sample("b", width=10)["image"]}
    with pytest.raises(ValueError, match=r"sample a: image is \(20, 10\), expected \(20, 24\)"):
        load_item(small, dialogue("a"), source=0, key=(0, 0))
    with pytest.raises(ValueError, match="sample a: it has codes but no depth_target"):
        load_item(sample("a") | {"depth_target": None}, dialogue("a", codes=(1,)), source=0, key=(0, 0))
