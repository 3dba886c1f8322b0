"""What every stage says of the code that ran: the commit, and whether files differed from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from workflows import runtime


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("one\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag hides no commit")
    monkeypatch.setattr(runtime, "CHECKOUT", tmp_path)
    runtime.code_version.cache_clear()
    return tmp_path


def test_the_code_is_named_by_its_commit_and_what_differs_from_it_is_told(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    assert runtime.code_version().endswith(f"+{commit}")
    (checkout / "code.py").write_text("two\n")
    assert runtime.code_version().endswith(f"+{commit}"), "as it was when this process asked first"
    runtime.code_version.cache_clear()
    assert runtime.code_version().endswith(f"+{commit}-dirty")
    runtime.code_version.cache_clear()
