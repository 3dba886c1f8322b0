"""Packs: one image and several turns of chat about it in one sequence, labels on the answers alone.

Shape legend: B packs; T tokens, padded on the right; H, W pixels; G cells of the image grid.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import InternVLProcessor

from perceptio.rooms.questions import FORMS
from workflows.zoo.base_rooms import TaughtRoom, Turn, mirrored

LENGTH = 320  # most tokens of a pack
BOX_SHARE = 0.6  # chance that the next turn is a box question
POINTS_SHARE = 0.35  # chance that a pack shows the points drawn in and opens with their question
FORM_SHARE, WHERE = 0.7, "Where is {}?"
GRID_SHARE = 0.3  # chance that a pack may ask for the depth grid, whose answer is longer than all others
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    pixel_B3HW: torch.Tensor
    token_BG7: torch.Tensor  # what each image token shows, and each patch; see base_rooms
    patch_BP7: torch.Tensor


class Packer:
    """Draws rooms, pass after pass in a new order, and packs their questions."""

    def __init__(self, processor: InternVLProcessor, rooms: list[TaughtRoom], rng: np.random.Generator) -> None:
        self.processor, self.rooms, self.rng = processor, rooms, rng
        self.order: list[int] = []
        self.tokens: dict[str, list[int]] = {}
        self.image_text = processor.replace_image_token({"num_patches": [1]}, 0)

    def batch(self, packs: int) -> Batch:
        """The next `packs` packs."""
        rooms = [self._next_room() for _ in range(packs)]
        drawn = [self._pack(room) for room in rooms]
        longest = max(len(ids) for _, ids, _ in drawn)
        pad = self.processor.tokenizer.pad_token_id
        ids = [ids + [pad] * (longest - len(ids)) for _, ids, _ in drawn]
        labels = [labels + [IGNORED] * (longest - len(labels)) for _, _, labels in drawn]
        return Batch(
            torch.tensor(ids),
            torch.tensor(labels),
            pixels([image for image, _, _ in drawn], self.processor),
            torch.from_numpy(np.stack([room.token_G7 for room in rooms])),
            torch.from_numpy(np.stack([room.patch_P7 for room in rooms])),
        )

    def looks(self, count: int) -> Batch:
        """The next `count` images without questions, half of them mirrored."""
        rooms = [self._next_room() for _ in range(count)]
        images = [np.asarray(Image.open(io.BytesIO(room.image)).convert("RGB")) for room in rooms]
        cells = [(room.token_G7, room.patch_P7) for room in rooms]
        for i in np.flatnonzero(self.rng.random(count) < 0.5):
            images[i], cells[i] = images[i][:, ::-1], (mirrored(cells[i][0]), mirrored(cells[i][1]))
        token_BG7, patch_BP7 = (torch.from_numpy(np.stack(grids)) for grids in zip(*cells, strict=True))
        none = torch.zeros(count, 0).long()
        return Batch(none, none, pixels(images, self.processor), token_BG7, patch_BP7)

    def _next_room(self) -> TaughtRoom:
        if not self.order:
            self.order = self.rng.permutation(len(self.rooms)).tolist()
        return self.rooms[self.order.pop()]

    def _pack(self, room: TaughtRoom) -> tuple[npt.NDArray[np.uint8], list[int], list[int]]:
        """The image, token ids and labels of one pack."""
        image, turns = room.image, self._turns(room)
        if room.points and self.rng.random() < POINTS_SHARE:
            image, turn = room.points[self.rng.integers(len(room.points))]
            turns.insert(0, turn)
        ids: list[int] = []
        labels: list[int] = []
        for n, (_, prompt, answer) in enumerate(turns):
            opening = self.image_text + "\n" if n == 0 else ""
            asked = self._encode(f"<|im_start|>user\n{opening}{prompt}<|im_end|>\n<|im_start|>assistant\n")
            said, closing = self._encode(f"{answer}<|im_end|>"), self._encode("\n")
            if len(ids) + len(asked) + len(said) + len(closing) > LENGTH:
                break
            ids += asked + said + closing
            labels += [IGNORED] * len(asked) + said + [IGNORED] * len(closing)
        return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")), ids, labels

    def _turns(self, room: TaughtRoom) -> list[Turn]:
        """All turns of a room, boxes and others mixed, in random order."""
        boxes = [self._rephrased(room.boxes[i]) for i in self.rng.permutation(len(room.boxes))]
        with_grid = self.rng.random() < GRID_SHARE
        others = [
            room.turns[i] for i in self.rng.permutation(len(room.turns)) if with_grid or room.turns[i][0] != "grid"
        ]
        mixed = []
        while boxes or others:
            source = boxes if boxes and (not others or self.rng.random() < BOX_SHARE) else others
            mixed.append(source.pop())
        return mixed

    def _rephrased(self, turn: Turn) -> Turn:
        """A box question, most often in one of the forms in which a mask will be asked for later."""
        kind, prompt, answer = turn
        form = FORMS[self.rng.integers(len(FORMS))] if self.rng.random() < FORM_SHARE else WHERE
        return kind, form.format(prompt.removeprefix("Where is ").removesuffix("?")), answer

    def _encode(self, text: str) -> list[int]:
        if text not in self.tokens:
            self.tokens[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self.tokens[text]


def pixels(images: list[npt.NDArray[np.uint8]], processor: InternVLProcessor) -> torch.Tensor:
    """Images of the model's own size, scaled as its image processor scales them: [B, 3, H, W]."""
    scale = processor.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (scale.image_mean, scale.image_std))
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std
