"""The model's side of the service: a replica that answers queries in batches, and what a reply is made of.

Shape legend: M masks, H, W the image's size in pixels.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from ray import serve

from perceptio.data.collator import count_image_tokens
from perceptio.data.images import encode_depth16
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import prompt_ids
from perceptio.generate import Perceiver, Perception
from perceptio.processor import Request as Question
from schemas.recipe import ServeRecipe
from schemas.service import DepthReply, MaskReply, PerceiveReply, Rle
from workflows.endpoint import Query, RefusedError
from workflows.folders import local_copy, require
from workflows.runtime import device
from workflows.store import open_root

STUCK_S = 300.0  # a batch that takes longer means a replica that must be replaced


class Model:
    """A replica with the model: answers queries in batches."""

    def __init__(self, recipe: ServeRecipe, root_uri: str) -> None:
        torch.set_num_threads(recipe.threads)
        root = open_root(root_uri)
        self.digest = require(root, "model", stage="train").digest
        self.perceiver = Perceiver.from_pretrained(str(local_copy(root, "model", stage="train")))
        self.perceiver.model.to(torch.device(device()))  # type: ignore[arg-type]
        self.perceiver.codec.to(device())
        self.batch_began: float | None = None
        self._batched.set_max_batch_size(recipe.max_batch)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(recipe.batch_wait_s)  # type: ignore[attr-defined]
        # what cannot answer this must not become ready
        blank = Question(np.zeros((32, 32, 3), np.uint8), "What is this?", segmentation="on", depth="on")
        self.perceiver.perceive([blank], max_new_tokens=1)

    async def answer(self, query: Query) -> PerceiveReply:
        """The reply; raises RefusedError for a question that cannot be put to the model."""
        asked, processor = query.request, self.perceiver.processor
        slots = count_image_tokens(processor, *query.rgb_HW3.shape[:2])
        try:
            ids = prompt_ids(
                processor.tokenizer,
                asked.question,
                segmentation=asked.segmentation,
                depth=asked.depth,
                image_tokens=slots,
            )
            grammar = processor.grammar(asked.segmentation, asked.depth)
            self.perceiver.require_room(len(ids), grammar, query.max_new_tokens)
        except ValueError as error:  # alone here, lest it fail the whole batch
            raise RefusedError(422, str(error), "question") from error
        reply: PerceiveReply = await self._batched(query)
        return reply

    @serve.batch
    async def _batched(self, queries: list[Query]) -> list[PerceiveReply]:
        self.batch_began = time.monotonic()
        try:
            return await asyncio.to_thread(self._replies, queries)
        finally:
            self.batch_began = None

    def _replies(self, queries: list[Query]) -> list[PerceiveReply]:
        """One reply per query, in order; queries with the same limit on tokens share a pass through the model."""
        replies: dict[int, PerceiveReply] = {}
        order = sorted(range(len(queries)), key=lambda i: queries[i].max_new_tokens)
        for tokens, group in groupby(order, key=lambda i: queries[i].max_new_tokens):
            members = list(group)
            questions = [_question(queries[i]) for i in members]
            for i, perception in zip(members, self.perceiver.perceive(questions, max_new_tokens=tokens), strict=True):
                replies[i] = _reply(perception, queries[i], self.digest, self.perceiver.codec.grid)
        return [replies[i] for i in range(len(queries))]

    def check_health(self) -> None:
        """Raises where a batch hangs, so that Serve replaces the replica."""
        began = self.batch_began
        if began is not None and time.monotonic() - began > STUCK_S:
            raise RuntimeError(f"a batch has been running for more than {STUCK_S:.0f} s")


def _question(query: Query) -> Question:
    asked = query.request
    return Question(query.rgb_HW3, asked.question, segmentation=asked.segmentation, depth=asked.depth)


def _reply(perception: Perception, query: Query, digest: str, grid: tuple[int, int]) -> PerceiveReply:
    height, width = query.rgb_HW3.shape[:2]
    return PerceiveReply(
        request_id=query.request_id,
        model=digest,
        text=perception.text,
        masks=_masks(perception),
        depth=_depth(perception, grid),
        width=width,
        height=height,
        finish="stop" if perception.finish == "stop" else "length",
        seconds=perception.seconds,
    )


def _masks(perception: Perception) -> list[MaskReply]:
    return [
        MaskReply(
            rle=Rle(size=(rle["height"], rle["width"]), counts=rle["counts"]),
            png=_png(mask_HW.astype(np.uint8) * 255),
            box=_box(mask_HW),
            area=int(mask_HW.sum()),
            score=float(score),
        )
        for rle, mask_HW, score in zip(
            masks_to_rle(perception.masks_MHW), perception.masks_MHW, perception.scores_M, strict=True
        )
    ]


def _depth(perception: Perception, grid: tuple[int, int]) -> DepthReply | None:
    if perception.inv_depth_HW is None:
        return None
    steps_HW = np.rint(perception.inv_depth_HW * 65535).astype(np.uint16)
    png = base64.b64encode(encode_depth16(steps_HW)).decode("ascii")
    return DepthReply(png=png, codes=list(perception.reply.codes), grid=grid)


def _box(mask_HW: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _png(grey_HW: npt.NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(grey_HW).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
