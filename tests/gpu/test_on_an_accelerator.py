"""What must be the same on an accelerator as on the CPU; run by `perceptio doctor --gpu`, or `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perceptio.depth.codec import DepthCodec
from perceptio.generate import Perceiver
from perceptio.processor import Request
from perceptio.train.optim import computes_bf16
from tests.tiny import random_codebook, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: run on a machine that has one"),
]


def test_codes_are_those_of_the_cpu() -> None:
    maps_BHW = torch.rand(64, 32, 32, generator=torch.Generator().manual_seed(0))
    codec = DepthCodec(random_codebook())
    expected = codec.encode(maps_BHW)
    found = codec.to("cuda").encode(maps_BHW.cuda())
    assert torch.equal(found.cpu(), expected)
    alone = torch.cat([codec.encode(map_HW[None].cuda()) for map_HW in maps_BHW])
    assert torch.equal(alone, found)


def test_replies_are_those_of_the_cpu(tmp_path: Path) -> None:
    folder, rng = tiny_model(tmp_path), np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "Please segment the lamp.", "on", "on")
        for _ in range(4)
    ]
    expected = Perceiver.from_pretrained(folder).perceive(requests, max_new_tokens=4)
    perceiver = Perceiver.from_pretrained(folder)
    perceiver.model.to("cuda")  # type: ignore[arg-type]  # its wrapper hides nn.Module.to
    for one, other in zip(perceiver.perceive(requests, max_new_tokens=4), expected, strict=True):
        assert one.reply == other.reply
        assert np.mean(one.masks_MHW != other.masks_MHW) < 1e-3


def test_bf16_is_computed_and_not_emulated() -> None:
    assert computes_bf16(torch.device("cuda"))
