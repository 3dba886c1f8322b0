"""Asking a model: image and question in; text, masks and depth out. Evaluation and serving share this path.

Shape legend: B batch, T tokens, D hidden size, V vocabulary, M masks, N depth tokens, H, W the image's own size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from perceptio.decoding import Written, decode
from perceptio.grammar import Reply, ReplyGrammar
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor, Request
from perceptio.segmentation.sam2_image import preprocess


@dataclass(frozen=True)
class Perception:
    """What the model wrote, and what it means."""

    text: str
    masks_MHW: npt.NDArray[np.bool_]  # at the image's own size
    scores_M: npt.NDArray[np.float32]  # predicted IoU in [0, 1]
    inv_depth_HW: npt.NDArray[np.float32] | None  # [0, 1], larger = closer; None without a whole block
    reply: Reply  # the tokens, and whether they follow the grammar
    finish: str  # "stop" or "length"
    seconds: dict[str, float] = field(default_factory=dict)  # of the whole batch: generate, masks, depth


class Perceiver:
    """A model and its processor, ready to answer batches of requests."""

    def __init__(self, model: PerceptioForConditionalGeneration, processor: PerceptioProcessor) -> None:
        """Raises ValueError for a model without codec, for weights not in memory, and for another model's processor."""
        if model.codec is None:
            raise ValueError("the model has no codec: load it with from_pretrained, or attach_codec() first")
        if offloaded := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
            raise ValueError(
                f"{offloaded} is offloaded, expected every weight in memory: give a device_map that offloads nothing"
            )
        for name in ("vocabulary", "depth_tokens", "max_objects", "depth_after_text"):
            own, other = getattr(model.config, name), getattr(processor, name)
            if own != other:
                raise ValueError(f"{name}: the model's is {own}, the processor's {other}: load both from one folder")
        model.train(False)
        self.model, self.processor = model, processor
        self.codec = model.codec
        self.eos_id = int(processor.tokenizer.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype = torch.float32) -> Perceiver:
        """The perceiver of a Perceptio folder."""
        model = PerceptioForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return cls(model, PerceptioProcessor.from_pretrained(folder))

    @torch.inference_mode()
    def perceive(
        self, requests: Sequence[Request], *, max_new_tokens: int, use_grammar: bool = True, make_parts: bool = True
    ) -> list[Perception]:
        """One perception per request, greedily decoded in one batch.

        `max_new_tokens` bounds the text; the spatial block comes on top. Without the grammar the model writes what it
        likes, and `reply.problem` says what is wrong with it. Without `make_parts` neither masks nor maps are made of
        the tokens.
        """
        if not requests:
            return []
        started = time.perf_counter()
        asked = self.processor.ask(requests).to(self.model.device, dtype=self.model.dtype)
        grammars = [self.processor.grammar(request.segmentation, request.depth) for request in requests]
        for number, (grammar, tokens) in enumerate(zip(grammars, asked["attention_mask"].sum(1).tolist(), strict=True)):
            try:
                self.require_room(tokens, grammar, max_new_tokens)
            except ValueError as error:
                raise ValueError(f"request {number}: {error}") from error
        written = decode(
            self.model,
            asked["input_ids"],
            asked["attention_mask"],
            asked["pixel_values"],
            grammars,
            eos_id=self.eos_id,
            max_new_tokens=max_new_tokens,
            use_grammar=use_grammar,
            forced_codes={b: request.codes for b, request in enumerate(requests) if request.codes is not None},
        )
        generated = time.perf_counter()
        replies = [reply.grammar.parse(reply.ids) for reply in written]
        # what stands behind a reply's first violation is not read
        states = [reply.seg_states[: read.objects] for reply, read in zip(written, replies, strict=True)]
        masks = self._masks(requests, states if make_parts else [[] for _ in requests])
        masked = time.perf_counter()
        depths = self._depths(requests, replies) if make_parts else [None] * len(requests)
        seconds = {"generate": generated - started, "masks": masked - generated, "depth": time.perf_counter() - masked}
        return [self._perception(*parts, seconds) for parts in zip(written, replies, masks, depths, strict=True)]

    def require_room(self, tokens: int, grammar: ReplyGrammar, max_new_tokens: int) -> None:
        """Raises ValueError where a prompt of so many tokens and its longest reply do not fit the model's context."""
        room = int(self.model.config.get_text_config().max_position_embeddings)
        reply = grammar.longest_block + max_new_tokens
        if tokens + reply > room:
            raise ValueError(
                f"its prompt is {tokens} tokens and its reply up to {reply}, expected at most {room} together: ask"
                " shorter, or lower max_new_tokens"
            )

    def _masks(
        self, requests: Sequence[Request], states: Sequence[Sequence[Tensor]]
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]]:
        """Masks at each image's size and their scores, from the hidden states where `[SEG]` was the input."""
        owners = [b for b, own in enumerate(states) for _ in own]
        empty = [
            (np.zeros((0, *request.rgb_HW3.shape[:2]), dtype=np.bool_), np.zeros(0, dtype=np.float32))
            for request in requests
        ]
        if not owners:
            return empty
        hidden_MD = torch.stack([state_D for own in states for state_D in own])
        images = sorted(set(owners))
        sam2 = self.model.segmenter.sam2
        pixels_B3SS = preprocess([requests[b].rgb_HW3 for b in images], sam2.config.image_size)
        features = self.model.image_features(pixels_B3SS.to(hidden_MD.device, self.model.dtype))
        index_M = torch.tensor([images.index(b) for b in owners], device=hidden_MD.device)
        prediction = self.model.masks(hidden_MD, features, index_M)
        found = list(empty)
        for b in images:
            own = [m for m, owner in enumerate(owners) if owner == b]
            size = requests[b].rgb_HW3.shape[:2]
            logits_MHW = F.interpolate(prediction.logits_MHW[own][:, None].float(), size, mode="bilinear")[:, 0]
            found[b] = ((logits_MHW > 0).cpu().numpy(), prediction.iou_M[own].float().cpu().numpy())
        return found

    def _depths(self, requests: Sequence[Request], replies: Sequence[Reply]) -> list[npt.NDArray[np.float32] | None]:
        """Maps at each image's size where the reply holds a whole depth block."""
        whole = [b for b, reply in enumerate(replies) if reply.codes]
        found: list[npt.NDArray[np.float32] | None] = [None] * len(requests)
        if not whole:
            return found
        maps_BSS = self.codec.decode(torch.tensor([replies[b].codes for b in whole]))
        for b, map_SS in zip(whole, maps_BSS, strict=True):
            size = requests[b].rgb_HW3.shape[:2]
            map_HW = F.interpolate(map_SS[None, None], size, mode="bilinear")[0, 0]
            found[b] = map_HW.clamp(0, 1).cpu().numpy()
        return found

    def _perception(
        self,
        written: Written,
        reply: Reply,
        masks: tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]],
        depth_HW: npt.NDArray[np.float32] | None,
        seconds: dict[str, float],
    ) -> Perception:
        text = self.processor.tokenizer.decode(reply.text_ids, skip_special_tokens=True).strip()
        return Perception(text, masks[0], masks[1], depth_HW, reply, written.finish, seconds)
