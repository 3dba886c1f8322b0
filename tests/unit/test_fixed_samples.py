"""Fixed samples: which they are, what is asked for, how their codes are counted, and a picture of them all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from perceptio.data.collator import Item
from perceptio.data.template import DEPTH_PROMPTS, Dialogue
from workflows.sample_sheet import TILE, Row, Tile, sheet
from workflows.train_samples import SEARCHED, FixedSamples, usage

WORDS, DEPTH, MASKS, BOTH = "words", "depth", "masks", "both"


def item_of(kind: str, position: int) -> Item:
    masks = (np.ones((4, 6), np.bool_),) if kind in (MASKS, BOTH) else ()
    depth = np.zeros((2, 2), np.float32) if kind in (DEPTH, BOTH) else None
    turns = () if kind == DEPTH else (1,)
    dialogue = Dialogue(f"{position}", (), (), (), 0, (), (), (0,) * 4 if depth is not None else (), turns)
    return Item(dialogue, 0, (1, position), np.zeros((4, 6, 3), np.uint8), masks, depth)


@pytest.fixture
def samples_of() -> Callable[..., Any]:
    """The samples of a mixture whose positions have these parts, again and again."""

    def make(*kinds: str, shown: int, steps: int = 10**6) -> Any:
        def row(position: int) -> tuple[None, dict[str, Any]]:
            return None, {"turns": [{"prompt": "never asked"}, {"prompt": f"question {position}"}]}

        train = SimpleNamespace(samples_shown=shown, steps=steps, global_batch=4)
        return SimpleNamespace(
            recipe=SimpleNamespace(train=train),
            item=lambda position: item_of(kinds[position % len(kinds)], position),
            reader=SimpleNamespace(row=row),
            processor=None,
        )

    return make


def chosen(found: FixedSamples) -> list[str]:
    return [item.dialogue.sample_id for item in found.items]


def test_half_of_them_have_masks_and_they_are_the_first(samples_of: Callable[..., Any]) -> None:
    found = FixedSamples.of(samples_of(WORDS, DEPTH, DEPTH, DEPTH, MASKS, BOTH, shown=4), rank=0)
    assert chosen(found) == ["4", "5", "1", "2"]
    said = [(request.question, request.segmentation, request.depth) for request in found.requests]
    assert said == [
        ("question 4", "on", "off"),
        ("question 5", "on", "on"),
        (DEPTH_PROMPTS[0], "off", "on"),
        (DEPTH_PROMPTS[0], "off", "on"),
    ]
    assert chosen(FixedSamples.of(samples_of(DEPTH, MASKS, shown=3), rank=0)) == ["1", "3", "0"]


@pytest.mark.parametrize("kind", [MASKS, BOTH, DEPTH])
def test_where_all_are_alike_they_are_the_first(samples_of: Callable[..., Any], kind: str) -> None:
    assert chosen(FixedSamples.of(samples_of(WORDS, kind, shown=3), rank=0)) == ["1", "3", "5"]


def test_other_ranks_decode_nothing(samples_of: Callable[..., Any]) -> None:
    samples = samples_of(BOTH, shown=2)
    samples.item = pytest.fail
    assert chosen(FixedSamples.of(samples, rank=1)) == []


def test_too_few_are_said(samples_of: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen(FixedSamples.of(samples_of(WORDS, shown=2), rank=0)) == []
        assert chosen(FixedSamples.of(samples_of(WORDS, BOTH, shown=2, steps=1), rank=0)) == ["1", "3"]
        assert chosen(FixedSamples.of(samples_of(WORDS, BOTH, shown=3, steps=1), rank=0)) == ["1", "3"]
    few, fewer = caplog.messages
    assert few.startswith(f"train.samples_shown is 2, but of the mixture's first {SEARCHED} samples only 0 write")
    assert fewer.startswith("train.samples_shown is 3, but of the mixture's first 4 samples only 2 write")


def test_usage_counts_codes_and_how_evenly_they_come() -> None:
    assert usage([3, 3, 3]) == (1, 1.0)
    assert usage([0, 1, 2, 3]) == (4, pytest.approx(4.0))
    share = np.array([0.75, 0.25])
    assert usage([5, 5, 5, 7]) == (2, pytest.approx(np.exp(-(share * np.log(share)).sum())))


def test_the_sheet_has_a_row_a_sample_and_fits_pictures_of_any_shape() -> None:
    red = np.zeros((20, 10, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    mask = np.zeros((20, 10), np.bool_)
    rows = [
        Row("a question | " + "an answer " * 90, [Tile("image", red), Tile("mask", red, mask)]),
        Row("of depth alone", [Tile("image", red), Tile("far", np.zeros((5, 9))), Tile("close", np.ones((5, 9)))]),
    ]
    picture = np.asarray(sheet(rows)).astype(int)
    assert 2 * TILE < picture.shape[0] < 3 * TILE and 3 * TILE < picture.shape[1] < 4 * TILE
    plain = (picture == [255, 0, 0]).all(-1).sum()
    assert plain == 2 * TILE * (TILE // 2), "two images, each as high as its tile and half as wide"
    middle = picture[TILE // 2 + TILE + 40]
    far, close = middle[TILE + 60], middle[2 * TILE + 100]
    assert far.sum() < 30 and close.sum() > 550, "dark is far, bright is close"
