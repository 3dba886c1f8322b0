"""The service: a trained model behind HTTP, on Ray Serve.

    perceptio serve --recipe rooms

Reads   ROOT/model, as `train` published it; where there is none and serve.fallback is `rooms`, the shipped model
Serves  POST /v1/perceive, GET /healthz (workflows/endpoint.py) on serve.host:serve.port
Needs   what serve.cpus and serve.gpus say, per replica

Two deployments: `Endpoint` reads requests and decodes images, `Model` (workflows/replica.py) answers them in batches
and scales with the requests under way.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions

from perceptio.depth.codec import DepthCodec
from perceptio.model import CODEBOOK_FOLDER
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from workflows.endpoint import RETRY_AFTER_S, Endpoint
from workflows.folders import local_copy, require
from workflows.replica import Model
from workflows.runtime import shipped
from workflows.runtime import start as start_ray
from workflows.store import StageError, open_root

APP = "perceptio"
SHIPPED = "perceptio"  # the folder of the zoo whose model/ serve.fallback means
REQUEST_TIMEOUT_S = 120.0  # then the client gets 408
DEEP_QUEUE = 4  # requests that the endpoint holds for each one that the model may: refusing is cheap, decoding is not

log = logging.getLogger(__name__)


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
    require_free(settings.host, settings.port)
    recipe = with_a_model(recipe)
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


def build(args: dict[str, str]) -> serve.Application:
    """The application of a RayService; args: {"recipe": path of the recipe in the pod}."""
    recipe = with_a_model(load_recipe(Path(args["recipe"])))
    return _application(recipe, check_folder(recipe).digest)


def stop() -> None:
    """Stops the service, if there is one; Ray itself stays."""
    if ray.is_initialized():
        serve.shutdown()  # type: ignore[no-untyped-call]


def with_a_model(recipe: Recipe) -> Recipe:
    """The recipe; its root is the shipped model's where it has no model of its own and allows that."""
    if recipe.serve.fallback == "none" or open_root(recipe.root).manifest("model") is not None:
        return recipe
    log.warning("%s: no model yet, so the shipped one of rooms answers: `train` makes this recipe's own", recipe.root)
    return recipe.model_copy(update={"root": str(shipped(SHIPPED))})


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
    deployment: Any = serve.deployment  # its own types do not know the form with options
    model = deployment(
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
    )(Model).bind(settings, _absolute(recipe.root))
    most = settings.max_replicas * settings.max_ongoing_requests + settings.max_queued_requests
    endpoint = deployment(
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=most * DEEP_QUEUE,
        max_queued_requests=most * DEEP_QUEUE,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    )(serve.ingress()(Endpoint))
    application: serve.Application = endpoint.bind(settings, recipe.ingest.min_side, model, digest)
    return application


def _absolute(root: str) -> str:
    """A local root as replicas find it: their working folder is another one."""
    return root if "://" in root else str(Path(root).resolve())


def require_free(host: str, port: int) -> None:
    """Raises StageError where the port is in use or is not ours to take."""
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
