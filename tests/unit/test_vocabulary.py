"""Spatial tokens: one spelling, contiguous ids, and refusals that name both sides."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perceptio.vocabulary import SpatialVocabulary, extend_tokenizer, spatial_tokens


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"sure": 0, ",": 1, ".": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def test_tokens_are_seg_then_the_depth_block() -> None:
    assert spatial_tokens(2) == ["[SEG]", "<|depth_start|>", "<|depth_0|>", "<|depth_1|>", "<|depth_end|>"]


def test_extension_adds_one_id_per_token_after_the_old_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = extend_tokenizer(tokenizer, 3)
    assert len(tokenizer) == 4 + 6
    assert vocabulary.code_ids == range(6, 9)
    assert tokenizer("sure, [SEG]<|depth_start|><|depth_2|><|depth_end|>.").input_ids == [0, 1, 4, 5, 8, 9, 2]


def test_extension_is_idempotent_and_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = extend_tokenizer(tokenizer, 3)
    assert extend_tokenizer(tokenizer, 3) == first
    assert len(tokenizer) == 10
    tokenizer.save_pretrained(tmp_path)
    assert SpatialVocabulary.of(PreTrainedTokenizerFast.from_pretrained(tmp_path), 3) == first


@pytest.mark.parametrize("other", [2, 4])
def test_another_number_of_codes_is_refused(tokenizer: PreTrainedTokenizerFast, other: int) -> None:
    extend_tokenizer(tokenizer, 3)
    with pytest.raises(ValueError, match=rf"3 depth codes, got {other}"):
        extend_tokenizer(tokenizer, other)
    with pytest.raises(ValueError, match="3"):
        SpatialVocabulary.of(tokenizer, other)


@pytest.mark.parametrize("own", [["[SEG]"], ["<|depth_start|>", "<|depth_0|>", "<|depth_1|>", "<|depth_2|>"]])
def test_a_tokenizer_with_some_of_the_tokens_is_refused_and_left_alone(
    tokenizer: PreTrainedTokenizerFast, own: list[str]
) -> None:
    tokenizer.add_tokens([*own, "<another>"])
    before = len(tokenizer)
    with pytest.raises(ValueError, match=rf"it has \['{re.escape(own[0])}'.* of the 6 spatial tokens for 3 codes"):
        extend_tokenizer(tokenizer, 3)
    assert len(tokenizer) == before


def test_unextended_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="missing"):
        SpatialVocabulary.of(tokenizer, 3)


def test_codes_and_ids_are_inverse_and_checked(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = extend_tokenizer(tokenizer, 3)
    assert vocabulary.codes_of_ids(vocabulary.ids_of_codes([2, 0, 1])) == [2, 0, 1]
    assert vocabulary.block_of_codes([1]) == [vocabulary.depth_start_id, 7, vocabulary.depth_end_id]
    with pytest.raises(ValueError, match="got 3, expected 0 to 2"):
        vocabulary.ids_of_codes([0, 3])
    with pytest.raises(ValueError, match="got -1"):
        vocabulary.ids_of_codes([-1])
    with pytest.raises(ValueError, match=f"got {vocabulary.seg_id}, expected a depth code's, 6 to 8"):
        vocabulary.codes_of_ids([vocabulary.seg_id])


def test_skipping_special_tokens_leaves_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = extend_tokenizer(tokenizer, 3)
    ids = [vocabulary.seg_id, *vocabulary.block_of_codes([0, 1]), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sure"


def test_zero_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        spatial_tokens(0)


def test_module_does_not_import_torch() -> None:
    check = "import sys, perceptio.vocabulary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
