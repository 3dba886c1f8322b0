"""What the small base model is taught with and does not keep: exact image tokens, and heads that read its states.

Shape legend: B packs; G cells of the image grid; P patches; A answers; D width of the text model; S cells that show an
object; K kinds; C colours; L letters; N numbers, or the knots between which a value is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLForConditionalGeneration, InternVLProcessor

from perceptio.rooms.furniture import COLORS, KINDS
from perceptio.rooms.points import LETTERS
from workflows.zoo.base_packs import Batch
from workflows.zoo.base_rooms import EMPTY, GRID, PATCHES, SIDE

AIM_BCE = 5.0
KNOTS, EXACT_STD = 17, 0.2


@dataclass(frozen=True)
class Sight:
    """What the model sees of a batch: projected image tokens as the text model gets them, and the patches' states."""

    token_BGD: torch.Tensor
    patch_BPE: torch.Tensor


class ExactTokens(nn.Module):
    """Image tokens made from what the cells show instead of from pixels; dropped after training.

    The text model learns to answer from these first, and the vision tower then learns to make them of pixels: both are
    quickly learnt, where answering from tokens that do not yet show anything is not. Kind, colour and letter are the
    text model's own words, each group turned by a matrix of its own that starts as none, so that one lesson holds for
    all of a group.
    Coordinates and inv_depth are interpolated between few vectors, so that a doubtful one is close to its neighbours.
    """

    def __init__(self, model: InternVLForConditionalGeneration, processor: InternVLProcessor) -> None:
        super().__init__()
        self.words = model.get_input_embeddings()
        width = self.words.get_parameter("weight").shape[1]
        kinds, colors, letters = [f" {w}" for w in KINDS], [f" {w}" for w in COLORS], list(LETTERS)
        self.ids = [_word_ids(processor, words) for words in (kinds, colors, letters)]
        self.turn_3DD = nn.Parameter(torch.eye(width).repeat(len(self.ids), 1, 1))
        self.none_3D = nn.Parameter(torch.zeros(3, width))
        self.mark, self.place = nn.Embedding(2, width), nn.Embedding(GRID * GRID, width)
        self.between_6ND = nn.Parameter(torch.zeros(6, KNOTS, width))  # four coordinates, inv_depth, that of a point
        for table in (self.none_3D, self.mark.weight, self.place.weight, self.between_6ND):
            nn.init.normal_(table, std=EXACT_STD)

    def forward(self, token_BG9: torch.Tensor, letter_BG2: torch.Tensor) -> torch.Tensor:
        """[B, G, D]."""
        named_BG3 = torch.cat([token_BG9[..., :2], letter_BG2[..., :1]], -1).long()
        seen_BG, lettered_BG = named_BG3[..., 0] != EMPTY, named_BG3[..., 2] != EMPTY
        value_BG6 = torch.cat([token_BG9[..., 2:7], letter_BG2[..., 1:]], -1)
        said_BG6 = torch.stack([*[seen_BG] * 4, torch.ones_like(seen_BG), lettered_BG], -1)
        tokens: torch.Tensor = (
            self.mark(token_BG9[..., 7].long())
            + self.place.weight
            + torch.einsum("bgin,ind->bgd", _knots(value_BG6) * said_BG6[..., None], self.between_6ND)
        )
        for i, ids in enumerate(self.ids):
            table = torch.cat([self.none_3D[i : i + 1], F.normalize(self.words(ids), dim=-1) * 4 @ self.turn_3DD[i]])
            tokens = tokens + F.embedding(named_BG3[..., i], table)
        return tokens


def _knots(value: torch.Tensor) -> torch.Tensor:
    """[..., KNOTS]: how much of each of KNOTS equidistant vectors a value in [0, 1] takes, of its two neighbours."""
    at = value.clamp(0, 1)[..., None] * (KNOTS - 1)
    return (1 - (at - torch.arange(KNOTS)).abs()).clamp(min=0)


class CellHead(nn.Module):
    """Reads what each patch and each image token shows; dropped after training.

    Patches: kind, colour and inv_depth, by linear layers. Image tokens: kind, colour, a point's letter and the box's
    four coordinates by likeness to the text model's own token embeddings, so that image tokens and words come to share
    one space; and whether the token stands for its object, so that objects can be counted.
    """

    def __init__(self, model: InternVLForConditionalGeneration, processor: InternVLProcessor) -> None:
        super().__init__()
        self.words = model.get_input_embeddings()
        width = self.words.get_parameter("weight").shape[1]
        patch_width = model.model.vision_tower.config.hidden_size
        self.read = nn.Linear(width, 7 * width)
        self.empty_3D = nn.Parameter(torch.zeros(3, width))
        self.inv_depth = nn.Linear(width, 2)
        self.mark = nn.Linear(width, 1)
        self.patch = nn.Linear(patch_width, 1 + len(KINDS) + 1 + len(COLORS) + 1)
        self.kind_ids, self.color_ids = (_word_ids(processor, [f" {w}" for w in words]) for words in (KINDS, COLORS))
        self.letter_ids = _word_ids(processor, list(LETTERS))
        self.number_ids = _word_ids(processor, [str(n) for n in range(100)])

    def loss(self, sight: Sight, batch: Batch) -> torch.Tensor:
        """[6]: cross-entropies of kind and colour (tokens and patches), of the tokens' corners, the error in inv_depth,
        and the cross-entropies of letters and of what stands for an object."""
        kind_BGD, color_BGD, letter_BGD, *corner_4BGD = self.read(sight.token_BGD).chunk(7, -1)
        kinds_KD, colors_CD, letters_LD = (
            torch.cat([self.empty_3D[i : i + 1], self.words(ids)])
            for i, ids in enumerate((self.kind_ids, self.color_ids, self.letter_ids))
        )
        seen_BG, lettered_BG = batch.token_BG9[..., 0] != EMPTY, batch.letter_BG2[..., 0] != EMPTY
        hundredths_S4 = hundredths(batch.token_BG9[..., 2:6][seen_BG])
        corner_S4D = torch.stack([corner_BGD[seen_BG] for corner_BGD in corner_4BGD], 1)
        corner_S4N = (corner_S4D @ self.words(self.number_ids).T).float()
        patch_kind, patch_color, patch_depth = self.patch(sight.patch_BPE).split([len(kinds_KD), len(colors_CD), 1], -1)
        inv_depth_BG2 = self.inv_depth(sight.token_BGD).float()
        at_points = F.smooth_l1_loss(
            inv_depth_BG2[..., 1][lettered_BG], batch.letter_BG2[..., 1][lettered_BG], beta=0.05
        )
        mark_BG = self.mark(sight.token_BGD)[..., 0].float()
        return torch.stack(
            [
                _names(kind_BGD @ kinds_KD.T, batch.token_BG9[..., 0]) + _names(patch_kind, batch.patch_BP9[..., 0]),
                _names(color_BGD @ colors_CD.T, batch.token_BG9[..., 1]) + _names(patch_color, batch.patch_BP9[..., 1]),
                F.cross_entropy(corner_S4N.flatten(0, 1), hundredths_S4.flatten()),
                5 * _error(inv_depth_BG2[..., :1], batch.token_BG9)
                + 5 * _error(patch_depth, batch.patch_BP9)
                + (at_points if lettered_BG.any() else 0),
                2 * _names(letter_BGD @ letters_LD.T, batch.letter_BG2[..., 0]),
                2 * F.binary_cross_entropy_with_logits(mark_BG, batch.token_BG9[..., 7]),
            ]
        )


class AimHead(nn.Module):
    """Reads off the state before an answer which patches show what it is read from; dropped after training.

    Where to look is a richer lesson than one word of an answer, and comes first. For a box it is read behind the
    opening token: that is where [SEG] will start.
    """

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.read = nn.Linear(model.get_input_embeddings().get_parameter("weight").shape[1], PATCHES * PATCHES)

    def loss(self, states_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[]: cross-entropy (times AIM_BCE) and Dice loss of the patches, mean over all answers."""
        logits_AP = self.read(states_BTD[batch.aim_pack_A, batch.aim_token_A]).float()
        target_AP, chance_AP = batch.aim_AP.float(), logits_AP.sigmoid()
        dice_A = 1 - (2 * (chance_AP * target_AP).sum(1) + 1) / (chance_AP.sum(1) + target_AP.sum(1) + 1)
        loss: torch.Tensor = AIM_BCE * F.binary_cross_entropy_with_logits(logits_AP, target_AP) + dice_A.mean()
        return loss


def hundredths(box_4: torch.Tensor) -> torch.Tensor:
    """Corners in [0, 1] as box answers write them; any leading shape."""
    last_pixel = torch.tensor([0, 0, 1, 1])
    return (box_4 * SIDE - last_pixel).round().long() * 100 // SIDE


def _names(logits_BGK: torch.Tensor, target_BG: torch.Tensor) -> torch.Tensor:
    return 0.5 * F.cross_entropy(logits_BGK.float().flatten(0, 1), target_BG.long().flatten())


def _error(inv_depth_BG1: torch.Tensor, target_BG8: torch.Tensor) -> torch.Tensor:
    return 0.5 * F.smooth_l1_loss(inv_depth_BG1.float(), target_BG8[..., 6:7], beta=0.05)


def _word_ids(processor: InternVLProcessor, words: list[str]) -> torch.Tensor:
    """The ids of words that must be one token each."""
    ids = [processor.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    for word, found in zip(words, ids, strict=True):
        if len(found) != 1:
            raise ValueError(f"tokenizer: {word!r} became {len(found)} tokens, expected 1: learn it from more rooms")
    return torch.tensor([found[0] for found in ids])
