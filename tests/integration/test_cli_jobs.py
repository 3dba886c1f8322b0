"""Jobs that cannot start, from the command line: exit code 1, one message, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from workflows import cli

CHECKOUT = Path(cli.__file__).parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(arguments: list[str], *words: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cluster.logical_cpus=1", ("cluster.logical_cpus is 1", "needs")),
        ("cluster.min_memory_gb=100000", ("GB of memory", "100000", "smaller recipe")),
    ],
)
def test_too_small_a_machine(setting: str, words: tuple[str, ...]) -> None:
    """In a process of its own, which has no Ray yet."""
    command = [sys.executable, "-m", "workflows.cli", "ingest", "--root", "run", "--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


def test_a_port_in_use_is_said_before_the_demo_works() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = (f"serve.port: {port} on 127.0.0.1 is in use", "--set serve.port=")
        assert_refused(["demo", "--root", "run", "--set", f"serve.port={port}"], *words)
    assert not Path("run").exists()


def test_the_demo_deletes_nobodys_files() -> None:
    Path("thesis.tex").write_text("mine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert_refused(["demo", "--root", ".", "--set", f"serve.port={port}"], "no demo has made")
    assert Path("thesis.tex").read_text() == "mine"


def test_serving_without_a_model_says_what_to_run() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["--set", f"serve.port={port}", "--set", "serve.fallback=none"]
    assert_refused(["serve", "--root", "run", *settings], "run `train` first")


def test_rooms_are_written_into_an_empty_folder_only() -> None:
    arguments = ["rooms", "--out", "out", "--count", "3", "--size", "64", "--seed", "5"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    pictures = sorted(Path("out/images").glob("*.png"))
    assert len(pictures) == 3
    assert np.asarray(Image.open(pictures[0])).shape == (64, 64, 3)
    assert_refused(arguments, "not an empty folder")
