"""Operations of a step: by hand for a model of a few weights, and against torch's own counter on whole batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.flops import Work, model_flops
from perceptio.train.step import Objective, counts_by_source
from perceptio.vlm.backbone import add_lora, set_trainable
from tests.batches import BOTH, DEPTH, ENTRIES, MASKS, WEIGHTS, WORDS, batch_of
from tests.tiny import tiny_parts

WIDTH, MIDDLE, KEYS, LAYERS, RANK = 32, 64, 16, 2, 4
# query, key, value, output; gate, up, down
LANGUAGE = LAYERS * (WIDTH * WIDTH + 2 * WIDTH * KEYS + WIDTH * WIDTH + 3 * WIDTH * MIDDLE)
ADAPTERS = LAYERS * RANK * (2 * 2 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + MIDDLE))
ATTENTION = 4 * LAYERS * WIDTH  # of T^2, forward: scores and what they weigh

Parts = tuple[PerceptioForConditionalGeneration, Any]
ALL = {"vision": True, "projector": True, "language": "full", "embeddings": True}
NONE = {"vision": False, "projector": False, "language": "frozen", "embeddings": False}


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    folders = tiny_parts(tmp_path)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        folders["base"], folders["sam2"], folders["codebook"], max_objects=2
    )
    return model.train(), processor


def test_trained_weights_cost_six_operations_a_token(parts: Parts) -> None:
    model, _ = parts
    set_trainable(model, **ALL)
    found = model_flops(model, soft_maps=True)
    assert found.token == 6 * LANGUAGE
    assert found.square == 3 * ATTENTION
    assert found.supervised == 6 * WIDTH * len(model.get_input_embeddings().weight)
    assert model_flops(model, soft_maps=False) == dataclasses.replace(found, depth_map=0.0)


def test_frozen_weights_cost_four_where_a_gradient_flows_through_them_and_two_where_none_does(parts: Parts) -> None:
    model, _ = parts
    set_trainable(model, **NONE | {"projector": True})
    through = model_flops(model, soft_maps=True)
    set_trainable(model, **NONE)
    none = model_flops(model, soft_maps=True)
    head = WIDTH * len(model.get_input_embeddings().weight)
    assert (through.token, through.square, through.supervised) == (4 * LANGUAGE, 3 * ATTENTION, 4 * head)
    assert (none.token, none.square, none.supervised) == (2 * LANGUAGE, ATTENTION, 2 * head)
    assert none.image == through.image > 0, "SAM2's trunk is frozen in both, its two convolutions train in both"


def test_low_rank_layers_cost_six_beside_four_of_what_they_adapt(parts: Parts) -> None:
    model, _ = parts
    add_lora(model, rank=RANK, alpha=8, dropout=0.0)
    set_trainable(model)
    assert model_flops(model, soft_maps=True).token == 4 * LANGUAGE + 6 * ADAPTERS


def test_vision_that_is_frozen_costs_a_third(parts: Parts) -> None:
    model, _ = parts
    of = {}
    for trained in (True, False):
        set_trainable(model, **ALL | {"vision": trained, "projector": trained})
        of[trained] = model_flops(model, soft_maps=True).image_token
    assert of[False] == pytest.approx(of[True] / 3, rel=0.1), "but for the patches, whose pixels need no gradient"


@pytest.mark.parametrize("numbers", [[(0, BOTH)], [(1, MASKS)], [(1, DEPTH)], [(0, BOTH), (1, MASKS)]])
@pytest.mark.parametrize("trained", ["all", "lineage"])
def test_a_whole_steps_operations_are_what_torch_counts(parts: Parts, numbers: list[Any], trained: str) -> None:
    model, _ = parts
    image_slot = model.config.image_token_id
    if trained == "all":
        set_trainable(model, **ALL)
    else:
        add_lora(model, rank=RANK, alpha=8, dropout=0.0)
        set_trainable(model)
    for losses in (WEIGHTS, WEIGHTS.model_copy(update={"reconstruction": 0.0})):
        flops = model_flops(model, soft_maps=losses.reconstruction > 0)
        counted, work = 0.0, Work()
        for number in numbers:
            batch = batch_of(parts, [number])
            objective, counts_C = Objective(model, losses, len(ENTRIES)), counts_by_source([batch], len(ENTRIES)).sum(0)
            counter = FlopCounterMode(display=False)
            with counter, sdpa_kernel(SDPBackend.MATH):
                objective(batch, counts_C)[0].backward()
            counted += counter.get_total_flops()
            if number[1] not in (BOTH, MASKS):
                counted -= flops.image + flops.mask  # of a blank image, so that each rank runs the same parts
            padded = batch.input_ids_BT.shape[1]  # to a multiple of 8, which the model does not need
            work += dataclasses.replace(Work.of([batch], image_slot), tokens=padded, squares=padded**2)
        assert flops.of(work) == pytest.approx(counted, rel=1e-4)


def test_the_work_of_a_batch_is_that_of_its_samples(parts: Parts) -> None:
    image_slot = parts[0].config.image_token_id
    whole = Work.of([batch_of(parts, [(0, BOTH), (1, MASKS), (2, WORDS), (3, DEPTH)])], image_slot)
    apart = [Work.of([batch_of(parts, [one])], image_slot) for one in [(0, BOTH), (1, MASKS), (2, WORDS), (3, DEPTH)]]
    assert whole == sum(apart, Work())
    assert whole.counts().tolist() == list(dataclasses.astuple(whole))
    assert (whole.images, whole.masks, whole.depth_maps) == (2, 4, 2)
    assert whole.image_tokens == 4 * parts[1].image_seq_length and whole.squares == sum(w.tokens**2 for w in apart)


def test_counting_leaves_the_model_as_it_is(parts: Parts) -> None:
    model, _ = parts
    set_trainable(model, **ALL)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model_flops(model, soft_maps=True)
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    batch = batch_of(parts, [(0, BOTH), (1, WORDS)])
    loss, _ = Objective(model, WEIGHTS, len(ENTRIES))(batch, counts_by_source([batch], len(ENTRIES)).sum(0))
    loss.backward()
    assert torch.isfinite(loss), "and it still trains, with no part left on the meta device"
