"""The objective: how a global batch is cut does not matter, and a batch without a part trains on in peace."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from perceptio.data.collator import Batch
from perceptio.data.packing import Packing
from perceptio.data.template import LossKind
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.train.optim import parameter_groups
from perceptio.train.step import TERMS, Objective, counts_by_source, train_step
from perceptio.vlm.backbone import set_trainable
from schemas.recipe_file import load_recipe
from schemas.training import LossWeights
from tests.batches import BOTH, DEPTH, ENTRIES, MASKS, WEIGHTS, WORDS, batch_of, without_images
from tests.tiny import tiny_parts


@pytest.fixture(scope="module", params=[("qwen2", True), ("llama", False)], ids=["qwen2 tied", "llama untied"])
def parts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PerceptioForConditionalGeneration, Any]:
    text_model, tied = request.param
    folders = tiny_parts(tmp_path_factory.mktemp("parts"), text_model=text_model, tied=tied)
    model, processor = PerceptioForConditionalGeneration.from_parts(
        folders["base"], folders["sam2"], folders["codebook"], max_objects=2
    )
    set_trainable(model, vision=True, projector=True, language="full", embeddings=True)
    return model.train(), processor


def gradients(
    parts: tuple[PerceptioForConditionalGeneration, Any], batches: Sequence[Batch], packed_to: int | None = None
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and sums by source of a global batch cut into these micro-batches."""
    model, _ = parts
    model.zero_grad()
    objective = Objective(model, WEIGHTS, len(ENTRIES), packed_to=packed_to)
    counts_C = counts_by_source(batches, len(ENTRIES)).sum(0)
    total, sums_QC = 0.0, torch.zeros(len(ENTRIES), len(TERMS))
    for batch in batches:
        loss, sums = objective(batch, counts_C)
        loss.backward()
        total, sums_QC = total + loss.item(), sums_QC + sums
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, grads, sums_QC


MIXED = [(0, 0), (1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("packed_to", [1, 512, 4096])
def test_packing_changes_neither_loss_nor_gradient(parts: Any, packed_to: int) -> None:
    batch = batch_of(parts, MIXED)
    loss, padded, sums_QC = gradients(parts, [batch])
    packed_loss, packed, packed_sums_QC = gradients(parts, [batch], packed_to)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(packed_sums_QC, sums_QC, rtol=1e-5, atol=1e-6)
    assert packed.keys() == padded.keys()
    for name, grad in padded.items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    lengths_B = batch.attention_mask_BT.sum(1).tolist()
    rows = Packing.of(lengths_B, packed_to).row_B[-1] + 1
    assert rows == len(MIXED) if packed_to == 1 else rows < len(MIXED)


def test_packing_is_refused_under_an_attention_that_reads_its_mask_otherwise(parts: Any) -> None:
    model, processor = copy.deepcopy(parts[0]), parts[1]
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention is 'eager', expected 'sdpa' where samples are packed"):
        gradients((model, processor), [batch_of(parts, MIXED)], 512)


@pytest.mark.parametrize("packed_to", [None, 512])
def test_words_alone_are_read_as_the_text_model_reads_them(parts: Any, packed_to: int | None) -> None:
    model, _ = parts
    batch = without_images(parts, batch_of(parts, [(1, 1), (3, 1), (2, 1)]))
    with torch.no_grad():
        found_BTD = model.hidden_states(
            batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values, packed_to=packed_to
        )
        plain_BTD = model.model.language_model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT
        ).last_hidden_state
    seen_BT = batch.attention_mask_BT.bool()
    torch.testing.assert_close(found_BTD[seen_BT], plain_BTD[seen_BT], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed_to", [None, 512])
def test_recomputing_activations_changes_neither_loss_nor_gradient(parts: Any, packed_to: int | None) -> None:
    loss, kept, _ = gradients(parts, [batch_of(parts, MIXED)], packed_to)
    model, processor = copy.deepcopy(parts[0]), parts[1]
    model.activation_checkpointing_enable({"use_reentrant": False})
    seen: list[int] = []
    model.model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: seen.append(1))
    again_loss, again, _ = gradients((model, processor), [batch_of(parts, MIXED)], packed_to)
    assert len(seen) == 2, "a layer runs again in the backward pass"
    assert again_loss == loss
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_row_is_full_before_the_next_begins() -> None:
    assert Packing.of([5, 3, 4, 2, 8], 8).row_B == (0, 0, 1, 1, 2)
    assert Packing.of([5, 3, 4, 2, 8], 8).start_B == (0, 5, 0, 4, 0)


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 1], [2, 0]]])
def test_cutting_the_global_batch_changes_neither_loss_nor_gradient(parts: Any, cut: list[list[int]]) -> None:
    loss, whole, sums_QC = gradients(parts, [batch_of(parts, MIXED)])
    cut_loss, pieces, cut_sums_QC = gradients(parts, [batch_of(parts, [MIXED[i] for i in piece]) for piece in cut])
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(cut_sums_QC, sums_QC, rtol=1e-4, atol=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_every_term_is_there_and_named_by_source(parts: Any) -> None:
    _, _, sums_QC = gradients(parts, [batch_of(parts, MIXED)])
    assert (sums_QC[BOTH] > 0).all(), dict(zip(TERMS, sums_QC[BOTH].tolist(), strict=True))
    only_text = {term for term, value in zip(TERMS, sums_QC[WORDS].tolist(), strict=True) if value != 0}
    assert only_text == {"text"}
    assert (sums_QC[[MASKS, DEPTH]] == 0).all()  # no sample of these sources


def test_a_batch_without_masks_or_depth_reaches_every_trained_parameter(parts: Any) -> None:
    _, full, _ = gradients(parts, [batch_of(parts, [(0, 0), (1, 1)])])
    loss, plain, _ = gradients(parts, [batch_of(parts, [(1, 1), (3, 1)])])
    assert np.isfinite(loss)
    assert set(plain) == set(full)  # a rank that skips a part makes the others wait for ever
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
    assert all((plain[name] == 0).all() for name in plain if name.startswith("segmenter."))


@pytest.mark.parametrize("packed_to", [None, 512])
def test_a_batch_without_images_reaches_every_trained_parameter(parts: Any, packed_to: int | None) -> None:
    _, full, _ = gradients(parts, [batch_of(parts, MIXED)])
    words = without_images(parts, batch_of(parts, [(1, 1), (3, 1)]))
    loss, plain, sums_QC = gradients(parts, [words], packed_to)
    assert np.isfinite(loss) and sums_QC[:, TERMS.index("text")].sum() > 0
    assert set(plain) == set(full)  # a rank that skips a part makes the others wait for ever
    seeing = [name for name in plain if ".vision_tower." in name or ".multi_modal_projector." in name]
    assert seeing and all((plain[name] == 0).all() for name in seeing)


def test_the_output_head_sees_supervised_positions_alone(parts: Any) -> None:
    model, _ = parts
    batch, rows = batch_of(parts, MIXED), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape))
    gradients(parts, [batch])
    hook.remove()
    supervised = int((batch.loss_kind_BT != LossKind.IGNORE).sum())
    assert rows == [(supervised, model.config.get_text_config().hidden_size)]
    assert supervised < batch.input_ids_BT.numel() / 2


# Of a term, and of the gradient of a part by its cosine, in bfloat16 beside float32. Products alone are rounded under
# autocast; with weights in bfloat16 what is between them is rounded too.
BF16_TERMS = {"autocast": 0.01, "weights": 0.02}
BF16_COSINES = {"autocast": 0.99, "weights": 0.99}


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_changes_terms_and_gradients_by_little(parts: Any, how: str) -> None:
    model, processor = copy.deepcopy(parts[0]), parts[1]
    torch.manual_seed(0)
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name else 0.2)  # so that every state has its own words
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    batch = batch_of(parts, MIXED)
    _, exact, exact_QC = gradients((model, processor), [batch])
    mean_nll = exact_QC[:, TERMS.index("text")].sum() / counts_by_source([batch], len(ENTRIES))[:, 0].sum()
    assert abs(mean_nll - np.log(model.config.get_text_config().vocab_size)) > 0.5, "it must know more than nothing"
    if how == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        _, rough, rough_QC = gradients((model, processor), [batch])
    for column, term in enumerate(TERMS):
        near = pytest.approx(exact_QC[:, column].tolist(), rel=BF16_TERMS[how])
        assert rough_QC[:, column].tolist() == near, term
    groups: dict[str, list[str]] = defaultdict(list)
    for name in exact:
        groups[".".join(name.split(".")[:2])].append(name)
    assert len(groups) >= 4
    for group, names in groups.items():
        a, b = (torch.cat([grads[name].float().flatten() for name in names]) for grads in (exact, rough))
        assert torch.cosine_similarity(a, b, 0) > BF16_COSINES[how], group
        assert a.norm() > 0


class Engine:
    """DeepSpeed's side of a step: gradients come as they are, nothing is updated."""

    device = torch.device("cpu")

    def __init__(self, objective: Objective) -> None:
        self.module = objective

    def __call__(self, batch: Batch, counts_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.module(batch, counts_C)
        return found

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return bool(np.isfinite(self.get_global_grad_norm()))

    def get_global_grad_norm(self) -> float:
        return float(torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None]).norm())


def test_a_step_that_is_skipped_names_the_samples_whose_loss_is_no_number(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(parts[0])
    sources = [entry.source for entry in ENTRIES]
    batch, other = (batch_of(parts, numbers) for numbers in (MIXED[:2], MIXED[2:]))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        engine = Engine(Objective(model, WEIGHTS, len(ENTRIES)))
        report = train_step(engine, [batch, other], sources)
        assert report.gradient_norm > 0 and report.skipped == ()
        assert list(report.times) == ["forward", "backward", "optimizer"]
        assert report.times["backward"] > report.times["optimizer"] >= 0, "this engine's step does nothing"
        spoilt = dataclasses.replace(other, pixel_values=other.pixel_values * float("nan"))
        assert train_step(engine, [batch, spoilt], sources).skipped == other.sample_ids
        with monkeypatch.context() as taken:
            taken.setattr(Engine, "was_step_applied", lambda _: True)
            with pytest.raises(FloatingPointError, match="a step was taken with loss nan and gradient norm nan"):
                train_step(engine, [batch, spoilt], sources)
        model.zero_grad()
        norms = iter([float("inf")])
        monkeypatch.setattr(Engine, "get_global_grad_norm", lambda _: next(norms))
        all_of_them = train_step(engine, [batch, other], sources)
        assert all_of_them.skipped == (*batch.sample_ids, *other.sample_ids), (
            "each loss is a number, the gradient is not"
        )
        assert np.isfinite(all_of_them.loss)
    finally:
        torch.distributed.destroy_process_group()


def test_plain_next_token_loss_is_the_mean_over_all_tokens_of_the_reply(parts: Any) -> None:
    model, _ = parts
    zero = dict.fromkeys(("marker", "token", "count", "reconstruction"), 0.0)
    with pytest.raises(ValidationError, match="plain is true, so marker, token, count, reconstruction have no tokens"):
        LossWeights(**(WEIGHTS.model_dump() | {"plain": True}))
    plain = LossWeights(**(WEIGHTS.model_dump() | zero | {"plain": True}))
    usual, all_text = batch_of(parts, MIXED), batch_of(parts, MIXED, plain=True)
    found = []
    for weights, batch in ((WEIGHTS, usual), (plain, all_text)):
        counts_QC = counts_by_source([batch], len(ENTRIES))
        _, sums_QC = Objective(model, weights, len(ENTRIES))(batch, counts_QC.sum(0))
        found.append((dict(zip(TERMS, sums_QC.sum(0).tolist(), strict=True)), counts_QC.sum(0)[:3].sum().item()))
    (apart, tokens), (together, same_tokens) = found
    assert same_tokens == tokens
    assert together["text"] == pytest.approx(apart["text"] + apart["marker"] + apart["token"], rel=1e-5)
    assert not counts_by_source([batch_of(parts, MIXED, plain=True)], len(ENTRIES))[:, TERMS.index("count")].any()
    assert together["marker"] == together["token"] == together["count"] == together["reconstruction"] == 0


def test_only_wanted_parts_train(parts: Any) -> None:
    _, full, _ = gradients(parts, [batch_of(parts, MIXED)])
    trained = {name for name in full if name.startswith("segmenter.")}
    assert any("sam_mask_decoder" in name for name in trained)
    assert any("projector" in name for name in trained)
    assert not any("image_encoder" in name or "prompt_encoder" in name for name in trained)


def test_counts_are_tokens_and_samples(parts: Any) -> None:
    batch = batch_of(parts, MIXED)
    counts = dict(zip(TERMS, counts_by_source([batch], 2)[0].tolist(), strict=True))
    text = int((batch.loss_kind_BT[[0, 2]] == LossKind.TEXT).sum())
    assert counts == {
        "text": text,
        "marker": 4,
        "token": 8,
        "count": 2,
        "reconstruction": 2,
        "mask_bce": 2,
        "mask_dice": 2,
    }


def test_groups_hold_every_trained_parameter_once(parts: Any) -> None:
    model, _ = parts
    recipe = load_recipe(Path("workflows/recipes/rooms.yaml")).train
    groups = parameter_groups(model, recipe)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["masks"] == recipe.mask_learning_rate
    assert rates["projector"] == recipe.projector_learning_rate
    assert rates["embeddings, not decayed"] == recipe.embedding_learning_rate
    assert rates["language"] == recipe.learning_rate
    assert all(group["weight_decay"] == 0 for group in groups if "not decayed" in group["name"])
