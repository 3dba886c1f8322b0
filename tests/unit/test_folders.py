"""A folder is published once, whole, by whichever attempt was first; later ones leave it as it is."""

from pathlib import Path
from typing import Any

import pytest

from workflows.folders import CLAIM_NAME, local_copy, publish_first
from workflows.store import Root, StageError, open_root


def folder_with(place: Path, **files: str) -> Path:
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def published(root: Root, local: Path, attempt: str, **more: Any) -> str:
    """The attempt whose manifest stands."""
    fields = {"stage": "codebook", "attempt": attempt, "recipe": "r", "code": "c", "digest": f"digest of {local.name}"}
    return publish_first(root, local, "codebook", **{**fields, **more}).attempt


def test_the_first_attempt_stands_and_a_second_changes_nothing(tmp_path: Path) -> None:
    root = open_root(str(tmp_path / "root"))
    ours = folder_with(tmp_path / "ours", weights="1", report="2")
    other = folder_with(tmp_path / "other", weights="3", extra="4")
    assert published(root, ours, "a") == "a"
    files = {path.name: path.read_bytes() for path in Path(root.at("codebook")).iterdir()}
    assert published(root, ours, "b") == "a"
    assert published(root, other, "c") == "a"
    assert {path.name: path.read_bytes() for path in Path(root.at("codebook")).iterdir()} == files
    manifest = root.manifest("codebook")
    assert manifest is not None and manifest.digest == "digest of ours"
    assert {entry.path for entry in manifest.files} == {"weights", "report"}
    assert local_copy(root, "codebook", stage="codebook") == Path(root.at("codebook"))


def test_files_of_two_attempts_never_mix(tmp_path: Path) -> None:
    root = open_root(str(tmp_path / "root"))
    ours = folder_with(tmp_path / "ours", weights="1")
    assert published(root, ours, "a") == "a"
    root.delete("codebook", "manifest.json")  # as if the first attempt had died before its last write
    with pytest.raises(StageError, match=r"another attempt claimed it for other files .* delete .*codebook"):
        published(root, folder_with(tmp_path / "other", weights="3"), "b", wait_s=0.0)
    assert (root.read("codebook", "weights"), root.manifest("codebook")) == (b"1", None)


def test_an_attempt_that_died_is_finished_by_one_with_the_same_bytes(tmp_path: Path) -> None:
    root = open_root(str(tmp_path / "root"))
    ours = folder_with(tmp_path / "ours", weights="1", report="2")
    assert published(root, ours, "a") == "a"
    for name in ("manifest.json", "report"):
        root.delete("codebook", name)
    assert root.read("codebook", CLAIM_NAME)
    assert published(root, ours, "b") == "b"
    assert root.read("codebook", "report") == b"2"
