"""ZeRO's stages: ranks that lack masks, depth or images move every weight as one process with all samples does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import spawn

from tests.batches import BOTH, DEPTH, MASKS, WORDS
from tests.tiny import tiny_parts
from tests.zero import Micro, trained

STAGES = (1, 2, 3)
# A global batch is two micro-batches: one process reads both, or two ranks read one each.
GLOBAL_BATCHES = {
    "masks and depth beside words": (Micro(((0, BOTH), (2, BOTH))), Micro(((1, WORDS), (3, WORDS)))),
    "masks alone beside depth alone": (Micro(((0, MASKS), (2, MASKS))), Micro(((1, DEPTH), (3, DEPTH)))),
    "images beside none": (Micro(((0, BOTH), (2, BOTH))), Micro(((1, WORDS), (3, WORDS)), images=False)),
}
Runs = dict[str, Path]


@pytest.fixture(scope="module", params=[None, 200], ids=["padded", "packed"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """For each global batch a folder with what one process ends with, and what two end with at every stage."""
    folder = tmp_path_factory.mktemp("runs")
    parts = tiny_parts(folder / "parts")
    found = {}
    for name, micros in GLOBAL_BATCHES.items():
        for world, stages, shares in ((1, (1,), [micros]), (2, STAGES, [(micro,) for micro in micros])):
            out = folder / name / str(world)
            out.mkdir(parents=True)
            spawn(trained, (stages, shares, parts, request.param, out), nprocs=world)
        found[name] = folder / name
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", GLOBAL_BATCHES)
def test_what_a_rank_lacks_changes_nothing(runs: Runs, name: str, stage: int) -> None:
    expected = load_file(runs[name] / "1" / "0-1.safetensors")
    assert torch.isfinite(expected["losses"]).all()
    assert expected["losses"][1, 0] < expected["losses"][0, 0]
    starts = {key.removeprefix("start."): start for key, start in expected.items() if key.startswith("start.")}
    for rank in range(2):
        found = load_file(runs[name] / "2" / f"{rank}-{stage}.safetensors")
        assert found.keys() == expected.keys()
        for key in ("losses", "gradient_norms"):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)
        for key, start in starts.items():
            move, expected_move = found[key] - start, expected[key] - start
            allowed = 1e-3 * expected_move.norm() + 3e-6 * start.norm()  # float rounding of the weights themselves
            assert (move - expected_move).norm() <= allowed, key
        still = [key for key, start in starts.items() if torch.equal(expected[key], start)]
        assert still == [], "weights that no sample moved"
