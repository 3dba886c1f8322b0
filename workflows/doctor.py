"""Checks the machine or cluster that a recipe is to run on, and says what is missing and how to get it.

    perceptio doctor --recipe rooms

Reads   nothing
Writes  one small file under ROOT, which it deletes: the store must refuse to create a file twice
Needs   nothing
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
import torch
from packaging.requirements import Requirement

from schemas.recipe import Recipe
from workflows.runtime import shipped, start
from workflows.serve import require_free
from workflows.store import StageError, open_root

FREE_GB = 5.0  # of disk, for the shipped recipe's tables, checkpoints and Ray's own files
PYTHONS = ((3, 11), (3, 12))


class MissingError(StageError):
    """Something that the recipe needs is not there; the message says how to get it."""


def run(recipe: Recipe) -> None:
    """Prints a line per check; raises MissingError where one failed."""
    checks: dict[str, Callable[[Recipe], str]] = {
        "python": _python,
        "packages": _packages,
        "disk": _disk,
        "store": _store,
        "parts": _parts,
        "port": _port,
        "ray": _ray,
    }
    missing = []
    for name, check in checks.items():
        try:
            print(f"ok       {name:9} {check(recipe)}")
        except StageError as error:
            missing.append(name)
            print(f"missing  {name:9} {error}")
    if missing:
        raise MissingError(f"{len(missing)} of {len(checks)} checks failed: {', '.join(missing)}")


def _python(recipe: Recipe) -> str:
    if sys.version_info[:2] not in PYTHONS:
        raise MissingError(f"this is Python {sys.version.split()[0]}, expected 3.11 or 3.12: make .venv with one")
    return sys.version.split()[0]


def _packages(recipe: Recipe) -> str:
    try:
        texts = importlib.metadata.requires("perceptio") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingError("the package itself is not installed: run `make setup`") from error
    named = [Requirement(text) for text in texts]
    required = [one for one in named if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = list(_wrong_packages(required))
    if wrong:
        raise MissingError(f"{'; '.join(wrong)}: run `make setup`")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers"))
    return f"{versions} and {len(required) - 3} others"


def _wrong_packages(required: Sequence[Requirement]) -> Iterator[str]:
    for requirement in required:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed, expected {requirement.specifier}"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} is {found}, expected {requirement.specifier}"


def _disk(recipe: Recipe) -> str:
    if "://" in recipe.root:
        return "the root is on a store"
    folder = Path(recipe.root).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GB:
        raise MissingError(f"{free:.1f} GB are free at {folder}, expected {FREE_GB:g}: choose another --root")
    return f"{free:.0f} GB free"


def _store(recipe: Recipe) -> str:
    """Creates a file twice: the second must be refused, or two attempts could both think that they had won."""
    try:
        open_root(recipe.root).require_exclusive_create()
    except OSError as error:
        raise MissingError(f"root '{recipe.root}' cannot be written to ({error}): choose another --root") from error
    return f"{recipe.root}: a file is created once"


def _parts(recipe: Recipe) -> str:
    named = {
        "teacher": recipe.depth.teacher,
        "segmenter": recipe.model.sam2,
        "base": recipe.model.base,
    }
    return ", ".join(str(shipped(part)) if name == "rooms" else name for part, name in named.items())


def _port(recipe: Recipe) -> str:
    require_free(recipe.serve.host, recipe.serve.port)
    return f"{recipe.serve.port} on {recipe.serve.host} is free"


def _ray(recipe: Recipe) -> str:
    """Starts Ray as a stage does, which checks CPUs and memory, and counts what the recipe asks for."""
    start(recipe)
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    pools = (recipe.depth.pool, recipe.masks.pool, recipe.tokenize.pool, recipe.evaluate.pool, recipe.serve)
    gpus = max(recipe.train.most_workers * recipe.train.gpus_per_worker, *(pool.gpus for pool in pools))
    if gpus > have.get("GPU", 0):
        raise MissingError(
            f"{have.get('GPU', 0):g} GPUs, expected {gpus:g}: join a cluster that has them (RAY_ADDRESS), or set the"
            " recipe's gpus and gpus_per_worker to 0"
        )
    memory = have.get("memory", 0) / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator here"
    return f"{have.get('CPU', 0):g} logical CPUs, {memory:.0f} GB, {have.get('GPU', 0):g} GPUs; {device}"
