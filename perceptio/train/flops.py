"""How many floating-point operations a training step of the model needs, for the share of a device's peak that it uses.

Counted are multiplications and additions of matrix products and convolutions, 2 for each weight that an input meets,
as torch's own counter has them. In the backward pass autograd decides, as it does in training: a trained weight costs
as much again for its gradient and as much for its input's (6 N T of N weights and T tokens in all), a frozen one
through which a gradient flows 4 N T, and a frozen one below all that trains, as an untrained vision tower, 2 N T.
Attention is every token of a sample by every token of it: 4 T^2 D a layer forward, three times that with the backward
pass, without a discount for its causal half.

What the model needs is counted, not what is done: padding, samples packed beside each other, blank images on ranks
without any, and activations that `train.recompute` computes again are none of it. Left out are norms, softmax and what
else is linear in the activations, and the optimizer.

Legend: N weights, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from sam2.modeling.position_encoding import PositionEmbeddingSine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perceptio.data.collator import Batch
from perceptio.data.template import LossKind
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.segmentation.sam2_image import Sam2Features

LENGTHS = (64, 128)  # tokens, of which a length's cost is found: a T + b T^2


@dataclass(frozen=True)
class Work:
    """What the parts of the model have to do in a step, over all ranks."""

    tokens: int = 0  # image tokens among them, padding not
    squares: int = 0  # of each sample's tokens, added up
    supervised: int = 0  # positions that reach the output head
    image_tokens: int = 0
    images: int = 0  # that SAM2 reads: of samples with masks
    masks: int = 0
    depth_maps: int = 0  # depth blocks, which are decoded softly

    @classmethod
    def of(cls, batches: Sequence[Batch], image_token_id: int) -> Work:
        """That of some micro-batches."""
        found = cls()
        for batch in batches:
            lengths_B = batch.attention_mask_BT.sum(1)
            found += cls(
                int(lengths_B.sum()),
                int((lengths_B**2).sum()),
                int((batch.loss_kind_BT != LossKind.IGNORE).sum()),
                int((batch.input_ids_BT == image_token_id).sum()),
                len(set(batch.seg_sample_M.tolist())),
                len(batch.seg_sample_M),
                int(batch.has_depth_B.sum()),
            )
        return found

    def counts(self) -> Tensor:
        """Its numbers in their order, to be added up over ranks: [7], int64."""
        return torch.tensor(astuple(self))

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one unit of `Work`, forward and backward."""

    token: float
    square: float
    supervised: float
    image_token: float
    image: float
    mask: float
    depth_map: float

    def of(self, work: Work) -> float:
        """Those of a step."""
        return math.fsum(each * count for each, count in zip(astuple(self), astuple(work), strict=True))


def model_flops(model: PerceptioForConditionalGeneration, *, soft_maps: bool) -> ModelFlops:
    """What each unit of work costs this model, with the parts that are set to train.

    Found on a copy without numbers, on torch's meta device: before DeepSpeed cuts weights, and before activations are
    set to be computed again. `soft_maps` says whether depth blocks are decoded for the loss. Raises ValueError for a
    model without a codec.
    """
    if model.codec is None:
        raise ValueError("the model has no codec: attach_codec() before training")
    config: Any = model.config
    codec, bare = model.codec, _without_numbers(model)
    width, side = int(config.get_text_config().hidden_size), int(bare.segmenter.sam2.config.image_size)
    tile = config.vision_config.image_size
    rows, columns = (tile, tile) if isinstance(tile, int) else tile
    embedded = _trains(bare.model.vision_tower, bare.model.multi_modal_projector, bare.get_input_embeddings())
    reached = embedded or _trains(bare.model.language_model)  # whether states behind the language model have gradients

    def empty(*shape: int, gradient: bool = False) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=model.dtype, requires_grad=gradient)

    def read(tokens: int) -> Tensor:
        states = bare.model.language_model(
            inputs_embeds=empty(1, tokens, width, gradient=embedded),
            attention_mask=torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta"),  # given whole, as packed
            use_cache=False,
        )
        return torch.as_tensor(states.last_hidden_state)

    def drawn() -> Tensor:
        found = bare.segmenter(empty(1, width, gradient=reached), features, torch.zeros(1, dtype=torch.long))
        return torch.as_tensor(found.logits_MHW)

    short, long = (_counted(partial(read, tokens)) for tokens in LENGTHS)
    square = (long / LENGTHS[1] - short / LENGTHS[0]) / (LENGTHS[1] - LENGTHS[0])
    pixels, tiles = empty(1, 3, side, side), empty(1, 3, rows, columns)
    features = _cut_off(bare.image_features(pixels))
    logits = torch.zeros(1, codec.tokens, codec.codes, requires_grad=True, device=codec.vectors_KD.device)
    return ModelFlops(
        token=short / LENGTHS[0] - square * LENGTHS[0],
        square=square,
        supervised=_counted(lambda: bare.lm_head(empty(1, width, gradient=reached))),
        image_token=_counted(lambda: bare.model.get_image_features(tiles).pooler_output) / int(config.image_seq_length),
        image=_counted(lambda: _sum(bare.image_features(pixels))),
        mask=_counted(drawn),
        depth_map=_counted(lambda: codec.decode_soft(logits, 1.0)) if soft_maps else 0.0,
    )


def _counted(run: Callable[[], Tensor]) -> float:
    """Operations of what it does and of the backward pass from there, by torch's counter.

    Attention is told to be products: the counter knows none of the CPU's own kernels for it.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        made = run()
        if made.requires_grad:
            torch.autograd.backward(made.sum())
    return float(counter.get_total_flops())


def _without_numbers(model: PerceptioForConditionalGeneration) -> PerceptioForConditionalGeneration:
    """A copy on the meta device: the same layers, what trains trains, and no memory for weights."""
    known: dict[int, Any] = {id(model.codec): None}
    for weight in model.parameters():
        known[id(weight)] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        known[id(buffer)] = buffer.to("meta")
    bare: PerceptioForConditionalGeneration = copy.deepcopy(model, known)
    for part in bare.modules():
        if isinstance(part, PositionEmbeddingSine):  # it keeps encodings that it made, with their numbers
            part.cache = {}
    return bare


def _trains(*parts: nn.Module) -> bool:
    return any(weight.requires_grad for part in parts for weight in part.parameters())


def _sum(features: Sam2Features) -> Tensor:
    return torch.stack([level.sum() for level in vars(features).values()]).sum()


def _cut_off(features: Sam2Features) -> Sam2Features:
    """The features as they are given to the mask decoder, whose backward pass ends there."""
    return Sam2Features(*(level.detach().requires_grad_(level.requires_grad) for level in vars(features).values()))
