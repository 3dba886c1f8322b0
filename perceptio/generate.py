"""Asking a model: image and question in; text, masks and depth out. Evaluation and serving share this path.

Shape legend: B batch, T tokens, D hidden size, V vocabulary, M masks, N depth tokens, H, W the image's own size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import InternVLProcessor, LogitsProcessor, LogitsProcessorList

from perceptio.data.template import prompt_ids
from perceptio.grammar import Allowed, Part, Reply, ReplyGrammar, State
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.segmentation.sam2_image import preprocess


@dataclass(frozen=True)
class Request:
    """One question about one image."""

    rgb_HW3: npt.NDArray[np.uint8]
    question: str
    segmentation: Part = "auto"
    depth: Part = "auto"


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


class GrammarProcessor(LogitsProcessor):
    """Sets to -inf what the grammar of each sequence does not allow next; a finished sequence is left alone."""

    def __init__(self, grammars: Sequence[ReplyGrammar], prompt_length: int, eos_id: int, vocabulary_size: int) -> None:
        self.grammars = grammars
        self.seen = prompt_length
        self.eos_id = eos_id
        self.states: list[State | None] = [State() for _ in grammars]  # None once finished
        names = ("seg", "depth_start", "codes", "depth_end", "text")
        vocabulary = grammars[0].vocabulary
        kind_V = torch.full((vocabulary_size,), names.index("text"))
        kind_V[vocabulary.seg_id] = names.index("seg")
        kind_V[vocabulary.depth_start_id] = names.index("depth_start")
        kind_V[vocabulary.depth_end_id] = names.index("depth_end")
        kind_V[vocabulary.code_ids.start : vocabulary.code_ids.stop] = names.index("codes")
        self.names, self.kind_V = names, kind_V

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        for ids in input_ids[:, self.seen :].T.tolist():
            self.states = [
                None if state is None or token_id == self.eos_id else grammar.advance(state, token_id)
                for grammar, state, token_id in zip(self.grammars, self.states, ids, strict=True)
            ]
        self.seen = input_ids.shape[1]
        anything = Allowed(True, True, True, True, True)
        allowed = [
            anything if state is None else grammar.allowed(state)
            for grammar, state in zip(self.grammars, self.states, strict=True)
        ]
        allowed_BK = torch.tensor([[getattr(a, name) for name in self.names] for a in allowed], device=scores.device)
        return scores.masked_fill(~allowed_BK[:, self.kind_V.to(scores.device)], float("-inf"))


class Perceiver:
    """A model and its processor, ready to answer batches of requests."""

    def __init__(self, model: PerceptioForConditionalGeneration, processor: InternVLProcessor) -> None:
        if model.codec is None:
            raise ValueError("the model has no codec: load it with from_pretrained, or attach_codec() first")
        model.train(False)
        self.model, self.processor = model, processor
        self.codec = model.codec
        self.eos_id = int(processor.tokenizer.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype = torch.float32) -> Perceiver:
        """The perceiver of a Perceptio folder."""
        model = PerceptioForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return cls(model, InternVLProcessor.from_pretrained(folder))

    @torch.inference_mode()
    def perceive(
        self, requests: Sequence[Request], *, max_new_tokens: int, use_grammar: bool = True
    ) -> list[Perception]:
        """One perception per request, greedily decoded in one batch.

        `max_new_tokens` bounds the text; the spatial block comes on top. Without the grammar the model writes what it
        likes, and `reply.problem` says what is wrong with it.
        """
        if not requests:
            return []
        grammars = [self._grammar(request) for request in requests]
        started = time.perf_counter()
        ids_BT, mask_BT, pixel_values = self._inputs(requests)
        objects = any(request.segmentation != "off" for request in requests) * self.model.config.max_objects
        block = any(request.depth != "off" for request in requests) * (self.codec.tokens + 2)
        processors = []
        if use_grammar:
            size = self.model.config.get_text_config().vocab_size
            processors.append(GrammarProcessor(grammars, ids_BT.shape[1], self.eos_id, size))
        model: Any = self.model  # transformers types `generate` for its own classes only
        with _head_inputs(self.model) as states:
            written_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                pixel_values=pixel_values,
                do_sample=False,
                max_new_tokens=max_new_tokens + objects + block,
                eos_token_id=self.eos_id,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList(processors),
            )[:, ids_BT.shape[1] :]
        generated = time.perf_counter()
        ended = [self._cut(ids) for ids in written_BT.tolist()]
        replies = [grammar.parse(ids) for grammar, (ids, _) in zip(grammars, ended, strict=True)]
        masks = self._masks(requests, [ids for ids, _ in ended], states)
        masked = time.perf_counter()
        depths = self._depths(requests, replies)
        seconds = {"generate": generated - started, "masks": masked - generated, "depth": time.perf_counter() - masked}
        return [
            self._perception(reply, finish, mask, depth, max_new_tokens, seconds)
            for reply, (_, finish), mask, depth in zip(replies, ended, masks, depths, strict=True)
        ]

    def _grammar(self, request: Request) -> ReplyGrammar:
        config = self.model.config
        return ReplyGrammar(
            config.vocabulary, self.codec.tokens, config.max_objects, request.segmentation, request.depth
        )

    def _inputs(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded prompt ids and mask [B, T], and the tiles of all images."""
        tokenizer = self.processor.tokenizer
        images = self.processor.image_processor([request.rgb_HW3 for request in requests], return_tensors="pt")
        prompts = [
            prompt_ids(
                tokenizer,
                request.question,
                segmentation=request.segmentation,
                depth=request.depth,
                image_tokens=int(tiles) * self.processor.image_seq_length,
            )
            for request, tiles in zip(requests, images["num_patches"], strict=True)
        ]
        longest = max(len(ids) for ids in prompts)
        pad = tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        device = self.model.device
        return ids_BT.to(device), mask_BT.to(device), images["pixel_values"].to(device, self.model.dtype)

    def _cut(self, ids: list[int]) -> tuple[list[int], str]:
        """The ids before the end of turn, and how the reply finished."""
        if self.eos_id in ids:
            return ids[: ids.index(self.eos_id)], "stop"
        return ids, "length"

    def _masks(
        self, requests: Sequence[Request], replies: Sequence[list[int]], states: list[Tensor]
    ) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]]:
        """Masks at each image's size and their scores, from the hidden states where `[SEG]` was the input."""
        seg_id = self.model.config.seg_token_id
        # states[0] is the prompt's last position; the token written at step t is the input of states[t + 1]
        places = [
            (b, step)
            for b, ids in enumerate(replies)
            for step, token_id in enumerate(ids)
            if token_id == seg_id and step + 1 < len(states)
        ]
        empty = [
            (np.zeros((0, *request.rgb_HW3.shape[:2]), dtype=np.bool_), np.zeros(0, dtype=np.float32))
            for request in requests
        ]
        if not places:
            return empty
        hidden_MD = torch.stack([states[step + 1][b] for b, step in places])
        images = sorted({b for b, _ in places})
        sam2 = self.model.segmenter.sam2
        pixels_B3SS = preprocess([requests[b].rgb_HW3 for b in images], sam2.config.image_size)
        features = self.model.image_features(pixels_B3SS.to(hidden_MD.device, self.model.dtype))
        index_M = torch.tensor([images.index(b) for b, _ in places], device=hidden_MD.device)
        prediction = self.model.masks(hidden_MD, features, index_M)
        found = list(empty)
        for b in images:
            own = [m for m, (owner, _) in enumerate(places) if owner == b]
            size = requests[b].rgb_HW3.shape[:2]
            logits_MHW = F.interpolate(prediction.logits_MHW[own][:, None].float(), size, mode="bilinear")[:, 0]
            found[b] = ((logits_MHW > 0).cpu().numpy(), prediction.iou_M[own].float().cpu().numpy())
        return found

    def _depths(self, requests: Sequence[Request], replies: Sequence[Reply]) -> list[npt.NDArray[np.float32] | None]:
        """Maps at each image's size where the reply holds a whole depth block."""
        whole = [b for b, reply in enumerate(replies) if len(reply.codes) == self.codec.tokens]
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
        reply: Reply,
        finish: str,
        masks: tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]],
        depth_HW: npt.NDArray[np.float32] | None,
        max_new_tokens: int,
        seconds: dict[str, float],
    ) -> Perception:
        if len(reply.text_ids) > max_new_tokens:
            finish = "length"
        text = self.processor.tokenizer.decode(reply.text_ids[:max_new_tokens], skip_special_tokens=True).strip()
        return Perception(text, masks[0], masks[1], depth_HW, reply, finish, seconds)


@contextmanager
def _head_inputs(model: PerceptioForConditionalGeneration) -> Iterator[list[Tensor]]:
    """Collects what enters the output head at each step of generation, [B, D]: post-norm hidden states, no more."""
    states: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1]))
    try:
        yield states
    finally:
        hook.remove()
