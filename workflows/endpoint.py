"""The HTTP side of the service: requests checked and images decoded, every refusal explained. No torch in here.

    POST /v1/perceive    JSON (schemas.service.PerceiveRequest) or multipart (the same fields, `image` a file)
    GET  /healthz        {"status": "ok", "model": digest}

Every refusal is an ErrorReply: what was seen, what is expected, which field.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from perceptio.data.images import ImageError, ImageLimits, decode
from schemas.recipe import ServeRecipe
from schemas.service import ErrorReply, PerceiveReply, PerceiveRequest
from schemas.tables import Reason

ENVELOPE_BYTES = 64 * 1024  # of a body, besides the image and the question
BYTES_A_CHAR = 12  # of a question, at most: a JSON string may escape a character as two \uXXXX
IMAGE_STATUS = {Reason.TOO_LARGE: 413, Reason.NOT_AN_IMAGE: 415, Reason.ANIMATED_IMAGE: 415}  # all else 422
RETRY_AFTER_S = 1


class RefusedError(Exception):
    """A request that is not answered: the status, the message, and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(
            status, message, field, retry_after_s
        )  # all of them, or it could not be sent between processes
        self.status, self.message, self.field, self.retry_after_s = status, message, field, retry_after_s


@dataclass(frozen=True)
class Query:
    """A checked request, as the model gets it."""

    request_id: str
    rgb_HW3: npt.NDArray[np.uint8]
    request: PerceiveRequest  # without its image
    max_new_tokens: int


Answer = Callable[[Query], Awaitable[PerceiveReply]]


class Endpoint:
    """A replica of the HTTP side; hands queries to the model's replicas."""

    def __init__(self, recipe: ServeRecipe, min_side: int, model: DeploymentHandle[Any], digest: str) -> None:
        self.recipe, self.min_side, self.model, self.digest = recipe, min_side, model, digest

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.recipe, self.min_side, self.digest, self._answer)

    async def _answer(self, query: Query) -> PerceiveReply:
        try:
            reply: PerceiveReply = await self.model.answer.remote(query)
        except BackPressureError as error:
            limit = self.recipe.max_queued_requests
            message = f"{limit} requests wait already, the most that this server takes: try again in {RETRY_AFTER_S} s"
            raise RefusedError(503, message, retry_after_s=RETRY_AFTER_S) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            message = "the model's replica went away; another one is being started: try again"
            raise RefusedError(503, message, retry_after_s=RETRY_AFTER_S) from error
        except RefusedError as error:  # as the engine carries it, a mixture of its own class and ours
            raise getattr(error, "cause", error) from None
        return reply


def build_app(recipe: ServeRecipe, min_side: int, model: str, answer: Answer) -> FastAPI:
    """The ASGI application. `model` is the digest of the weights; `answer` raises RefusedError where it cannot."""
    # the documentation pages would load scripts from outside; /openapi.json is there
    app = FastAPI(title="Perceptio", docs_url=None, redoc_url=None)
    limits = ImageLimits(min_side, recipe.max_image_pixels)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": model}

    refusals: dict[int | str, dict[str, Any]] = {s: {"model": ErrorReply} for s in (400, 413, 415, 422, 503)}

    @app.post("/v1/perceive", response_model=PerceiveReply, responses=refusals, openapi_extra=_request_body())
    async def perceive(request: Request) -> PerceiveReply:
        """Text, masks and depth for an image and a question."""
        body = await _read_body(request, recipe)
        began = time.perf_counter()
        asked, image = await _parsed(request.headers, body)
        _check(asked, image, recipe)
        try:
            rgb_HW3 = await asyncio.to_thread(decode, image, limits)
        except ImageError as error:
            raise RefusedError(IMAGE_STATUS.get(error.reason, 422), f"image: {error}", "image") from error
        seconds = time.perf_counter() - began
        tokens = asked.max_new_tokens or recipe.max_new_tokens
        query = Query(_request_id(request), rgb_HW3, asked.model_copy(update={"image": ""}), tokens)
        reply = await answer(query)
        return reply.model_copy(update={"seconds": {"decode": seconds, **reply.seconds}})

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> JSONResponse:
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        return _error(request, error.status, error.message, error.field, headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}; there are POST /v1/perceive and GET /healthz"
        return _error(request, error.status_code, message, None, error.headers)

    return app


async def _read_body(request: Request, recipe: ServeRecipe) -> bytes:
    """The body; refused as soon as it is known to be too large, by its header or while it comes in."""
    # base64 makes 4 bytes of 3
    limit = recipe.max_image_bytes * 4 // 3 + recipe.max_question_chars * BYTES_A_CHAR + ENVELOPE_BYTES
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise RefusedError(413, f"body: {said} bytes, expected at most {limit}: send a smaller image", "image")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise RefusedError(413, f"body: more than {limit} bytes: send a smaller image", "image")
    except ClientDisconnect as error:
        raise RefusedError(400, "body: the connection was closed before its end") from error
    return bytes(body)


async def _parsed(headers: Headers, body: bytes) -> tuple[PerceiveRequest, bytes]:
    """The request and the image file's bytes, from either content type."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _from_form(headers, body)
    if kind != "application/json":
        message = f"content-type: got '{kind}', expected application/json or multipart/form-data"
        raise RefusedError(415, message, "content-type")
    return await asyncio.to_thread(_from_json, body)


def _from_json(body: bytes) -> tuple[PerceiveRequest, bytes]:
    try:
        asked = PerceiveRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from error
    if asked.image.startswith(("http://", "https://")):
        raise RefusedError(
            422, "image: got an address, expected base64 of the file: addresses are not fetched", "image"
        )
    text = asked.image.partition(",")[2] if asked.image.startswith("data:") else asked.image
    try:
        return asked, base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(
            422, f"image: not base64 ({error}); expected base64 of a JPEG, PNG or WebP", "image"
        ) from error


async def _from_form(headers: Headers, body: bytes) -> tuple[PerceiveRequest, bytes]:
    async def chunks() -> Any:
        yield body

    try:
        parser = MultiPartParser(headers, chunks(), max_files=1, max_fields=16, max_part_size=len(body) + 1)
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise RefusedError(400, f"body: no multipart form that can be read: {error}") from error
    names = [name for name, _ in form.multi_items()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        await form.close()
        raise RefusedError(422, f"{repeated}: given {names.count(repeated)} times, expected once", repeated)
    file = form.get("image")
    if not isinstance(file, UploadFile):
        raise RefusedError(422, f"image: got {'a text field' if file else 'nothing'}, expected a file upload", "image")
    fields = {name: value for name, value in form.multi_items() if name != "image"}
    try:
        return PerceiveRequest.model_validate({**fields, "image": "(file)"}), await file.read()
    except ValidationError as error:
        raise _invalid(error) from error
    finally:
        await form.close()


def _check(asked: PerceiveRequest, image: bytes, recipe: ServeRecipe) -> None:
    if len(image) > recipe.max_image_bytes:
        message = f"image: {len(image)} bytes, expected at most {recipe.max_image_bytes}: send a smaller file"
        raise RefusedError(413, message, "image")
    if not asked.question.strip():
        raise RefusedError(422, "question: only blanks, expected words", "question")
    if len(asked.question) > recipe.max_question_chars:
        seen, limit = len(asked.question), recipe.max_question_chars
        raise RefusedError(422, f"question: {seen} characters, expected at most {limit}", "question")
    if (asked.max_new_tokens or 0) > recipe.max_new_tokens:
        message = f"max_new_tokens: got {asked.max_new_tokens}, expected 1 to {recipe.max_new_tokens}"
        raise RefusedError(422, message, "max_new_tokens")


def _invalid(error: ValidationError) -> RefusedError:
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return RefusedError(400, f"body: {problems[0]['msg']}")
    field = ".".join(str(part) for part in problems[0]["loc"]) or None
    return RefusedError(422, "; ".join(_told(problem) for problem in problems), field)


def _told(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field, expected one of {', '.join(PerceiveRequest.model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: missing, expected {PerceiveRequest.model_fields[field].description}"
    return f"{field}: got {str(problem['input'])[:60]!r}: {problem['msg']}"


def _request_id(request: Request) -> str:
    """The client's own, or the one that Ray's proxy has given the request; the proxy sends it back as a header."""
    return request.headers["x-request-id"]


def _error(request: Request, status: int, message: str, field: str | None, headers: Any) -> JSONResponse:
    reply = ErrorReply(error=message, field=field, request_id=_request_id(request))
    return JSONResponse(reply.model_dump(), status, headers=headers)


def _request_body() -> dict[str, Any]:
    """What /openapi.json says of the body, which is read by hand so that its size is bounded."""
    schema = PerceiveRequest.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "a JPEG, PNG or WebP file"}
    form = {**schema, "properties": {**schema["properties"], "image": file}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
