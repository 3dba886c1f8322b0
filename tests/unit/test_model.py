"""The model: what is saved is what is loaded, weights matter, and a codebook of another digest is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codec import DepthCodec
from perceptio.generate import Perceiver, Perception
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.processor import Request
from perceptio.vlm.backbone import load_backbone
from tests.tiny import tiny_model, tiny_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((128, 128), (60, 90))]
    return [
        Request(images[0], "Please segment the lamp.", "on", "on"),
        Request(images[1], "What colour is the lamp?", "off", "auto"),
    ]


def ask(perceiver: Perceiver, **options: bool) -> list[Perception]:
    return perceiver.perceive(requests(), max_new_tokens=4, **options)


def test_round_trip_gives_the_same_answers(folder: Path, tmp_path: Path) -> None:
    first = Perceiver.from_pretrained(str(folder))
    first.model.save_pretrained(tmp_path)
    first.processor.save_pretrained(tmp_path)
    again = Perceiver.from_pretrained(str(tmp_path))
    for a, b in zip(ask(first), ask(again), strict=True):
        assert a.reply == b.reply
        np.testing.assert_array_equal(a.masks_MHW, b.masks_MHW)
        np.testing.assert_array_equal(a.scores_M, b.scores_M)
        assert (a.inv_depth_HW is None) == (b.inv_depth_HW is None)


def test_auto_classes_know_it(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).model_type == "perceptio"
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), PerceptioForConditionalGeneration)


def test_parts_are_at_the_images_own_size(folder: Path) -> None:
    first, second = ask(Perceiver.from_pretrained(str(folder)))
    assert len(first.masks_MHW) == first.reply.objects >= 1
    assert first.masks_MHW.shape[1:] == (128, 128)
    assert first.inv_depth_HW is not None
    assert first.inv_depth_HW.shape == (128, 128)
    assert 0 <= first.inv_depth_HW.min() <= first.inv_depth_HW.max() <= 1
    assert second.masks_MHW.shape == (0, 60, 90)
    assert all(answer.reply.well_formed for answer in (first, second))


def test_without_the_grammar_random_weights_are_malformed(folder: Path) -> None:
    loose = ask(Perceiver.from_pretrained(str(folder)), use_grammar=False)
    assert not all(answer.reply.well_formed for answer in loose)


def test_what_is_written_does_not_depend_on_whether_parts_are_made_of_it(folder: Path) -> None:
    perceiver = Perceiver.from_pretrained(str(folder))
    for made, bare in zip(ask(perceiver), ask(perceiver, make_parts=False), strict=True):
        assert (bare.reply, bare.text, bare.finish) == (made.reply, made.text, made.finish)
        assert len(bare.masks_MHW) == 0 and bare.inv_depth_HW is None
    assert len(ask(perceiver)[0].masks_MHW) > 0 and ask(perceiver)[0].inv_depth_HW is not None


def test_a_request_does_not_depend_on_its_neighbours(folder: Path) -> None:
    perceiver = Perceiver.from_pretrained(str(folder))
    together = ask(perceiver)
    for request, expected in zip(requests(), together, strict=True):
        alone = perceiver.perceive([request], max_new_tokens=4)[0]
        assert alone.reply.codes == expected.reply.codes
        assert alone.reply.objects == expected.reply.objects
        assert alone.text == expected.text


def test_other_weights_give_another_answer(folder: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path, seed=1)
    a, b = (ask(Perceiver.from_pretrained(str(place))) for place in (folder, other))
    assert [answer.reply for answer in a] != [answer.reply for answer in b]


def test_extending_the_base_leaves_its_logits_alone(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path)
    base, processor = load_backbone(parts["base"], dtype=torch.float32)
    known = len(processor.tokenizer)
    model, _ = PerceptioForConditionalGeneration.from_parts(
        parts["base"], parts["sam2"], parts["codebook"], max_objects=2
    )
    ids = torch.tensor([processor.tokenizer.encode("What colour is the lamp?")])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=mask).logits
        found = model.eval()(input_ids=ids, attention_mask=mask).logits[..., :known]
    torch.testing.assert_close(found, expected[..., :known])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_another_codebook_is_refused(folder: Path) -> None:
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    codebook = DepthCodebook(CodebookConfig(image_size=16, codes=8, dim=8, channels=(8, 8, 8), residual_blocks=0))
    codebook.train()
    codebook(torch.rand(16, 16, 16))
    other = DepthCodec(codebook)
    with pytest.raises(ValueError, match=f"{other.digest[:16]}.*{model.config.codebook_digest[:16]}"):
        model.attach_codec(other)


def test_a_folder_without_its_codebook_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "codebook" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"codebook/model\.safetensors"):
        PerceptioForConditionalGeneration.from_pretrained(folder)


def test_a_swapped_codebook_on_disk_is_refused(tmp_path: Path) -> None:
    place = tiny_model(tmp_path)
    tiny_parts(tmp_path / "other", seed=5)
    (place / "codebook" / "model.safetensors").write_bytes(
        (tmp_path / "other" / "codebook" / "model.safetensors").read_bytes()
    )
    own, other = (
        DepthCodebook.from_pretrained(p / "codebook").digest[:16] for p in (tiny_model(tmp_path / "own"), place)
    )
    with pytest.raises(ValueError, match=f"codebook digest is {other}, the model was made with {own}"):
        PerceptioForConditionalGeneration.from_pretrained(place)
