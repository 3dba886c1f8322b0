"""Checkpoints of a DeepSpeed engine: every rank's files, each with its checksum, and where the data stood.

DeepSpeed's state files are pickled, so they are loaded only from the run's own storage and only after every checksum
matches (DESIGN.md, Trust).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

TAG = "state"


class CheckpointError(Exception):
    """A checkpoint that cannot be used: torn, damaged, or of another run."""


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Writes this rank's part of the checkpoint; every rank calls it. `state` is JSON: the mixture's state, digests.

    Each rank lists the files that it wrote, with checksums, in `files-RANK.json`, last.
    """
    engine.save_checkpoint(str(folder), tag=TAG, client_state={}, save_latest=False)
    dist.barrier()
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("files-")]
    files = {str(path.relative_to(folder)): _sha256(path) for path in own}
    listing = {"rank": rank, "world": world, "state": state, "files": files}
    (folder / f"files-{rank}.json").write_text(json.dumps(listing, indent=1), encoding="utf-8")


def read_state(folder: Path, *, world: int) -> dict[str, Any]:
    """The `state` of a whole and undamaged checkpoint; raises CheckpointError naming the file that is not."""
    first = _listing(folder / "files-0.json")
    if first["world"] != world:
        raise CheckpointError(f"{folder.name} was saved by {first['world']} workers, this run has {world}: use as many")
    for listing in [first, *(_listing(folder / f"files-{rank}.json") for rank in range(1, world))]:
        for name, expected in listing["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{folder.name}: file {name} is missing: the checkpoint is torn")
            if (seen := _sha256(path)) != expected:
                raise CheckpointError(f"{folder.name}: file {name} has digest {seen[:12]}, expected {expected[:12]}")
    state: dict[str, Any] = first["state"]
    return state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights in fp32 out of a whole and undamaged checkpoint, whatever ZeRO's stage and world size.

    Raises CheckpointError as `read_state` does.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    read_state(folder, world=int(_listing(folder / "files-0.json")["world"]))
    found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return {name.removeprefix("model."): weight for name, weight in found.items()}  # the objective's own name for it


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """The `state` of a checkpoint after engine, optimizer and schedule were set to it; every rank calls it."""
    state = read_state(folder, world=dist.get_world_size())
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise CheckpointError(f"{folder.name}: DeepSpeed found no state under tag '{TAG}'")
    return state


def _listing(path: Path) -> dict[str, Any]:
    try:
        listing: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent.name}: {path.name} is missing: the checkpoint is torn") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path.parent.name}: {path.name} is not JSON: {error}") from error
    return listing


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
