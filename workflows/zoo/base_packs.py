"""Packs: one image and several turns of chat about it in one sequence, labels on the answers alone.

In most packs a turn sees the image and itself but no other turn: else what one question names would answer the next
("Where is the red chair?", "What colour is the chair?"), and the image would not need to be looked at.

Shape legend: B packs; T tokens, padded on the right; H, W pixels; G cells of the image grid.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import InternVLProcessor

from perceptio.rooms.points import draw_points
from perceptio.rooms.questions import FORMS
from workflows.zoo.base_rooms import PATCHES, SIDE, Points, TaughtRoom, Turn, lettered, mirrored

LENGTH = 320  # most tokens of a pack
CHAT_SHARE = 0.2  # packs that are one chat; in all others each turn sees the image and itself alone
POINTS_SHARE = 0.35  # chance that a pack shows the points drawn in and opens with their question
FORM_SHARE, WHERE = 0.7, "Where is {}?"
# How likely the next turn is of a kind; a kind that a room has no (more) turns of leaves its share to the others.
KIND_SHARES = {
    "name": 0.15,  # a box of what is named by kind, colour and size; "box" are all others
    "box": 0.15,
    "attribute": 0.13,
    "count": 0.17,
    "yes_no": 0.2,
    "distance": 0.1,
    "choice": 0.08,
    "grid": 0.02,
}
# Parts of the time, and what is asked in them: one new thing at a time is learnt far sooner than all at once.
LESSONS: tuple[tuple[float, dict[str, float]], ...] = (
    (0.2, {"name": 0.5, "attribute": 0.5}),
    (0.2, {"count": 0.5, "name": 0.25, "box": 0.1, "attribute": 0.15}),
    (0.2, {"yes_no": 0.5, "count": 0.15, "name": 0.15, "box": 0.1, "attribute": 0.1}),
    (0.4, KIND_SHARES),
)
_ENDS = tuple(itertools.accumulate(part for part, _ in LESSONS))
BOXES = ("name", "box")
ANSWERED = (*KIND_SHARES, "points")
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    kind_BT: torch.Tensor  # index in ANSWERED of the question that a token answers
    share_BT: torch.Tensor  # of its answer that a token is: one over the answer's length
    positions_BT: torch.Tensor
    sees_B1TT: torch.Tensor  # which positions (last axis) each position may attend to
    pixel_B3HW: torch.Tensor
    token_BG9: torch.Tensor  # what each image token shows, and each patch; see base_rooms
    patch_BP9: torch.Tensor
    letter_BG2: torch.Tensor
    aim_pack_A: torch.Tensor  # which pack, and which token of it, knows where to look
    aim_token_A: torch.Tensor
    aim_AP: torch.Tensor  # the patches there


@dataclass
class Pack:
    """One sequence: what all turns share (turn 0), then the turns."""

    ids: list[int]
    labels: list[int]
    kinds: list[int]
    shares: list[float]
    positions: list[int]
    turns: list[int]  # which turn each token belongs to
    aims: list[tuple[int, npt.NDArray[np.bool_]]]  # a token, and the patches that show what the answer is read from

    def add(self, asked: list[int], said: list[int], turn: int, position: int, kind: int = 0) -> None:
        new = asked + said
        self.ids += new
        self.labels += [IGNORED] * len(asked) + said
        self.kinds += [kind] * len(new)
        self.shares += [0.0] * len(asked) + [1 / len(said) for _ in said]
        self.positions += range(position, position + len(new))
        self.turns += [turn] * len(new)


class Packer:
    """Draws rooms, pass after pass in a new order, and packs their questions."""

    def __init__(self, processor: InternVLProcessor, rooms: list[TaughtRoom], rng: np.random.Generator) -> None:
        self.processor, self.rooms, self.rng = processor, rooms, rng
        self.order: list[int] = []
        self.tokens: dict[str, list[int]] = {}
        self.shares = KIND_SHARES
        self.image_text = processor.replace_image_token({"num_patches": [1]}, 0)

    def batch(self, packs: int) -> Batch:
        """The next `packs` packs."""
        rooms = [self._next_room() for _ in range(packs)]
        images, letters, drawn = zip(*[self._drawn(room) for room in rooms], strict=True)
        longest = max(len(pack.ids) for pack in drawn)
        pad = self.processor.tokenizer.pad_token_id
        turns_BT = _padded([p.turns for p in drawn], longest, -1)
        same_BTT = (turns_BT[:, :, None] == turns_BT[:, None]) | (turns_BT[:, None] == 0)
        return Batch(
            _padded([p.ids for p in drawn], longest, pad),
            _padded([p.labels for p in drawn], longest, IGNORED),
            _padded([p.kinds for p in drawn], longest, 0),
            _padded([p.shares for p in drawn], longest, 0.0),
            _padded([p.positions for p in drawn], longest, 0),
            (same_BTT & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None],
            pixels(list(images), self.processor),
            torch.from_numpy(np.stack([room.token_G9 for room in rooms])),
            torch.from_numpy(np.stack([room.patch_P9 for room in rooms])),
            torch.from_numpy(np.stack(letters)),
            torch.tensor([b for b, pack in enumerate(drawn) for _ in pack.aims], dtype=torch.long),
            torch.tensor([t for pack in drawn for t, _ in pack.aims], dtype=torch.long),
            torch.from_numpy(np.array([patches for p in drawn for _, patches in p.aims]).reshape(-1, PATCHES**2)),
        )

    def looks(self, count: int) -> Batch:
        """The next `count` images without questions: with points drawn in, mirrored, or as they are."""
        rooms = [self._next_room() for _ in range(count)]
        images, letters, cells = [], [], []
        for room in rooms:
            image, letter, _ = self._with_points(room)
            cell = (room.token_G9, room.patch_P9)
            if not letter.any() and self.rng.random() < 0.5:
                image, cell = image[:, ::-1], (mirrored(cell[0]), mirrored(cell[1]))
            images.append(image)
            letters.append(letter)
            cells.append(cell)
        token_BG9, patch_BP9 = (torch.from_numpy(np.stack(grids)) for grids in zip(*cells, strict=True))
        none = torch.zeros(count, 0).long()
        pixel_B3HW, letter_BG2 = pixels(images, self.processor), torch.from_numpy(np.stack(letters))
        return Batch(none, none, none, none, none, none, pixel_B3HW, token_BG9, patch_BP9, letter_BG2, none, none, none)

    def _next_room(self) -> TaughtRoom:
        if not self.order:
            self.order = self.rng.permutation(len(self.rooms)).tolist()
        return self.rooms[self.order.pop()]

    def _with_points(self, room: TaughtRoom) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], list[Points]]:
        """The room's image, now and then with points drawn in, what `lettered` says of them, and these points."""
        image_HW3 = np.asarray(Image.open(io.BytesIO(room.image)).convert("RGB"))
        if self.shares is not KIND_SHARES or not room.points or self.rng.random() >= POINTS_SHARE:
            return image_HW3, np.zeros((len(room.token_G9), 2), np.float32), []
        points = room.points[self.rng.integers(len(room.points))]
        return draw_points(image_HW3, points.xy), lettered(points), [points]

    def _drawn(self, room: TaughtRoom) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], Pack]:
        """The image, its letters and the tokens of one pack."""
        image_HW3, letter_G2, drawn = self._with_points(room)
        pack, chat = Pack([], [], [], [], [], [], []), self.rng.random() < CHAT_SHARE
        pack.add(self._encode(f"<|im_start|>user\n{self.image_text}\n"), [], 0, 0)
        shared = len(pack.ids)
        aims = [(points.turn, _around(points.closest)) for points in drawn]
        others = ((turn, np.isin(room.patch_P9[:, 8] - 1, turn.about)) for turn in self._turns(room))
        for n, (turn, patches_P) in enumerate(itertools.chain(aims, others)):
            opening = "\n<|im_start|>user\n" if chat and n else ""
            asked = self._encode(f"{opening}{turn.prompt}<|im_end|>\n<|im_start|>assistant\n")
            said = self._encode(f"{turn.answer}<|im_end|>")
            if len(pack.ids) + len(asked) + len(said) > LENGTH:
                break
            if turn.kind != "grid":  # a box's opening token is where [SEG] will stand
                pack.aims.append((len(pack.ids) + len(asked) - (turn.kind != "box"), patches_P))
            turn_number, position = (0, len(pack.ids)) if chat else (1 + n, shared)
            pack.add(asked, said, turn_number, position, ANSWERED.index(turn.kind))
        return image_HW3, letter_G2, pack

    def _turns(self, room: TaughtRoom) -> Iterator[Turn]:
        """The turns of a room in random order, kinds by `shares`."""
        left = {
            kind: self.rng.permutation(len(room.turns[kind])).tolist() for kind in self.shares if kind in room.turns
        }
        while left:
            shares = np.array([self.shares[kind] for kind in left])
            kind = list(left)[self.rng.choice(len(left), p=shares / shares.sum())]
            yield self._rephrased(room.turns[kind][left[kind].pop()])
            if not left[kind]:
                del left[kind]

    def _rephrased(self, turn: Turn) -> Turn:
        """A turn; a box question most often in one of the forms in which a mask will be asked for later."""
        if turn.kind not in BOXES:
            return turn
        form = FORMS[self.rng.integers(len(FORMS))] if self.rng.random() < FORM_SHARE else WHERE
        return turn._replace(prompt=form.format(turn.prompt.removeprefix("Where is ").removesuffix("?")))

    def _encode(self, text: str) -> list[int]:
        if text not in self.tokens:
            self.tokens[text] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return self.tokens[text]


def lesson(passed: float) -> dict[str, float]:
    """The shares at a time of learning, of which `passed` is over; from 0 to 1."""
    return next((shares for end, (_, shares) in zip(_ENDS, LESSONS, strict=True) if passed < end), KIND_SHARES)


def _around(xy: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """[P]: the patches less than one and a half away from the one at a pixel."""
    row_P, column_P = np.divmod(np.arange(PATCHES**2), PATCHES)
    x, y = (v * PATCHES // SIDE for v in xy)
    return np.asarray((abs(row_P - y) < 2) & (abs(column_P - x) < 2))


def _padded(rows: Sequence[Sequence[float]], length: int, pad: float) -> torch.Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def pixels(images: list[npt.NDArray[np.uint8]], processor: InternVLProcessor) -> torch.Tensor:
    """Images of the model's own size, scaled as its image processor scales them: [B, 3, H, W]."""
    scale = processor.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (scale.image_mean, scale.image_std))
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std
