"""Settings of every test run, made before anything imports torch or ray; and where proofs write what they found.

pytest -m proof                          all proofs, figures into runs/proof
pytest -m proof --proofs-to docs/proof   the same, into the files that are committed (`make proof`)
pytest -m proof --one-proof              a shorter one of those in docs/proof, the next for the next commit
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # its report tries the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

CHECKOUT = Path(__file__).parents[1]
Record = Callable[..., None]
LONGEST_TURN_S = 300  # `.ci/run` has 15 minutes for a proof, on machines of a third of the speed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proofs-to", default="runs/proof", help="folder for the proofs' figures, one JSON file each")
    parser.addoption("--one-proof", action="store_true", help="of the proofs, run the one whose turn it is")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-proof"):
        return
    # those that were run once and passed: of the others nobody knows yet how long they take
    reports = {path.stem: json.loads(path.read_text()) for path in (CHECKOUT / "docs" / "proof").glob("*.json")}
    done = {name for name, found in reports.items() if found["passed"] and found["seconds"] <= LONGEST_TURN_S}
    marked = [item for item in items if item.get_closest_marker("proof")]
    proofs = [item for item in marked if item.name.removeprefix("test_") in done]
    count = int(_git("rev-list", "--count", "HEAD"))  # of commits: the next commit has the next proof
    items[:] = proofs[count % len(proofs) : count % len(proofs) + 1] if proofs else []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Keeps a proof's figures: record(rooms=2000, ...). They are written when the test ends, also where it failed."""
    figures: dict[str, object] = {}
    began = time.monotonic()
    yield figures.update
    report = {
        "proof": request.node.name,
        "passed": not getattr(request.node, "failed", True),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/proof")),
        "seconds": round(time.monotonic() - began, 1),
        "figures": figures,
    }
    path = CHECKOUT / request.config.getoption("--proofs-to") / f"{request.node.name.removeprefix('test_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.failed = report.failed
    return report


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.strip()
