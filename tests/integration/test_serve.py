"""The service on a tiny random model and a real local Ray: good requests, refusals, and what does not start."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from perceptio.data.masks import rle_to_mask
from perceptio.depth.codec import DepthCodec
from schemas.manifest import Licence
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from tests.tiny import tiny_model
from workflows import serve
from workflows.folders import publish
from workflows.store import DamagedTableError, StageError, open_root

ROOMS = Path(serve.__file__).parent / "recipes" / "rooms.yaml"
WIDTH, HEIGHT = 60, 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def published(folder: Path, seed: int, licences: tuple[Licence, ...] = ()) -> Recipe:
    """A recipe whose root holds a random model, published as `train` does."""
    publish(
        open_root(str(folder / "root")),
        tiny_model(folder, seed),
        "model",
        stage="train",
        attempt="test",
        recipe="test",
        code="test",
        licences=licences,
    )
    overrides = [
        f"serve.port={free_port()}",
        "serve.max_ongoing_requests=4",
        "serve.max_queued_requests=4",
        "serve.max_replicas=1",
        "serve.max_new_tokens=4",
        "cluster.min_memory_gb=1",
    ]
    return load_recipe(ROOMS, overrides=[*overrides, "serve.max_image_bytes=300000"], root=str(folder / "root"))


def picture(kind: str = "PNG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    rng = np.random.default_rng(size)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("L", (32, 32), shade) for shade in (0, 120)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def huge() -> bytes:
    """A PNG whose header says 20,000 x 10,000 pixels."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b""),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@dataclass(frozen=True)
class Service:
    client: httpx.Client
    recipe: Recipe

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/perceive", json={"image": b64(picture()), "question": "Where is it?", **fields})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    recipe = published(tmp_path_factory.mktemp("served"), seed=1)
    url = serve.start(recipe)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield Service(client, recipe)
    serve.stop()


def test_a_good_request_gets_text_masks_and_depth(service: Service) -> None:
    reply = service.ask(segmentation="on", depth="on")
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert (found["width"], found["height"]) == (WIDTH, HEIGHT)
    assert found["model"] == service.client.get("/healthz").json()["model"]
    assert found["request_id"] == reply.headers["x-request-id"]
    assert set(found["seconds"]) == {"decode", "generate", "masks", "depth"}
    assert found["masks"], "segmentation is on: there is at least one mask"
    for mask in found["masks"]:
        from_png = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"])))) == 255
        height, width = mask["rle"]["size"]
        from_rle = rle_to_mask({"height": height, "width": width, "counts": mask["rle"]["counts"]})
        assert from_png.shape == (HEIGHT, WIDTH)
        assert np.array_equal(from_png, from_rle)
        assert mask["area"] == from_png.sum()
        x0, y0, x1, y1 = mask["box"]
        assert from_png[y0:y1, x0:x1].sum() == mask["area"]
        assert 0 <= mask["score"] <= 1
    depth = Image.open(io.BytesIO(base64.b64decode(found["depth"]["png"])))
    assert depth.mode == "I;16"
    assert depth.size == (WIDTH, HEIGHT)
    assert len(found["depth"]["codes"]) == found["depth"]["grid"][0] * found["depth"]["grid"][1]


def test_parts_that_are_off_are_absent(service: Service) -> None:
    found = service.ask(segmentation="off", depth="off").json()
    assert found["masks"] == []
    assert found["depth"] is None


def test_multipart_answers_as_json_does(service: Service) -> None:
    fields = {"question": "Where is it?", "segmentation": "on", "depth": "on", "max_new_tokens": "3"}
    form = service.client.post("/v1/perceive", data=fields, files={"image": ("a.png", picture())})
    assert form.status_code == 200, form.text
    same = service.ask(segmentation="on", depth="on", max_new_tokens=3).json()
    assert {k: v for k, v in form.json().items() if k not in ("request_id", "seconds")} == {
        k: v for k, v in same.items() if k not in ("request_id", "seconds")
    }


def test_answers_in_one_batch_reach_their_own_requests(service: Service) -> None:
    sizes = [(30 + 7 * i, 50 - 3 * i) for i in range(4)]  # as many as may wait, so that none is refused

    def ask(i: int) -> dict[str, Any]:
        image, tokens = b64(picture(size=sizes[i])), 1 + i % 2
        reply: dict[str, Any] = service.ask(image=image, depth="on", max_new_tokens=tokens).json()
        return reply

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(4)))
    assert [(reply["width"], reply["height"]) for reply in together] == sizes
    alone = ask(2)
    assert together[2]["text"] == alone["text"]
    assert together[2]["depth"]["codes"] == alone["depth"]["codes"]


def test_more_than_the_queue_holds_is_refused_at_once_with_when_to_try_again(service: Service) -> None:
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: service.ask(depth="on"), range(40)))
    assert {reply.status_code for reply in replies} == {200, 503}
    refused = next(reply for reply in replies if reply.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert "wait already" in refused.json()["error"]
    assert service.ask().status_code == 200


@pytest.mark.proof
def test_an_overload_of_a_minute_is_answered_or_refused_and_passes(
    service: Service, record: Callable[..., None]
) -> None:
    statuses: Counter[int] = Counter()
    end = time.monotonic() + 60

    def keep_asking(_: int) -> list[int]:
        with httpx.Client(base_url=service.client.base_url, timeout=60) as own:
            asker, found = Service(own, service.recipe), []
            while time.monotonic() < end:
                found.append(asker.ask(depth="on", max_new_tokens=4).status_code)
        return found

    with ThreadPoolExecutor(60) as pool:
        for found in pool.map(keep_asking, range(60)):
            statuses.update(found)
    record(
        clients=60,
        answered=statuses[200],
        refused=statuses[503],
        other=statuses.total() - statuses[200] - statuses[503],
    )
    assert statuses.keys() == {200, 503}, "the overload must be one, and none may be lost"
    assert service.ask().status_code == 200


WRONG: dict[str, tuple[dict[str, Any], int, str, list[str]]] = {
    "unknown field": ({"colour": 1}, 422, "colour", ["unknown field", "segmentation"]),
    "wrong choice": ({"depth": "maybe"}, 422, "depth", ["maybe", "'auto'"]),
    "no question": ({"question": None}, 422, "question", ["question"]),
    "blank question": ({"question": "  "}, 422, "question", ["blanks"]),
    "long question": ({"question": "a" * 2001}, 422, "question", ["2001", "2000"]),
    "question beyond the context": ({"question": "語" * 2000}, 422, "question", ["expected at most 4096 together"]),
    "too many tokens": ({"max_new_tokens": 999}, 422, "max_new_tokens", ["999", "4"]),
    "no base64": ({"image": "%%%"}, 422, "image", ["base64"]),
    "an address": ({"image": "http://localhost/a.png"}, 422, "image", ["not fetched"]),
    "empty image": ({"image": ""}, 422, "image", ["0 bytes"]),
    "no image": ({"image": b64(b"plain words, no picture")}, 415, "image", ["JPEG"]),
    "cut-off image": ({"image": b64(picture()[:400])}, 422, "image", ["PNG"]),
    "animated image": ({"image": b64(animated())}, 415, "image", ["frame"]),
    "1 x 1": ({"image": b64(picture(size=(1, 1)))}, 422, "image", ["1 x 1", "16"]),
    "200 megapixels": ({"image": b64(huge())}, 413, "image", ["50000000"]),
    "large image": ({"image": b64(b"x" * 301_000)}, 413, "image", ["301000", "300000"]),
    "large body": ({"image": "A" * 600_000}, 413, "image", ["at most"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_told_what_is_wrong(service: Service, case: str) -> None:
    fields, status, field, words = WRONG[case]
    reply = service.ask(**fields)
    assert reply.status_code == status, reply.text
    refused = reply.json()
    assert refused["field"] == field
    assert refused["request_id"] == reply.headers["x-request-id"]
    assert [word for word in words if word not in refused["error"]] == []


def test_a_wrong_body_or_route_is_told_what_is_wrong(service: Service) -> None:
    post = service.client.post
    assert post("/v1/perceive", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert post("/v1/perceive", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    form = post("/v1/perceive", content=b"x", headers={"content-type": "multipart/form-data"})
    assert form.status_code == 400
    no_file = post("/v1/perceive", data={"question": "?"}, files={"other": b"x"})
    assert (no_file.status_code, no_file.json()["field"]) == (422, "image")
    twice = post("/v1/perceive", data={"question": ["What?", "Why?"]}, files={"image": ("a.png", picture())})
    assert (twice.status_code, twice.json()["field"]) == (422, "question")
    both = post("/v1/perceive", data={"question": "?", "image": "x"}, files={"image": ("a.png", picture())})
    assert (both.status_code, both.json()["field"]) == (422, "image")
    stream = post(
        "/v1/perceive", content=(b" " * 65_536 for _ in range(20)), headers={"content-type": "application/json"}
    )
    assert stream.status_code == 413
    assert "POST /v1/perceive" in service.client.get("/v1/perceive").json()["error"]
    assert service.client.get("/nowhere").json()["request_id"]


def test_a_second_service_on_the_port_does_not_start(service: Service) -> None:
    with pytest.raises(StageError, match=f"serve.port: {service.recipe.serve.port} on 127.0.0.1 is in use"):
        serve.start(service.recipe)


def test_other_weights_give_another_answer(tmp_path: Path) -> None:
    """What is loaded decides what is answered: two folders, the same question, in one process."""
    from perceptio.generate import Perceiver
    from perceptio.processor import Request

    rgb = np.asarray(Image.open(io.BytesIO(picture())))
    asked = [Request(rgb, "Where is it?", segmentation="on", depth="on")]
    found = [Perceiver.from_pretrained(str(tiny_model(tmp_path / str(seed), seed))) for seed in (1, 1, 2)]
    first, again, other = (perceiver.perceive(asked, max_new_tokens=4)[0] for perceiver in found)
    assert first.reply == again.reply
    assert np.array_equal(first.masks_MHW, again.masks_MHW)
    assert first.reply.text_ids != other.reply.text_ids
    assert not np.array_equal(first.scores_M, other.scores_M)


def test_a_model_that_is_not_in_order_does_not_start(tmp_path: Path) -> None:
    closed = Licence(part="teacher", source="somewhere", licence="CC-BY-NC-4.0", non_commercial=True)
    recipe = published(tmp_path, seed=1, licences=(closed,))
    with pytest.raises(StageError, match=r"teacher \(somewhere: CC-BY-NC-4.0\).*accept_non_commercial"):
        serve.check_folder(recipe)
    accepting = recipe.model_copy(update={"accept_non_commercial": True})
    assert serve.check_folder(accepting).licences == (closed,)
    with pytest.raises(StageError, match="run `train` first"):
        serve.check_folder(accepting.model_copy(update={"root": str(tmp_path / "empty")}))
    weights = tmp_path / "root" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedTableError, match=r"model\.safetensors"):
        serve.check_folder(accepting)


def test_a_model_with_another_codebook_does_not_start(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, seed=1)
    config = json.loads((folder / "config.json").read_text())
    config["codebook_digest"] = "0123456789abcdef" * 4
    (folder / "config.json").write_text(json.dumps(config))
    root = open_root(str(tmp_path / "root"))
    publish(root, folder, "model", stage="train", attempt="test", recipe="test", code="test")
    own = DepthCodec.from_pretrained(folder / "codebook").digest[:16]
    both = rf"model/codebook has digest {own}, model/config\.json was made with 0123456789abcdef"
    with pytest.raises(StageError, match=both):
        serve.check_folder(load_recipe(ROOMS, root=str(tmp_path / "root")))
