"""A fresh clone's service: nothing was trained, and the shipped model answers about a room."""

from __future__ import annotations

import base64
import io
import socket
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from perceptio.data.images import encode_png
from perceptio.metrics.masks import ciou, overlap
from perceptio.rooms.questions import ask
from perceptio.rooms.render import render_room
from schemas.recipe_file import load_recipe
from workflows import serve
from workflows.cli import RECIPES


def test_without_training_the_shipped_model_answers(tmp_path: Path) -> None:
    overrides = [f"serve.port={_free_port()}", "serve.max_replicas=1", "cluster.min_memory_gb=1"]
    url = serve.start(load_recipe(RECIPES / "rooms.yaml", overrides=overrides, root=str(tmp_path / "nothing")))
    try:
        room = render_room(900, 0, 128)
        asked = next(question for question in ask(room) if question.kind == "referring")
        fields = {
            "image": base64.b64encode(encode_png(room.rgb_HW3)).decode(),
            "question": asked.prompt,
            "segmentation": "on",
            "depth": "on",
        }
        reply = httpx.post(f"{url}/v1/perceive", json=fields, timeout=60).json()
    finally:
        serve.stop()
    assert len(reply["masks"]) == len(asked.objects)
    found_HW = np.any([_pixels(mask["png"]) > 0 for mask in reply["masks"]], axis=0)
    true_HW = np.isin(room.instance_HW, asked.objects)
    sizes = {k: int((room.instance_HW == k).sum()) for k in np.unique(room.instance_HW) if k > 0}
    largest_HW = room.instance_HW == max(sizes, key=lambda k: sizes[k])
    assert ciou(*overlap(found_HW, true_HW)) > max(0.5, ciou(*overlap(largest_HW, true_HW))), (
        "the mask must be of what was asked"
    )
    depth_HW = _pixels(reply["depth"]["png"]).astype(np.float64)
    closeness = np.corrcoef(depth_HW.ravel(), -room.depth_HW.ravel())[0, 1]
    assert closeness > 0.5, "the depth map must follow the room's"


def _pixels(png: str) -> npt.NDArray[np.generic]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
