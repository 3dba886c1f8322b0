"""How far the training of a codebook has come, and that state on disk: tensors and JSON, nothing pickled.

    current.safetensors    the weights, with the quantizer's running statistics
    optimizer.safetensors  the optimizer's tensors, named PARAMETER/FIELD
    best.safetensors       the best weights so far, once there are any
    state.json             step, figures, history, and the SHA-256 of every other file; written last

No random state is among it: every step draws from (seed, rank, step) alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from perceptio.depth.codebook import DepthCodebook

CURRENT, OPTIMIZER, BEST, STATE = "current.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"


class StateError(Exception):
    """A saved state that cannot be used: torn, damaged, or of another codebook."""


@dataclass
class Progress:
    """What a training has reached, beside the weights that it is at."""

    step: int = 0  # steps done
    best: dict[str, Tensor] | None = None  # state_dict of the codebook with the lowest held-out error
    figures: dict[str, float] = field(default_factory=dict)  # that codebook's
    history: list[dict[str, float]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


def snapshot(codebook: DepthCodebook) -> dict[str, Tensor]:
    """A copy of every weight and statistic, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in codebook.state_dict().items()}


def save_progress(folder: Path, codebook: DepthCodebook, optimizer: Optimizer, progress: Progress) -> None:
    """Writes the state into `folder`. `optimizer` has the codebook's parameters in their own order."""
    names = [name for name, _ in codebook.named_parameters()]
    kept = optimizer.state_dict()["state"].items()
    tensors = {f"{names[i]}/{key}": tensor.detach().cpu().contiguous() for i, s in kept for key, tensor in s.items()}
    files = {CURRENT: snapshot(codebook), OPTIMIZER: tensors, BEST: progress.best}
    written = {name: content for name, content in files.items() if content is not None}
    for name, content in written.items():
        save_file(content, folder / name)
    state = {
        "step": progress.step,
        "figures": progress.figures,
        "history": progress.history,
        "resumed_at": progress.resumed_at,
        "files": {name: _sha256(folder / name) for name in written},
    }
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_progress(folder: Path, codebook: DepthCodebook, optimizer: Optimizer) -> Progress:
    """The progress saved in `folder`, after codebook and optimizer were set to it.

    Raises StateError naming the file that is missing, damaged or of another codebook; nothing is set then.
    """
    state = _checked(folder)
    files = {name: load_file(folder / name) for name in state["files"]}
    place = {name: i for i, (name, _) in enumerate(codebook.named_parameters())}
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in files[OPTIMIZER].items():
        name, _, entry = key.rpartition("/")
        if name not in place:
            raise StateError(f"{folder / OPTIMIZER}: parameter '{name}' is unknown, expected one of {sorted(place)}")
        slots.setdefault(place[name], {})[entry] = tensor
    try:
        codebook.load_state_dict(files[CURRENT])
    except RuntimeError as error:
        raise StateError(f"{folder / CURRENT} is of another codebook: {error}") from error
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(
        state["step"], files.get(BEST), state["figures"], state["history"], [*state["resumed_at"], state["step"]]
    )


def _checked(folder: Path) -> dict[str, Any]:
    """state.json of a folder whose files are all there and are what it says."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StateError(
            f"{folder / STATE} is missing: the state is torn; delete the run's folder and run anew"
        ) from None
    except json.JSONDecodeError as error:
        raise StateError(f"{folder / STATE} is not JSON ({error}); delete the run's folder and run anew") from error
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise StateError(f"{path} is missing: the state is torn; delete the run's folder and run anew")
        if (seen := _sha256(path)) != expected:
            raise StateError(
                f"{path} has sha256 {seen[:16]}, {STATE} says {expected[:16]}: it is damaged; delete the run's folder"
                " and run anew"
            )
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
