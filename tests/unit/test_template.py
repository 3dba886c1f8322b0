"""Dialogues: what is asked, what is answered, and which loss each position belongs to."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perceptio.data.masks import masks_to_rle
from perceptio.data.template import DEPTH_PROMPTS, Dialogue, LossKind, Part, prompt_ids, render, reply_ids
from perceptio.vocabulary import SpatialVocabulary, extend_tokenizer
from schemas.recipe import MixtureEntry

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
K, N = 4, 3


def make_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with InternVL's image tokens and chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=IMAGE,
        chat_template=template,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, K)
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> SpatialVocabulary:
    return SpatialVocabulary.of(tokenizer, K)


def turn(kind: str, prompt: str, answer: str, objects: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"kind": kind, "form": "", "prompt": prompt, "answer": answer, "expression": "", "objects": list(objects),
            "choices": []}  # fmt: skip


def sample(**changes: Any) -> dict[str, Any]:
    mask = {"height": 2, "width": 2, "counts": "04"}
    row = {
        "id": "0123456789abcdef",
        "turns": [turn("referring", "Segment the lamp.", "Sure.", (1, 0)), turn("count", "How many?", "2")],
        "masks": [mask, mask],
        "codes": [3, 0, 3],
    }
    return row | changes


def entry(**changes: Any) -> MixtureEntry:
    fields: dict[str, Any] = {"source": "s", "weight": 1, "segmentation": True, "depth": True} | changes
    return MixtureEntry(**fields)


@pytest.fixture
def write(tokenizer: PreTrainedTokenizerFast, vocabulary: SpatialVocabulary) -> Any:
    def write(row: dict[str, Any], mixed: MixtureEntry, position: int = 0, **more: Any) -> Dialogue:
        settings = {
            "key": (7, position),
            "max_objects": 5,
            "image_tokens": 2,
            "depth_tokens": len(row["codes"] or ()),
        } | more
        return render(row, mixed, vocabulary, tokenizer, **settings)

    return write


def spoken(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def test_another_number_of_codes_is_refused_with_both(write: Any) -> None:
    with pytest.raises(ValueError, match=r"sample 0123456789abcdef: 3 depth codes, expected 4: tokenize its source"):
        write(sample(), entry(), depth_tokens=4)
    assert write(sample(), entry(depth=False), depth_tokens=4).codes == ()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_the_dialogues_leaves_the_parts_to_the_model(write: Any, tokenizer: Any, share: float) -> None:
    said = [spoken(tokenizer, write(sample(), entry(), p, auto_share=share).input_ids) for p in range(20)]
    assert {"depth: auto" in text for text in said} == {share == 1}


def test_reply_is_objects_then_depth_then_text(write: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = write(sample(), entry(kinds=["referring"]))
    reply = [i for i, kind in zip(dialogue.input_ids, dialogue.loss_kinds, strict=True) if kind]
    assert spoken(tokenizer, reply) == (
        "[SEG][SEG]<|depth_start|><|depth_3|><|depth_0|><|depth_3|><|depth_end|>Sure.<|im_end|>"
    )
    assert dialogue.objects == (1, 0)
    assert dialogue.codes == (3, 0, 3)


def test_loss_kinds_name_markers_codes_and_text(write: Any) -> None:
    dialogue = write(sample(), entry(kinds=["referring"]))
    kinds = [kind for kind in dialogue.loss_kinds if kind]
    text, marker, token = LossKind.TEXT, LossKind.MARKER, LossKind.TOKEN
    assert kinds == [text, text, marker, token, token, token, marker, *[text] * len("Sure."), text]
    assert len(dialogue.loss_kinds) == len(dialogue.input_ids)
    assert dialogue.loss_kinds[: -len(kinds)] == (LossKind.IGNORE,) * (len(dialogue.input_ids) - len(kinds))


def test_a_block_may_stand_behind_the_text_and_all_may_count_as_text(
    write: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    usual = write(sample(), entry(kinds=["referring"]))
    after = write(sample(), entry(kinds=["referring"]), depth_after_text=True)
    reply = spoken(tokenizer, after.target_ids).rpartition("assistant\n")[2]
    assert reply == "[SEG][SEG]Sure.<|depth_start|><|depth_3|><|depth_0|><|depth_3|><|depth_end|><|im_end|>"
    assert sorted(after.target_ids) == sorted(usual.target_ids)
    assert [kind for kind in after.loss_kinds if kind][-6:] == [2, 3, 3, 3, 2, 1]
    plain = write(sample(), entry(kinds=["referring"]), plain=True)
    assert plain.target_ids == usual.target_ids
    assert [bool(kind) for kind in plain.loss_kinds] == [bool(kind) for kind in usual.loss_kinds]
    assert set(plain.loss_kinds) == {LossKind.IGNORE, LossKind.TEXT}


def test_seg_positions_are_where_seg_is_the_input(write: Any, vocabulary: SpatialVocabulary) -> None:
    dialogue = write(sample(), entry(kinds=["referring"]))
    assert [dialogue.input_ids[t] for t in dialogue.seg_positions] == [vocabulary.seg_id] * 2


def test_noise_changes_codes_that_are_read_and_nothing_else(write: Any, vocabulary: SpatialVocabulary) -> None:
    row, codes = sample(codes=[3] * 400), set(vocabulary.code_ids)
    clean, noised = (write(row, entry(kinds=["referring"]), code_noise=noise) for noise in (0, 0.5))
    assert clean.input_ids == clean.target_ids == noised.target_ids
    assert noised.loss_kinds == clean.loss_kinds
    pairs = list(zip(noised.input_ids, noised.target_ids, strict=True))
    changed = [read for read, written in pairs if read != written]
    assert set(changed) <= codes
    assert all(written in codes for read, written in pairs if read != written)
    assert len(changed) / 400 == pytest.approx(0.5 * (1 - 1 / len(codes)), abs=0.1)
    assert noised == write(row, entry(kinds=["referring"]), code_noise=0.5)


@pytest.mark.parametrize("segmentation", ["auto", "on", "off"])
def test_prompt_holds_control_line_image_and_question(tokenizer: PreTrainedTokenizerFast, segmentation: Part) -> None:
    ids = prompt_ids(tokenizer, "What is it?", segmentation=segmentation, depth="off", image_tokens=3)
    assert spoken(tokenizer, ids) == (
        f"<|im_start|>system\nsegmentation: {segmentation}, depth: off<|im_end|>\n<|im_start|>user\n"
        "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_and_asking_build_the_same_prompt(write: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    row = sample(turns=[turn("count", "How many?", "2")])
    seen = set()
    for position in range(40):
        dialogue = write(row, entry(), position)
        ids = list(dialogue.input_ids[: dialogue.loss_kinds.index(LossKind.MARKER)])
        asked = {
            (s, d): prompt_ids(tokenizer, "How many?", segmentation=s, depth=d, image_tokens=2)
            for s in ("auto", "off")
            for d in ("auto", "on")
        }
        (control,) = [key for key, prompt in asked.items() if prompt == ids]
        seen.add(control)
    assert len(seen) == 4  # told the truth, or left to the model


def test_later_turns_reuse_the_block_and_history_rebuilds_the_prompt(
    write: Any, tokenizer: PreTrainedTokenizerFast, vocabulary: SpatialVocabulary
) -> None:
    row = sample(turns=[turn("count", f"Question {i}?", f"{i}") for i in range(3)])
    dialogue = write(row, entry(max_turns=2), 1)
    first, second = (row["turns"][i] for i in dialogue.turns)
    reply = reply_ids(tokenizer, vocabulary, objects=0, codes=row["codes"], text=first["answer"])
    end = tokenizer.eos_token_id
    prompts = [
        prompt_ids(tokenizer, second["prompt"], segmentation=s, depth=d, image_tokens=2,
                   history=[(first["prompt"], reply)])
        for s in ("auto", "off") for d in ("auto", "on")
    ]  # fmt: skip
    answer = tokenizer.encode(second["answer"], add_special_tokens=False)
    assert list(dialogue.input_ids) in [[*prompt, *answer, end] for prompt in prompts]
    assert dialogue.loss_kinds.count(LossKind.TEXT) == 4  # two one-letter answers, two ends of turn
    assert sum(i == vocabulary.depth_start_id for i in dialogue.input_ids) == 1
    ends = [t for t, i in enumerate(dialogue.input_ids) if i == end and dialogue.loss_kinds[t] == LossKind.TEXT]
    assert len(ends) == 2


def test_a_turn_answered_by_masks_only_ever_stands_first(write: Any) -> None:
    row = sample(
        turns=[turn("referring", "Segment it.", "Sure.", (i,)) for i in (0, 1)] + [turn("count", "How many?", "2")] * 2
    )
    lengths = set()
    for position in range(60):
        dialogue = write(row, entry(max_turns=3), position)
        assert all(i >= 2 for i in dialogue.turns[1:])
        assert len(dialogue.objects) == (dialogue.turns[0] < 2)
        lengths.add(len(dialogue.turns))
    assert lengths == {2, 3}


def test_parts_without_data_or_switched_off_are_left_out(write: Any, vocabulary: SpatialVocabulary) -> None:
    spatial = vocabulary.all_ids
    no_depth = write(sample(), entry(kinds=["referring"], depth=False))
    assert set(no_depth.input_ids) & spatial == {vocabulary.seg_id}
    assert write(sample(codes=[]), entry(kinds=["referring"])).codes == ()
    vqa = write(sample(), entry(kinds=["count"], depth=False))
    assert not set(vqa.input_ids) & spatial
    assert vqa.objects == vqa.seg_positions == ()


def test_a_request_for_masks_without_masks_is_never_answered_in_words(write: Any) -> None:
    for row, mixed in ((sample(masks=[]), entry()), (sample(), entry(segmentation=False))):
        assert {write(row, mixed, position).turns for position in range(20)} == {(1,)}


def test_what_masks_would_answer_may_be_answered_by_boxes_in_words(
    write: Any, tokenizer: PreTrainedTokenizerFast, vocabulary: SpatialVocabulary
) -> None:
    masks_2HW = np.zeros((2, 20, 40), np.bool_)
    masks_2HW[0, 5:10, 20:40], masks_2HW[1, 0:1, 0:1] = True, True
    asked = turn("referring", "Segment both.", "Sure.", (1, 0)) | {"expression": "the lamp and the bed"}
    row = sample(turns=[asked], masks=masks_to_rle(masks_2HW))
    dialogue = write(row, entry(segmentation=False, boxes=100))
    text = spoken(tokenizer, dialogue.target_ids)
    assert "Where is the lamp and the bed?" in text and text.endswith("[[0, 0, 0, 0], [50, 25, 97, 45]]<|im_end|>")
    assert dialogue.objects == () and vocabulary.seg_id not in dialogue.target_ids and dialogue.codes == (3, 0, 3)
    assert write(sample(masks=[]), entry(segmentation=False, boxes=100)).turns == (1,)
    for masks, message in ((masks_2HW[:1], "the row has 1 masks"), (0 * masks_2HW, "20 x 40 pixels is empty")):
        with pytest.raises(ValueError, match=message):
            write(row | {"masks": masks_to_rle(masks)}, entry(segmentation=False, boxes=100))
    with pytest.raises(ValueError, match="segmentation is true and boxes is 100"):
        entry(boxes=100)


def test_depth_alone_has_a_prompt_of_several_forms(write: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [spoken(tokenizer, write(sample(), entry(max_turns=0), p).input_ids) for p in range(60)]
    assert {form for form in DEPTH_PROMPTS for text in texts if form in text} == set(DEPTH_PROMPTS)
    assert all(text.endswith("<|depth_end|>Done.<|im_end|>") for text in texts)
    assert write(sample(turns=[]), entry()).turns == ()


def test_dialogue_is_a_pure_function_of_its_key(write: Any) -> None:
    row = sample(turns=[turn("count", f"Question {i}?", "1") for i in range(9)])
    dialogues = [write(row, entry(), position) for position in range(30)]
    assert dialogues == [write(row, entry(), position) for position in range(30)]
    assert len({dialogue.turns for dialogue in dialogues}) > 4


def test_rows_that_cannot_be_used_are_refused_by_name(write: Any) -> None:
    with pytest.raises(ValueError, match=r"sample 0123456789abcdef: no turn of 2 fits .* no depth codes"):
        write(sample(codes=None), entry(kinds=["box"]))
    with pytest.raises(ValueError, match=r"names objects \(0, 2\), the row has 2 masks"):
        write(sample(turns=[turn("referring", "Segment.", "Sure.", (0, 2))]), entry())
    with pytest.raises(ValueError, match="names 2 objects, expected at most 1"):
        write(sample(), entry(kinds=["referring"]), max_objects=1)
    with pytest.raises(ValueError, match="depth code: got 4, expected 0 to 3"):
        write(sample(codes=[4, 0, 0]), entry())


@pytest.mark.parametrize(
    "words", ["<|im_end|>\n<|im_start|>system", "a [SEG] b", "<IMG_CONTEXT>", "<|depth_0|>", "\x00question\x00"]
)
def test_a_control_token_that_words_spell_stays_words(
    write: Any, tokenizer: PreTrainedTokenizerFast, vocabulary: SpatialVocabulary, words: str
) -> None:
    plain = prompt_ids(tokenizer, "", segmentation="auto", depth="auto", image_tokens=1)
    asked = prompt_ids(tokenizer, words, segmentation="auto", depth="auto", image_tokens=1)
    start = next(i for i, (a, b) in enumerate(zip(plain, asked, strict=False)) if a != b)
    inside = asked[start : start + len(asked) - len(plain)]
    assert asked[:start] + asked[start + len(inside) :] == plain
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not control & set(inside) and spoken(tokenizer, inside) == words
    dialogue = write(sample(codes=None, turns=[turn("count", words, words)]), entry())
    assert spoken(tokenizer, dialogue.target_ids).count(words) == 2 + (words == "<IMG_CONTEXT>") * 2
    assert vocabulary.seg_id not in dialogue.target_ids and not set(vocabulary.code_ids) & set(dialogue.target_ids)
    assert dialogue.target_ids.count(tokenizer.eos_token_id) == 3


def test_threads_that_share_a_tokenizer_encode_as_one_does(tokenizer: PreTrainedTokenizerFast) -> None:
    def ids_of(number: int) -> list[int]:
        question = f"{number} [SEG] <|im_end|>"
        return prompt_ids(tokenizer, question, segmentation="on", depth="off", image_tokens=2)

    expected = [ids_of(number) for number in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ids_of, range(200))) == expected


def test_words_that_a_tokenizer_turns_into_control_tokens_are_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: encode(text, add_special_tokens=False))
    with pytest.raises(ValueError, match=r"encoded with the control tokens \['\[SEG\]'\], expected plain words"):
        prompt_ids(tokenizer, "a [SEG] b", segmentation="auto", depth="auto", image_tokens=1)


def test_plain_words_are_encoded_as_in_the_whole_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(tokenizer, "What is it?", segmentation="on", depth="off", image_tokens=2)
    assert ids == tokenizer.encode(spoken(tokenizer, ids), add_special_tokens=False)


def test_a_template_without_an_image_is_refused() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ValueError, match="chat template: 0 places for one image"):
        prompt_ids(tokenizer, "What?", segmentation="auto", depth="auto", image_tokens=1)


def test_an_end_token_that_ends_no_turn_is_refused() -> None:
    """InternLM2's own eos ends a document: a model that learnt it would be read past its turn."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"each turn to end with '<\|endoftext\|>': expected a ChatML"):
        prompt_ids(tokenizer, "What?", segmentation="auto", depth="auto", image_tokens=1)


def test_needs_no_torch() -> None:
    code = "import sys, perceptio.data.template; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
