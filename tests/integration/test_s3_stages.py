"""All data stages on S3 behind a network that fails in every way: the same digests as on a local disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import CHECKOUT, recipe_of, rooms
from PIL import Image
from s3_server import BUCKET, KINDS, Faults, FaultyProxy, s3_server

from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from schemas.recipe import Recipe

READ_SECONDS = 2  # of the client, below the proxy's stalls
TABLES = ("images", "depth", "masks", "codes", "samples")
DRIVER = """
import contextlib, json, sys
import ray
from conftest import in_this_process
from perceptio.data.shards import SampleTable
from schemas.recipe import Recipe
from workflows import assemble, codebook, depth, ingest, masks, tokenize_depth, verify
from workflows.commits import Table
from workflows.store import open_root

tables = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=8, object_store_memory=256 * 2**20, include_dashboard=False, log_to_driver=False)
for text in sys.argv[2:]:
    recipe = Recipe.model_validate_json(text)
    with contextlib.nullcontext() if recipe.root.startswith("s3://") else in_this_process():
        for stage in (ingest, depth, masks, codebook, tokenize_depth, assemble, verify):
            stage.run(recipe)
    root = open_root(recipe.root)
    digests = {f"{t}/{s.name}": Table(root, t, s.name).require().digest for t in tables for s in recipe.sources}
    for source in recipe.sources:  # as training reads them
        with SampleTable.open(recipe.root, source.name) as samples:
            groups = enumerate(samples.rows_per_group)
            digests[f"ids/{source.name}"] = [samples.row(g, i)["id"] for g, rows in groups for i in range(rows)]
    codebook_files = {entry.path: entry.sha256 for entry in root.manifest("codebook").files}
    print(json.dumps({**digests, "codebook": codebook_files["model.safetensors"]}))
"""


@pytest.fixture(scope="module")
def local_ray() -> str:
    """No Ray here: the driver starts one of its own, whose workers have the store's address in their environment."""
    return ""


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAM2: its masks are poor, but they are its own."""
    folder = tmp_path_factory.mktemp("sam2")
    torch.manual_seed(0)
    config = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    Sam2ImageModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def photographs(server_port: int) -> str:
    """The address of a folder of pictures on the store: both runs read it through the faults."""
    rng = np.random.default_rng(0)
    for number in range(6):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(stream, "PNG")
        address = f"http://127.0.0.1:{server_port}/{BUCKET}/photographs/{number}.png"
        httpx.put(address, content=stream.getvalue()).raise_for_status()
    return f"s3://{BUCKET}/photographs"


def recipe_at(root: str, teacher: Path, segmenter: Path, photographs: str) -> Recipe:
    sources = [rooms("exact", 10), rooms("boxes", 6, seed=2, exact_masks=False)]
    sources.append({"name": "photographs", "format": "folder", "path": photographs})
    codebook = {"image_size": 16, "stride": 4, "channels": [8, 16], "codes": 8, "dim": 8, "steps": 20}
    codebook |= {"global_batch": 4, "sample_rows": 16, "workers": 1}
    settings = {"depth__teacher": teacher, "masks__teacher": segmenter, "masks__min_predicted_iou": 0}
    settings |= {"masks__min_stability": 0, "masks__pool__max_actors": 1}
    return recipe_of(root, sources, **settings, **{f"codebook__{key}": value for key, value in codebook.items()})


def digests_of(recipes: list[Recipe], store: str) -> list[dict[str, Any]]:
    """What each run ended with, all in one driver with a Ray of its own."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"AWS_ENDPOINT_URL": store, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    env |= {"AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    env |= {"FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": READ_SECONDS}})}
    command = [sys.executable, "-c", DRIVER, json.dumps(TABLES), *(recipe.model_dump_json() for recipe in recipes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(900)
def test_all_stages_on_a_failing_s3_end_with_the_digests_of_a_local_disk(
    tmp_path: Path, teacher: Path, segmenter: Path, photographs: str, server_port: int
) -> None:
    roots = [str(tmp_path / "root"), f"s3://{BUCKET}/root"]
    faults = Faults(rate=0.06, seed=1, stall=READ_SECONDS + 1)
    with FaultyProxy(server_port, faults) as proxy:
        on_disk, on_s3 = digests_of([recipe_at(root, teacher, segmenter, photographs) for root in roots], proxy.url)
    print(dict(proxy.injected), "of", proxy.requests.total())
    assert on_s3 == on_disk and len(on_s3) == 3 * (len(TABLES) + 1) + 1
    assert all(proxy.injected[kind] for kind in KINDS) and proxy.injected["lost_answer"], proxy.injected
