"""One local Ray for all integration tests, and small parts for the data stages: real classes, random weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.teacher import DepthTeacher
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from tests.tiny import depth_teacher
from workflows import actors, assemble, depth, ingest, runtime, tokenize_depth
from workflows.folders import publish
from workflows.store import open_root

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = CHECKOUT / "workflows" / "recipes" / "rooms.yaml"


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> str:
    """The address of this session's one Ray, started anew only where a module of tests shut it down.

    It has more logical CPUs than there are cores, so that no pool waits for one, and one logical accelerator. It ends
    with the session's process.
    """
    if not ray.is_initialized():
        paths = [str(CHECKOUT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        ray.init(
            address="local",
            num_cpus=16,
            num_gpus=1,
            object_store_memory=256 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def in_this_process() -> Iterator[None]:
    """A loop in place of actors and of Ray: for tests of what is done to tables, and to prepare those of the engine.

    A stage takes some 20 s where its actors are new processes that import torch, and below one here.
    """

    def loop(
        recipe: Recipe, rows: Sequence[actors.Row], actor: Any, arguments: dict[str, Any], **_: Any
    ) -> Iterator[actors.Row]:
        return map(actor(**arguments), rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors, "on_actors", loop)
        yield


@pytest.fixture
def without_ray() -> Iterator[None]:
    """For one test, a loop in place of actors."""
    with in_this_process():
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Depth Anything of 60,000 random parameters."""
    return depth_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def put_codebook(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """A function that publishes a random codebook under a recipe's root, made for the teacher that it is told."""
    torch.manual_seed(0)
    codebook = DepthCodebook(CodebookConfig(image_size=32, codes=8, dim=8, channels=(8, 8, 8), residual_blocks=1))
    with torch.no_grad():
        codebook(torch.rand(16, 32, 32))  # k-means sets the codes
    folder = tmp_path_factory.mktemp("codebook")
    codebook.save_pretrained(folder)

    def put(recipe: Recipe, teacher_digest: str) -> None:
        fields: dict[str, Any] = {"stage": "codebook", "attempt": runtime.attempt_id(), "recipe": recipe.digest}
        fields |= {"code": "test", "inputs": {"teacher": teacher_digest}, "extra": {"convention": depth.CONVENTION}}
        publish(open_root(recipe.root), folder, "codebook", **fields)

    return put


@pytest.fixture(scope="module")
def teacher_digest(teacher: Path) -> str:
    return DepthTeacher.from_pretrained(teacher).digest


@pytest.fixture
def run_stages(teacher_digest: str, put_codebook: Callable[..., None]) -> Callable[[Recipe], None]:
    def run(recipe: Recipe) -> None:
        ingest.run(recipe)
        depth.run(recipe)
        if not (Path(recipe.root) / "codebook").exists():
            put_codebook(recipe, teacher_digest)
        tokenize_depth.run(recipe)
        assemble.run(recipe)

    return run


def recipe_of(root: Path | str, sources: list[dict[str, Any]], **settings: Any) -> Recipe:
    """The rooms recipe on other sources, with dotted settings such as depth__teacher=..."""
    lines = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    mixture = [{"source": s["name"], "weight": 1, "segmentation": False, "depth": True} for s in sources]
    overrides = [f"sources={sources}", f"train.mixture={mixture}", "ingest.rows_per_shard=4", "max_reject_share=1"]
    overrides += [f"{stage}.pool.max_actors=1" for stage in ("ingest", "depth", "tokenize", "assemble")]
    return load_recipe(ROOMS, root=str(root), overrides=[*overrides, *lines])


def rooms(name: str = "rooms", count: int = 8, **changes: Any) -> dict[str, Any]:
    """A source of small rooms, as a recipe writes it."""
    source = {"name": name, "format": "rooms", "count": count, "size": 32, "seed": 1}
    return {**source, "questions": ["referring"], "exact_masks": True, **changes}
