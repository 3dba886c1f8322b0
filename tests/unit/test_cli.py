"""The command line as a user meets it: what is wrong is said in one message, with the right exit code, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "torch", "transformers", "pyarrow")


def perceptio(*arguments: str, folder: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflows.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command() -> None:
    done = perceptio("--help")
    assert done.returncode == 0
    commands = "demo run ingest depth masks codebook tokenize assemble train evaluate serve verify rooms schema doctor"
    assert [name for name in commands.split() if f" {name} " not in done.stdout] == []


def test_help_and_refusals_need_no_heavy_import() -> None:
    code = (
        "import sys; from workflows import cli; from typer.testing import CliRunner\n"
        "CliRunner().invoke(cli.app, ['--help']); CliRunner().invoke(cli.app, ['schema'])\n"
        "CliRunner().invoke(cli.app, ['run', '--set', 'train.stepz=1'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_schema_is_the_recipes() -> None:
    done = perceptio("schema")
    assert done.returncode == 0
    assert {"sources", "train", "serve"} <= set(json.loads(done.stdout)["properties"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("igest",), ("igest", "ingest")),
        (("run", "--recipe", "romms"), ("romms", "rooms")),
        (("run", "--recipe", "absent.yaml"), ("absent.yaml", "does not exist")),
        (("run", "--set", "train.stepz=3"), ("train.stepz", "'steps'")),
        (("run", "--set", "train.steps=many"), ("train.steps", "many", "integer")),
        (("run", "--set", "train.steps"), ("train.steps", "=")),
        (("run", "--set", "train.micro_batch=5"), ("micro_batch 5", "global_batch 32")),
        (("run", "--set", "serve.port=99999"), ("serve.port", "99999", "65535")),
        (("rooms", "--count", "3"), ("--out",)),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = perceptio(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


def test_a_recipe_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: [unclosed")
    done = perceptio("run", "--recipe", "mine.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "mine.yaml" in done.stderr
    assert "not YAML" in done.stderr


def test_help_comes_at_once() -> None:
    """Processor time, not the clock's, which says more about what else the machine does."""
    before = os.times()
    began = time.monotonic()
    perceptio("--help")
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert min(spent, time.monotonic() - began) < 2.0
