"""The processor: InternVL's, which also writes a request's prompt and reads a reply's parts.

Shape legend: B requests, T tokens (left-padded), H, W the image's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoProcessor, BatchFeature, InternVLProcessor

from perceptio.config import PerceptioConfig
from perceptio.data.template import prompt_ids
from perceptio.depth.codec import DepthCodec
from perceptio.grammar import Part, Reply, ReplyGrammar
from perceptio.vocabulary import SpatialVocabulary, extend_tokenizer, require_fresh


@dataclass(frozen=True)
class Request:
    """One question about one image; "on" demands a part of the reply, "off" forbids it."""

    rgb_HW3: npt.NDArray[np.uint8]
    question: str
    segmentation: Part = "auto"
    depth: Part = "auto"
    codes: tuple[int, ...] | None = None  # forced on the depth block in place of what the model would write


class PerceptioProcessor(InternVLProcessor):  # type: ignore[no-untyped-call]
    """InternVL's processor, whose tokenizer has the spatial tokens of one codebook."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        image_seq_length: int = 256,
        chat_template: str | dict[str, str] | None = None,
        depth_codes: int = 0,
        depth_tokens: int = 0,
        max_objects: int = 5,
        depth_after_text: bool = False,
        **kwargs: Any,
    ) -> None:
        """`depth_codes` is K, `depth_tokens` N. Raises ValueError for a tokenizer without that codebook's tokens."""
        if depth_codes < 1:
            raise ValueError("processor: it has no spatial tokens: pass codebook=FOLDER, or a Perceptio model's folder")
        super().__init__(image_processor, tokenizer, video_processor, image_seq_length, chat_template, **kwargs)
        # InternVLProcessor's own default when it is called; published image processors say false, and `ask` and
        # training call them directly. `max_patches` is what limits tiles
        self.image_processor.crop_to_patches = True
        self.depth_codes, self.depth_tokens = depth_codes, depth_tokens
        self.max_objects, self.depth_after_text = max_objects, depth_after_text
        self._vocabulary = SpatialVocabulary.of(tokenizer, depth_codes)
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control_ids = frozenset(special - self._vocabulary.all_ids - {tokenizer.eos_token_id})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *args: Any,
        codebook: str | Path | None = None,
        max_objects: int | None = None,
        **kwargs: Any,
    ) -> PerceptioProcessor:
        """The processor of a Perceptio folder or hub id, or of an InternVL's with the spatial tokens of `codebook`.

        `max_objects` is the InternVL's, 5 by default. Raises ValueError where it is given for a Perceptio, and for an
        InternVL that has spatial tokens already.
        """
        if codebook is None:
            if max_objects is not None:
                raise ValueError(f"{source}: max_objects is {max_objects}, but a Perceptio's is fixed in its folder")
            found: PerceptioProcessor = super().from_pretrained(source, *args, **kwargs)
            return found
        base, codec = InternVLProcessor.from_pretrained(source, *args, **kwargs), DepthCodec.from_pretrained(codebook)
        require_fresh(base.tokenizer, str(source))
        extend_tokenizer(base.tokenizer, codec.codes)
        return cls._with_tokens(base, codec.codes, codec.tokens, 5 if max_objects is None else max_objects)

    @classmethod
    def of(cls, base: InternVLProcessor, config: PerceptioConfig) -> PerceptioProcessor:
        """The processor of a model with this configuration, from that of its base, whose tokenizer was extended."""
        made = cls._with_tokens(base, config.depth_codes, config.depth_tokens, config.max_objects)
        made.depth_after_text = config.depth_after_text
        return made

    @classmethod
    def _with_tokens(cls, base: InternVLProcessor, codes: int, tokens: int, max_objects: int) -> PerceptioProcessor:
        return cls(
            base.image_processor,
            base.tokenizer,
            base.video_processor,
            image_seq_length=base.image_seq_length,
            chat_template=base.chat_template,
            depth_codes=codes,
            depth_tokens=tokens,
            max_objects=max_objects,
        )

    @property
    def vocabulary(self) -> SpatialVocabulary:
        """The ids of the spatial tokens."""
        return self._vocabulary

    def grammar(self, segmentation: Part = "auto", depth: Part = "auto") -> ReplyGrammar:
        """What a reply may look like to a request for these parts."""
        return ReplyGrammar(
            self._vocabulary,
            self.depth_tokens,
            self.max_objects,
            segmentation,
            depth,
            depth_after_text=self.depth_after_text,
            control_ids=self._control_ids,
            size=len(self.tokenizer),
        )

    def ask(self, requests: Sequence[Request]) -> BatchFeature:
        """`input_ids` and `attention_mask` [B, T] up to where replies begin, and the `pixel_values` of all tiles.

        Raises ValueError for no request, a question without a word, other parts than "on", "off" and "auto", and an
        image that is not [H, W, 3] of uint8 or has no pixel.
        """
        if not requests:
            raise ValueError("got no requests, expected at least one")
        for number, request in enumerate(requests):
            if not request.question.strip():
                raise ValueError(f"request {number}: its question is blank, expected words")
            self.grammar(request.segmentation, request.depth)  # raises
            image = request.rgb_HW3
            if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.uint8:
                raise ValueError(f"request {number}: image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
        images = self.image_processor(
            [request.rgb_HW3 for request in requests], return_tensors="pt", input_data_format="channels_last"
        )
        prompts = [
            prompt_ids(
                self.tokenizer,
                request.question,
                segmentation=request.segmentation,
                depth=request.depth,
                image_tokens=int(tiles) * self.image_seq_length,
            )
            for request, tiles in zip(requests, images["num_patches"], strict=True)
        ]
        longest = max(len(ids) for ids in prompts)
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        return BatchFeature({"input_ids": ids_BT, "attention_mask": mask_BT, "pixel_values": images["pixel_values"]})

    def read(self, ids: Sequence[int], request: Request) -> Reply:
        """A reply's parts, up to its end of turn: never mended, and told what is wrong with it."""
        ids = [int(token_id) for token_id in ids]  # a tensor's elements are equal to no number as keys
        end = self.tokenizer.eos_token_id
        return self.grammar(request.segmentation, request.depth).parse(ids[: ids.index(end)] if end in ids else ids)


AutoProcessor.register(PerceptioConfig, PerceptioProcessor)  # type: ignore[no-untyped-call]
