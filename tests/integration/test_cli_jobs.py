"""Jobs that cannot start, from the command line: exit code 1, one message, nothing started, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
LIGHT = ("--set", "cluster.min_memory_gb=1")


def perceptio(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflows.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cluster.logical_cpus=1", ("cluster.logical_cpus is 1", "needs")),
        ("cluster.min_memory_gb=100000", ("GB of memory", "100000", "smaller recipe")),
    ],
)
def test_too_small_a_machine(tmp_path: Path, setting: str, words: tuple[str, ...]) -> None:
    failed(perceptio("ingest", "--root", str(tmp_path / "run"), "--set", setting, folder=tmp_path), *words)


def test_a_port_in_use_is_said_before_the_demo_works(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = perceptio("demo", "--root", "run", "--set", f"serve.port={port}", folder=tmp_path)
    failed(done, f"serve.port: {port} on 127.0.0.1 is in use", "--set serve.port=")
    assert not (tmp_path / "run").exists()


def test_the_demo_deletes_nobodys_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failed(perceptio("demo", "--root", ".", "--set", f"serve.port={port}", folder=tmp_path), "no demo has made")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_rooms_are_written_once(tmp_path: Path) -> None:
    arguments = ("rooms", "--out", "out", "--count", "3", "--size", "64", "--seed", "5")
    done = perceptio(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = sorted((tmp_path / "out" / "images").glob("*.png"))
    assert len(pictures) == 3
    assert np.asarray(Image.open(pictures[0])).shape == (64, 64, 3)
    failed(perceptio(*arguments, folder=tmp_path), "not an empty folder")
