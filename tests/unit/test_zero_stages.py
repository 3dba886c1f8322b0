"""ZeRO's stages: ranks of which one has no masks and no depth end with the same weights as one process with both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import spawn

from tests.tiny import tiny_parts
from tests.zero import trained

STAGES = (1, 2, 3)
ALONE, TOGETHER = [[[0, 2], [1, 3]]], [[[0, 2]], [[1, 3]]]  # the second rank has words alone


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process ends with on both micro-batches, and what two end with on one each, with every stage."""
    folder = tmp_path_factory.mktemp("runs")
    parts = tiny_parts(folder / "parts")
    found = []
    for name, stages, shares in (("alone", (1,), ALONE), ("together", STAGES, TOGETHER)):
        (folder / name).mkdir()
        spawn(trained, (stages, shares, parts, folder / name), nprocs=len(shares))
        found.append(folder / name)
    return found[0], found[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_masks_and_depth_changes_nothing(runs: tuple[Path, Path], stage: int) -> None:
    alone, together = runs
    expected = load_file(alone / "0-1.safetensors")
    assert torch.isfinite(expected["losses"]).all()
    assert expected["losses"][1, 0] < expected["losses"][0, 0]
    for rank in range(2):
        found = load_file(together / f"{rank}-{stage}.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
