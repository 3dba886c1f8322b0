"""Checkpoints of a DeepSpeed engine: every rank's files, each with its checksum, and where the data stood.

DeepSpeed's state files are pickled, so they are loaded only from the run's own storage and only after every checksum
matches (DESIGN.md, Trust).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

TAG = "state"


class CheckpointError(Exception):
    """A checkpoint that cannot be used: torn, damaged, or of another run."""


@dataclass(frozen=True)
class Saved:
    """A whole and undamaged checkpoint: where it lies, the workers and the ZeRO stage that saved it, and its state."""

    folder: Path
    world: int
    zero_stage: int
    state: dict[str, Any]  # JSON: the mixture's state, digests


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint as it was when it was taken, held in the CPU's memory until it is written."""

    rank: int
    world: int
    zero_stage: int
    state: Mapping[str, Any]
    files: Mapping[str, Any]  # what DeepSpeed would have written, by path in the checkpoint

    @classmethod
    def take(cls, engine: Any, state: Mapping[str, Any]) -> Snapshot:
        """A copy of all that the engine saves; every rank calls it. `state` is JSON: the mixture's state, digests."""
        keeping = _Keeping(engine.checkpoint_engine)
        engine.checkpoint_engine = keeping
        try:
            with tempfile.TemporaryDirectory(prefix="perceptio-snapshot-") as folder:
                engine.save_checkpoint(folder, tag=TAG, client_state={}, save_latest=False)
                files = {Path(path).relative_to(folder).as_posix(): kept for path, kept in keeping.files.items()}
        finally:
            engine.checkpoint_engine = keeping.engine
        return cls(dist.get_rank(), dist.get_world_size(), engine.zero_optimization_stage(), state, files)

    def write(self, folder: Path) -> None:
        """Writes this rank's files, and last `files-RANK.json`, which lists them with their checksums."""
        for name, kept in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, path)
        listing = {
            "rank": self.rank,
            "world": self.world,
            "zero_stage": self.zero_stage,
            "state": self.state,
            "files": {name: _sha256(folder / name) for name in self.files},
        }
        (folder / f"files-{self.rank}.json").write_text(json.dumps(listing, indent=1), encoding="utf-8")


class _Keeping:
    """A DeepSpeed checkpoint engine that keeps copies of what it is given to save."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.files = engine, dict[str, Any]()

    def save(self, state_dict: Any, path: str) -> None:
        copies: dict[tuple[Any, ...], Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:  # once, where two names share a weight
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            key = (*place, tensor.dtype, id(tensor) if tensor.numel() == 0 else 0)
            if key not in copies:
                copies[key] = tensor.detach().to("cpu", copy=True)
            return copies[key]

        # a torch.Size is a leaf: else it would come out as a plain tuple, and DeepSpeed asks it for its numel()
        self.files[path] = tree_map_only(Tensor, copied, state_dict, is_leaf=lambda node: isinstance(node, torch.Size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def verified(folder: Path) -> Saved:
    """The checkpoint in a folder; raises CheckpointError naming the file that is missing or damaged."""
    first = _listing(folder / "files-0.json")
    for listing in [first, *(_listing(folder / f"files-{rank}.json") for rank in range(1, first["world"]))]:
        for name, expected in listing["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{folder.name}: file {name} is missing: the checkpoint is torn")
            if (seen := _sha256(path)) != expected:
                raise CheckpointError(f"{folder.name}: file {name} has digest {seen[:12]}, expected {expected[:12]}")
    return Saved(folder, first["world"], first["zero_stage"], first["state"])


def read_weights(saved: Saved) -> dict[str, Tensor]:
    """The weights of a checkpoint in fp32, whatever ZeRO's stage and the number of workers."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(saved.folder), tag=TAG)
    return {name.removeprefix("model."): weight for name, weight in found.items()}  # the objective's own name for it


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets a model to a checkpoint's weights; raises CheckpointError where a parameter has none, or a weight no place.

    Parts that are never trained and stand in no checkpoint's weights (buffers, the codec) stay as they are.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = {key for key, _ in model.named_parameters()}
    if lost := [key for key in (*missing, *unexpected) if key in own or key in weights]:
        raise CheckpointError(f"{len(lost)} weights do not fit the recipe's model, the first {lost[0]}")


def load_checkpoint(engine: Any, folder: Path) -> None:
    """Sets engine, optimizer and schedule to a checkpoint of the same ZeRO stage; every rank calls it.

    `folder` is that of a verified checkpoint saved by as many workers, or what `to_universal` made of it, which an
    engine whose configuration says `load_universal` loads.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise CheckpointError(f"{folder.name}: DeepSpeed found no state under tag '{TAG}'")


def to_universal(saved: Saved, folder: Path) -> None:
    """Writes a checkpoint as one that any number of workers load (DeepSpeed's universal checkpoints)."""
    script = "deepspeed.checkpoint.ds_to_universal"
    places = ["--input_folder", str(saved.folder / TAG), "--output_folder", str(folder / TAG)]
    # in a process of its own: it forks, which a process with threads must not
    done = subprocess.run(
        [sys.executable, "-m", script, *places, "--inject_missing_state"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckpointError(f"{saved.folder.name}: {script} failed:\n{done.stderr[-2000:]}")


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
