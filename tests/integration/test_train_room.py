"""A training that cannot have its workers or its disk says so before it starts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from trainings import prepared, run_of

from tests.tiny import tiny_parts
from workflows import train, train_room
from workflows.store import StageError, open_root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_parts(folder)
    return folder


def test_workers_that_no_machine_holds_are_refused_at_once(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = prepared(tmp_path, parts, train__gpus_per_worker=1)
    words = r"room for 1 workers, expected 2, each with \{'CPU': 1.0, 'GPU': 1.0\}; its machines: \[\{'CPU': 16.0"
    with pytest.raises(StageError, match=words):
        train.run(recipe)
    assert run_of(recipe) is None


def test_a_cluster_is_given_its_time(
    tmp_path: Path, parts: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", local_ray)
    recipe = prepared(tmp_path, parts, train__cpus_per_worker=10, train__room_within_s=2)
    began = time.monotonic()
    with pytest.raises(StageError, match=r"room for 1 workers, expected 2, .* after 2 s; .* or add machines"):
        train_room.require_workers(recipe)
    assert time.monotonic() - began >= 2
    fewer = prepared(tmp_path / "fewer", parts, train__cpus_per_worker=10, train__workers=[1, 2])
    train_room.require_workers(fewer)


def test_room_that_comes_in_time_is_enough(
    tmp_path: Path, parts: Path, local_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", local_ray)
    recipe = prepared(tmp_path, parts, train__cpus_per_worker=10, train__room_within_s=60)
    machines, asked = ray.nodes(), []

    def nodes() -> list[dict[str, object]]:
        asked.append(len(asked))
        return [*machines, *machines] if len(asked) > 3 else machines

    monkeypatch.setattr(train_room.ray, "nodes", nodes)
    train_room.require_workers(recipe)
    assert len(asked) > 3


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared(tmp_path, parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(StageError, match=r"has 0.0 GB free, expected at least \d.*: 4 more checkpoints of 0.\d\d GB"):
        train.run(recipe)
    assert run_of(recipe) is None
    root = open_root(recipe.root)
    with pytest.raises(StageError, match=r": 1 more checkpoints of"):  # those that stand have their room
        train_room.require_disk(recipe, root, standing=9)
    monkeypatch.undo()
    train_room.require_disk(recipe, root, standing=0)


def test_what_cannot_be_reckoned_is_said(tmp_path: Path, parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = prepared(tmp_path, parts, model__base=str(tmp_path / "nowhere"))
    train_room.require_disk(recipe, open_root(recipe.root), standing=0)
    assert "has room for the checkpoints is not known" in caplog.text and "nowhere" in caplog.text
