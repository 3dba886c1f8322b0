"""What every stage needs of the engine and the machine: Ray's start-up, who did it with which code, work done ahead."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import secrets
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
import ray.data
from pydantic import BaseModel

from schemas.recipe import PoolRecipe, Recipe, section_digest
from workflows.store import StageError

CHECKOUT = Path(__file__).resolve().parent.parent
# glibc gives large blocks back to the system as soon as they are freed, and each page of the next one is a fault: 12 %
# of a model's time on a CPU. With these a process keeps up to 1 GB of what it freed. One arena for all threads: a
# thread's own arena gives memory back in any case, and actors work in threads
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Made = TypeVar("Made")


class NotEnoughError(StageError):
    """The machine or cluster is too small for the recipe."""


def start(recipe: Recipe) -> None:
    """Starts a local Ray, or joins the cluster that RAY_ADDRESS names.

    Raises NotEnoughError on too small a machine, StageError where no cluster answers.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(CHECKOUT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, paths)])
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address="auto", **quiet)
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise StageError(
                f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({error}): start one, or unset"
                " RAY_ADDRESS to work on this machine alone"
            ) from error
        return
    _check_machine(recipe)
    ray.init(
        address="local",
        num_cpus=recipe.cluster.logical_cpus,
        object_store_memory=recipe.cluster.object_store_mb * 2**20,
        include_dashboard=False,
        **quiet,
    )


def enter(folder: str) -> None:
    """Makes `folder`, the driver's, the working folder, so that a recipe's relative paths mean the same in a worker.

    Ray Train gives its workers another one. On another machine the folder may not exist: there, paths are absolute.
    """
    if Path(folder).is_dir():
        os.chdir(folder)


def attempt_id() -> str:
    """A name for one attempt at a stage: the time, and four random bytes."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + secrets.token_hex(4)


def settings_digest(section: BaseModel, pool: PoolRecipe) -> str:
    """Digest of a recipe section with its pool's threads, but not its size, which changes no result."""
    return f"{section_digest(section, exclude={'pool'})}-{pool.threads}"


def shipped(part: str) -> Path:
    """The folder of a small pretrained part that comes with the package: teacher, segmenter or base."""
    folder = CHECKOUT / "perceptio" / "rooms" / "zoo" / part
    if not folder.is_dir():
        raise StageError(f"the shipped part '{part}' is not at {folder}: reinstall the package, or name a folder")
    return folder


def weights(name: str, part: str) -> str:
    """What a recipe's weights field means: "rooms" is the shipped part, all else a folder or hub id as it stands."""
    return str(shipped(part)) if name == "rooms" else name


def device() -> str:
    """Where an actor's model runs: the accelerator that Ray gave it, else the CPU."""
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"  # asking would start a Ray


def threads_beside_a_model() -> int:
    """One, that works while an accelerator does; none on the CPU, where it would only take the model's core."""
    return 0 if device() == "cpu" else 1


@cache
def code_version() -> str:
    """The package's version, and the commit where the code is a git checkout; "-dirty" where files differ from it.

    As it was when this process first asked, which a run does at its start.
    """
    try:
        version = importlib.metadata.version("perceptio")
    except importlib.metadata.PackageNotFoundError:
        version = "unpackaged"
    if not (CHECKOUT / ".git").exists():
        return version
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version}+{commit}" if commit else version


def ahead(make: Callable[[Item], Made], items: Iterable[Item], *, threads: int = 1, depth: int = 2) -> Iterator[Made]:
    """make(item) for each item in order, up to `depth` of them worked on before they are asked for.

    Without threads each is made when it is asked for.
    """
    if threads == 0:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_machine(recipe: Recipe) -> None:
    pools = {name: getattr(recipe, name).pool for name in ("ingest", "depth", "masks", "tokenize", "assemble")}
    needs = {name: pool.min_actors * pool.cpus for name, pool in pools.items()}
    needs["codebook"] = recipe.codebook.workers + 1.0
    needs["train"] = recipe.train.most_workers * recipe.train.cpus_per_worker + 1.0
    part, need = max(needs.items(), key=lambda item: item[1])
    if need > recipe.cluster.logical_cpus:
        raise NotEnoughError(
            f"cluster.logical_cpus is {recipe.cluster.logical_cpus}, but `{part}` needs {need:g}:"
            f" set it to at least that, or give `{part}` fewer actors or workers"
        )
    memory = _memory_limit() / 2**30
    if memory < recipe.cluster.min_memory_gb:
        raise NotEnoughError(
            f"this machine has {memory:.1f} GB of memory, the recipe's cluster.min_memory_gb is"
            f" {recipe.cluster.min_memory_gb:g}: use a larger machine or a smaller recipe"
        )


def _memory_limit() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = float(psutil.virtual_memory().total)
    return total if text == "max" else min(total, float(text))
