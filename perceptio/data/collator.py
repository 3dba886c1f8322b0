"""Dialogues and their images as one batch of tensors, in the order in which they are given.

Shape legend: B samples (for SAM2: those that have masks), T tokens (right-padded), M masks of all samples, S side of
SAM2's input, H, W height and width: of an image, of the depth target, or of SAM2's mask logits (S / 4).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.data.images import ImageLimits, decode
from perceptio.data.maps import unpack_map
from perceptio.data.masks import rle_to_mask
from perceptio.data.template import Dialogue, LossKind, prompt_ids

Rgb = npt.NDArray[np.uint8]
Preprocess = Callable[[Sequence[Rgb], int], Tensor]
PAD_MULTIPLE = 8
MASK_STRIDE = 4  # SAM2's input pixels per mask logit


@dataclass(frozen=True)
class Item:
    """One sample, decoded: what `collate` needs of it."""

    dialogue: Dialogue
    source: int  # index of its mixture entry
    key: tuple[int, int]  # (seed, position)
    rgb_HW3: Rgb
    masks: tuple[npt.NDArray[np.bool_], ...]  # (H, W) of the image, one for each [SEG], in order
    inv_depth_HW: npt.NDArray[np.float32] | None  # the depth target in [0, 1]; None where there is no depth block


@dataclass(frozen=True)
class Batch:
    """A micro-batch; one whose samples were all left out has a `blank`.

    `loss_kind_BT[b, t]` is the `LossKind` of the target at t, predicted from the inputs before it.
    """

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_kind_BT: Tensor
    pixel_values: Tensor  # the base's tiles of all images, one image after another
    source_B: Tensor  # index of the mixture entry
    seg_sample_M: Tensor  # which sample each [SEG] stands in
    seg_position_M: Tensor  # where in it [SEG] is the input
    seg_image_M: Tensor  # index into `sam2_pixels_B3SS`
    masks_MHW: Tensor  # [M, S/4, S/4], share of each cell that the mask covers
    mask_seeds: tuple[int, ...]  # one per mask, the same on whichever rank it falls
    sam2_pixels_B3SS: Tensor  # of the images that have masks; may be empty
    depth_target_BHW: Tensor  # inv_depth in [0, 1]; 0 where `has_depth_B` is false; [B, 0, 0] where all are
    has_depth_B: Tensor  # whether the sample has a depth block
    sample_ids: tuple[str, ...]
    positions: tuple[int, ...]  # in the mixture
    unread: tuple[tuple[int, str], ...] = ()  # samples that were left out: mixture entry, the row group's name

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
        return Batch(**(fields | moved))


def load_item(sample: Mapping[str, Any], dialogue: Dialogue, *, source: int, key: tuple[int, int]) -> Item:
    """A samples row and its dialogue, decoded: image, the masks that the dialogue speaks of, depth target.

    Raises ValueError where image, masks and depth are not each other's, naming the sample.
    """
    height, width = sample["height"], sample["width"]
    rgb_HW3 = decode(sample["image"], ImageLimits(min_side=1, max_pixels=height * width))
    masks = tuple(rle_to_mask(sample["masks"][index]) for index in dialogue.objects)
    for what, shape in [("image", rgb_HW3.shape[:2]), *(("mask", mask.shape) for mask in masks)]:
        if shape != (height, width):
            raise ValueError(f"sample {sample['id']}: {what} is {shape}, expected {(height, width)}: assemble it again")
    if dialogue.codes and sample["depth_target"] is None:
        raise ValueError(f"sample {sample['id']}: it has codes but no depth_target: assemble its source again")
    inv_depth_HW = _inv_depth(sample["depth_target"]) if dialogue.codes else None
    return Item(dialogue, source, key, rgb_HW3, masks, inv_depth_HW)


def blank(processor: Any, *, key: tuple[int, int]) -> Item:
    """An item without a name that nothing is learnt from: a black image and a prompt, no target, mask or depth.

    Where none of a micro-batch's samples can be read it stands in their place, since all ranks run every part of the
    model equally often.
    """
    size = processor.image_processor.size
    rgb_HW3 = np.zeros((size["height"], size["width"], 3), np.uint8)
    image_tokens = count_image_tokens(processor, *rgb_HW3.shape[:2])
    ids = prompt_ids(processor.tokenizer, "", segmentation="off", depth="off", image_tokens=image_tokens)
    dialogue = Dialogue(
        sample_id="",
        input_ids=tuple(ids),
        target_ids=tuple(ids),
        loss_kinds=(LossKind.IGNORE,) * len(ids),
        image_tokens=image_tokens,
        seg_positions=(),
        objects=(),
        codes=(),
        turns=(),
    )
    return Item(dialogue, 0, key, rgb_HW3, (), None)


def count_image_tokens(processor: Any, height: int, width: int) -> int:
    """Number of token slots that an image of this size fills, over all tiles that the base cuts it into."""
    return int(processor.image_processor.get_number_of_image_patches(height, width)) * int(processor.image_seq_length)


def collate(
    items: Sequence[Item], *, processor: Any, sam2_pixels: Preprocess, sam2_size: int, max_length: int
) -> Batch:
    """The batch of some items. `processor` is the base's; `sam2_pixels(images, S)` gives SAM2's input [B, 3, S, S].

    Raises ValueError for a dialogue longer than `max_length` tokens and for one whose image makes another number of
    image tokens than it has, naming the sample.
    """
    segs = [(b, t) for b, item in enumerate(items) for t in item.dialogue.seg_positions]
    masked = sorted({b for b, _ in segs})
    size = sam2_size // MASK_STRIDE
    ids_BT, target_BT, mask_BT, kind_BT = _padded(items, int(processor.tokenizer.pad_token_id), max_length)
    has_depth_B, target_BHW = _depth(items)
    images = processor.image_processor([item.rgb_HW3 for item in items], return_tensors="pt")
    for item, tiles in zip(items, images["num_patches"], strict=True):
        made, expected = int(tiles) * int(processor.image_seq_length), item.dialogue.image_tokens
        if made != expected:  # else it would take features of the next sample's image
            raise ValueError(
                f"sample {item.dialogue.sample_id}: its image makes {made} image tokens, its dialogue has room for"
                f" {expected}: its width and height are not the image's; assemble its source again"
            )
    return Batch(
        input_ids_BT=ids_BT,
        target_ids_BT=target_BT,
        attention_mask_BT=mask_BT,
        loss_kind_BT=kind_BT,
        pixel_values=images["pixel_values"],
        source_B=_indices([item.source for item in items]),
        seg_sample_M=_indices([b for b, _ in segs]),
        seg_position_M=_indices([t for _, t in segs]),
        seg_image_M=_indices([masked.index(b) for b, _ in segs]),
        masks_MHW=_coverage([mask for item in items for mask in item.masks], size),
        mask_seeds=tuple(_seed(item.key, number) for item in items for number in range(len(item.masks))),
        sam2_pixels_B3SS=(
            sam2_pixels([items[b].rgb_HW3 for b in masked], sam2_size)
            if masked
            else torch.zeros(0, 3, sam2_size, sam2_size)
        ),
        depth_target_BHW=target_BHW,
        has_depth_B=has_depth_B,
        sample_ids=tuple(item.dialogue.sample_id for item in items),
        positions=tuple(item.key[1] for item in items),
    )


def _inv_depth(packed: bytes) -> npt.NDArray[np.float32]:
    return unpack_map(packed).astype(np.float32) / np.float32(65535)


def _padded(items: Sequence[Item], pad: int, max_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input ids, target ids, attention mask, loss kinds [B, T], padded on the right to a multiple of PAD_MULTIPLE."""
    longest = max(items, key=lambda item: len(item.dialogue.input_ids)).dialogue
    if len(longest.input_ids) > max_length:
        raise ValueError(
            f"sample {longest.sample_id}: {len(longest.input_ids)} tokens, expected at most {max_length}: raise "
            "model.max_length, or lower the mixture entry's max_turns"
        )
    shape = (len(items), -(-len(longest.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE)
    ids_BT, target_BT = torch.full(shape, pad), torch.full(shape, pad)
    mask_BT, kind_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for b, item in enumerate(items):
        length = len(item.dialogue.input_ids)
        ids_BT[b, :length] = _indices(item.dialogue.input_ids)
        target_BT[b, :length] = _indices(item.dialogue.target_ids)
        kind_BT[b, :length] = _indices(item.dialogue.loss_kinds)
        mask_BT[b, :length] = 1
    return ids_BT, target_BT, mask_BT, kind_BT


def _depth(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Which samples have a depth block [B], and the depth targets [B, H, W]."""
    found = [item.inv_depth_HW for item in items if item.inv_depth_HW is not None]
    has_depth_B = torch.tensor([item.inv_depth_HW is not None for item in items])
    target_BHW = torch.zeros(len(items), *(found[0].shape if found else (0, 0)))
    if len({target_HW.shape for target_HW in found}) > 1:
        shapes = {item.dialogue.sample_id: item.inv_depth_HW.shape for item in items if item.inv_depth_HW is not None}
        raise ValueError(f"depth targets {shapes}, expected one shape: assemble their sources again")
    if found:
        target_BHW[has_depth_B] = torch.from_numpy(np.stack(found))
    return has_depth_B, target_BHW


def _coverage(masks: Sequence[npt.NDArray[np.bool_]], size: int) -> Tensor:
    """Masks at SAM2's logit resolution [M, S/4, S/4], in [0, 1]; a thin mask becomes faint and never nothing."""
    maps = [torch.from_numpy(mask).float()[None, None] for mask in masks]
    resized = [F.interpolate(m, (size, size), mode="bilinear", antialias=True)[0, 0].clamp(0, 1) for m in maps]
    return torch.stack(resized) if resized else torch.zeros(0, size, size)


def _seed(key: tuple[int, int], number: int) -> int:
    digest = hashlib.blake2b(f"{key[0]} {key[1]} mask {number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
