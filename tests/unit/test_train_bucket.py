"""Micro-batches by length: the same samples, the same loss and gradients, less padding; and blanks change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from perceptio.data.collator import Batch, blank, collate
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import PerceptioProcessor
from perceptio.segmentation.sam2_image import preprocess
from perceptio.train.feed import Feed, Samples
from perceptio.train.step import Objective, counts_by_source
from perceptio.vlm.backbone import set_trainable
from schemas.recipe import Recipe
from tests.batches import WEIGHTS
from tests.tables import fill, published, recipe_in
from tests.tiny import tiny_parts
from workflows.store import open_root

GLOBAL, MICRO, STEPS = 16, 4, 3
SIZES = {"train__steps": 6, "train__global_batch": GLOBAL, "train__micro_batch": MICRO, "train__streams": 4}
SIZES |= {"train__workers": 2, "train__allowed_workers": [1, 2, 4]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe on a few rooms, whose dialogues have one turn or many; and the parts."""
    folder = tmp_path_factory.mktemp("bucket")
    parts = tiny_parts(folder / "parts")
    task = {"source": "training", "depth": False, "weight": 1}
    mixture = [task | {"segmentation": True, "name": "short"}]
    mixture += [task | {"segmentation": False, "name": "long", "max_turns": 5}]
    recipe = recipe_in(folder / "root", folder / "parts", **SIZES, train__mixture=mixture)
    root = open_root(recipe.root)
    fill(recipe, root, published(root, parts["codebook"], "codebook", {}))
    return recipe, folder / "parts"


def global_batches(made: tuple[Recipe, Path], bucket: bool, world: int = 1) -> list[list[Batch]]:
    recipe, parts = made
    train = recipe.train.model_copy(update={"bucket": bucket})
    processor = PerceptioProcessor.from_pretrained(parts / "base", codebook=parts / "codebook")
    samples = Samples.open(recipe.model_copy(update={"train": train}), processor, world=world)
    feed = Feed(samples, 64)
    return [
        [b for rank in range(world) for b in feed.batches(step, rank=rank, world=world, micro_batch=MICRO)]
        for step in range(STEPS)
    ]


def lengths(batch: Batch) -> list[int]:
    found: list[int] = batch.attention_mask_BT.sum(1).tolist()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_global_batch_keeps_its_samples_and_each_worker_its_own(made: tuple[Recipe, Path], world: int) -> None:
    plain, ordered = global_batches(made, False, world), global_batches(made, True, world)
    assert any(
        b.positions != a.positions for x, y in zip(plain, ordered, strict=True) for b, a in zip(x, y, strict=True)
    )
    each = GLOBAL // world // MICRO
    for before, after in zip(plain, ordered, strict=True):
        assert [len(batch.positions) for batch in after] == [MICRO] * (GLOBAL // MICRO)
        for rank in range(0, len(before), each):
            own = [{p for b in batches[rank : rank + each] for p in b.positions} for batches in (before, after)]
            assert own[0] == own[1]
            by_length = [
                (n, p) for b in after[rank : rank + each] for n, p in zip(lengths(b), b.positions, strict=True)
            ]
            assert by_length == sorted(by_length)


def test_there_is_less_padding(made: tuple[Recipe, Path]) -> None:
    def padding(steps: Sequence[Sequence[Batch]]) -> int:
        masks = [batch.attention_mask_BT for batches in steps for batch in batches]
        return sum(mask.numel() - int(mask.sum()) for mask in masks)

    assert padding(global_batches(made, True)) < 0.7 * padding(global_batches(made, False))


def gradients(
    model: PerceptioForConditionalGeneration, batches: Sequence[Batch]
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and sums by source of a global batch."""
    model.zero_grad()
    objective, total = Objective(model, WEIGHTS, 2), 0.0
    counts_QC = counts_by_source(batches, 2)
    sums_QC = torch.zeros_like(counts_QC)
    for batch in batches:
        loss, sums = objective(batch, counts_QC.sum(0))
        loss.backward()
        total, sums_QC = total + loss.item(), sums_QC + sums
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums_QC


def test_loss_and_gradients_stay_and_a_blank_adds_nothing(made: tuple[Recipe, Path]) -> None:
    parts = made[1]
    model, processor = PerceptioForConditionalGeneration.from_parts(
        parts / "base", parts / "sam2", parts / "codebook", max_objects=2
    )
    set_trainable(model, vision=True, projector=True, language="full", embeddings=True)
    nothing = collate(
        [blank(processor, key=(0, 0))], processor=processor, sam2_pixels=preprocess, sam2_size=64, max_length=512
    )
    (plain, *_), (ordered, *_) = global_batches(made, False), global_batches(made, True)
    loss, grads, sums_QC = gradients(model.train(), plain)
    assert loss > 0 and (sums_QC.sum(1) > 0).all()
    for other in (ordered, [*plain, nothing]):
        other_loss, other_grads, other_sums_QC = gradients(model, other)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other_sums_QC, sums_QC, rtol=1e-4, atol=1e-5)
        assert other_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    alone, none, nothing_QC = gradients(model, [nothing])
    assert alone == 0 and not nothing_QC.any()
    assert none.keys() == grads.keys() and all(not grad.any() for grad in none.values()), "all parts run, none learns"
