"""Checkpoints are verified before anything of them is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from perceptio.train.checkpoint import CheckpointError, Saved, verified


def write(folder: Path, world: int = 2) -> None:
    for rank in range(world):
        (folder / f"part-{rank}.pt").write_bytes(bytes([rank]) * 100)
        files = {f"part-{rank}.pt": hashlib.sha256(bytes([rank]) * 100).hexdigest()}
        listing = {"rank": rank, "world": world, "zero_stage": 3, "state": {"position": 64}, "files": files}
        (folder / f"files-{rank}.json").write_text(json.dumps(listing))


def test_a_whole_checkpoint_gives_its_state(tmp_path: Path) -> None:
    write(tmp_path)
    assert verified(tmp_path) == Saved(tmp_path, 2, 3, {"position": 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "part-1.pt").unlink(), "part-1.pt is missing"),
        (lambda folder: (folder / "part-0.pt").write_bytes(b"x"), "part-0.pt has digest"),
        (lambda folder: (folder / "files-1.json").unlink(), "files-1.json is missing"),
        (lambda folder: (folder / "files-1.json").write_text("{"), "files-1.json is not JSON"),
    ],
)
def test_a_damaged_one_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        verified(tmp_path)
