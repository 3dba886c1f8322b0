"""The service: a trained model behind HTTP, on Ray Serve.

    perceptio serve --recipe rooms

Reads   ROOT/model, as `train` published it
Serves  POST /v1/perceive, GET /healthz (workflows/endpoint.py) on serve.host:serve.port
Needs   what serve.cpus and serve.gpus say, per replica

Two deployments: `Endpoint` reads requests and decodes images, `Model` answers them in batches and scales with the
requests under way.

Shape legend: M masks, H, W the image's size in pixels.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import logging
import socket
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from perceptio.data.images import encode_depth16
from perceptio.data.masks import masks_to_rle
from perceptio.data.template import prompt_ids
from perceptio.depth.codec import DepthCodec
from perceptio.generate import Perceiver, Perception
from perceptio.generate import Request as Question
from perceptio.model import CODEBOOK_FOLDER
from schemas.manifest import Manifest
from schemas.recipe import Recipe, ServeRecipe
from schemas.service import DepthReply, MaskReply, PerceiveReply, Rle
from workflows.commits import StageError, open_root
from workflows.endpoint import RETRY_AFTER_S, Query, Refusal, build_app
from workflows.folders import local_copy, require
from workflows.runtime import start as start_ray

APP = "perceptio"
REQUEST_TIMEOUT_S = 120.0  # then the client gets 408
STUCK_S = 300.0  # a batch that takes longer means a replica that must be replaced
DEEP_QUEUE = 4  # requests that the endpoint holds for each one that the model may: refusing is cheap, decoding is not

log = logging.getLogger(__name__)


class Model:
    """A replica with the model: answers queries in batches."""

    def __init__(self, recipe: ServeRecipe, root_uri: str) -> None:
        torch.set_num_threads(recipe.threads)
        root = open_root(root_uri)
        self.digest = require(root, "model", stage="train").digest
        self.perceiver = Perceiver.from_pretrained(str(local_copy(root, "model", stage="train")))
        if recipe.gpus:
            self.perceiver.model.to("cuda")
            self.perceiver.codec.to("cuda")
        self.batch_began: float | None = None
        self._batched.set_max_batch_size(recipe.max_batch)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(recipe.batch_wait_s)  # type: ignore[attr-defined]
        # what cannot answer this must not become ready
        blank = Question(np.zeros((32, 32, 3), np.uint8), "What is this?", segmentation="on", depth="on")
        self.perceiver.perceive([blank], max_new_tokens=1)

    async def answer(self, query: Query) -> PerceiveReply:
        """The reply; raises Refusal for a question that cannot be put to the model."""
        asked, tokenizer = query.request, self.perceiver.processor.tokenizer
        try:
            prompt_ids(tokenizer, asked.question, segmentation=asked.segmentation, depth=asked.depth, image_tokens=1)
        except ValueError as error:  # alone here, lest it fail the whole batch
            raise Refusal(422, str(error), "question") from error
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
            for i, perception in zip(
                members, self.perceiver.perceive(questions, max_new_tokens=tokens), strict=True
            ):
                replies[i] = _reply(perception, queries[i], self.digest, self.perceiver.codec.grid)
        return [replies[i] for i in range(len(queries))]

    def check_health(self) -> None:
        """Raises where a batch hangs, so that Serve replaces the replica."""
        began = self.batch_began
        if began is not None and time.monotonic() - began > STUCK_S:
            raise RuntimeError(f"a batch has been running for more than {STUCK_S:.0f} s")


class Endpoint:
    """A replica of the HTTP side; hands queries to the model's replicas."""

    def __init__(self, recipe: ServeRecipe, min_side: int, model: DeploymentHandle, digest: str) -> None:
        self.recipe, self.min_side, self.model, self.digest = recipe, min_side, model, digest

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.recipe, self.min_side, self.digest, self._answer)

    async def _answer(self, query: Query) -> PerceiveReply:
        try:
            reply: PerceiveReply = await self.model.answer.remote(query)
        except BackPressureError as error:
            limit = self.recipe.max_queued_requests
            message = f"{limit} requests wait already, the most that this server takes: try again in {RETRY_AFTER_S} s"
            raise Refusal(503, message, retry_after_s=RETRY_AFTER_S) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            message = "the model's replica went away; another one is being started: try again"
            raise Refusal(503, message, retry_after_s=RETRY_AFTER_S) from error
        except Refusal as error:  # as the engine carries it, a mixture of its own class and ours
            raise getattr(error, "cause", error) from None
        return reply


def run(recipe: Recipe) -> None:
    """Serves until Ctrl-C."""
    url = start(recipe)
    try:
        log.info("serving at %s/v1/perceive; Ctrl-C stops it", url)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        log.info("stopping")
    finally:
        stop()


def start(recipe: Recipe) -> str:
    """The URL of the service, once a replica has answered its self-test.

    Raises StageError for a port in use, a model folder that is missing, damaged or of another codebook, and for
    non-commercial parts that the recipe does not accept.
    """
    settings = recipe.serve
    _require_free(settings.host, settings.port)
    manifest = check_folder(recipe)
    start_ray(recipe)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=REQUEST_TIMEOUT_S)
    serve.start(http_options=options, logging_config=_logging())
    try:
        serve.run(_application(recipe, manifest.digest), name=APP, route_prefix="/", logging_config=_logging())
    except RuntimeError as error:
        stop()
        raise StageError(f"serve: the model did not become ready: {_last_line(error)}") from error
    return f"http://{settings.host}:{settings.port}"


def stop() -> None:
    """Stops the service, if there is one; Ray itself stays."""
    if ray.is_initialized():
        serve.shutdown()


def check_folder(recipe: Recipe) -> Manifest:
    """The manifest of ROOT/model, whose files, codebook and licences are in order; raises StageError where not."""
    root = open_root(recipe.root)
    manifest = require(root, "model", stage="train")
    closed = [part for part in manifest.licences if part.non_commercial]
    if closed and not recipe.accept_non_commercial:
        parts = ", ".join(f"{part.part} ({part.source}: {part.licence})" for part in closed)
        raise StageError(
            f"{root.uri}: model has non-commercial parts: {parts}. Set accept_non_commercial: true if your use allows"
            " it, or train with other parts"
        )
    folder = local_copy(root, "model", stage="train")
    made_with = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("codebook_digest", "none")
    codec = DepthCodec.from_pretrained(folder / CODEBOOK_FOLDER)
    if codec.digest != made_with:
        raise StageError(
            f"{root.uri}: model/{CODEBOOK_FOLDER} has digest {codec.digest[:16]}, model/config.json was made with"
            f" {made_with[:16]}: its codes mean other depths; restore the codebook, or train anew"
        )
    return manifest


def _application(recipe: Recipe, digest: str) -> serve.Application:
    settings = recipe.serve
    model = serve.deployment(Model).options(
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        ),
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
    )
    most = settings.max_replicas * settings.max_ongoing_requests + settings.max_queued_requests
    endpoint = serve.deployment(serve.ingress()(Endpoint)).options(
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=most * DEEP_QUEUE,
        max_queued_requests=most * DEEP_QUEUE,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    )
    return endpoint.bind(settings, recipe.ingest.min_side, model.bind(settings, str(_absolute(recipe.root))), digest)


def _absolute(root: str) -> str | Path:
    """A local root as replicas find it, whose working folder is another one."""
    return root if "://" in root else Path(root).resolve()


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
            raise StageError(
                f"serve.port: {port} on {host} {why}; stop what listens there, or choose another port:"
                f" --set serve.port={port + 1}"
            ) from error


def _logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


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
