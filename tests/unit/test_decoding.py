"""Decoding: what is written is the best that the grammar allows, alone or in a batch, and nothing is computed twice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perceptio import decoding
from perceptio.decoding import Written, decode
from perceptio.generate import Perceiver
from perceptio.grammar import Part, State
from perceptio.processor import Request
from tests.constrained import generate, kinds_of, open_tokens
from tests.tiny import tiny_model

NEAR = 1e-4  # two logits that are closer may change places with the size of a batch
WORDS = 6
PARTS: list[tuple[Part, Part]] = [
    ("on", "on"), ("off", "off"), ("auto", "auto"), ("on", "off"), ("off", "on"), ("auto", "on"), ("on", "auto"),
    ("off", "auto"), ("auto", "off"),
]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[(0, "qwen2", True), (1, "llama", False), (2, "qwen2", False)],
    ids=["qwen2 tied", "llama untied", "qwen2 untied"],
)
def perceiver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Perceiver:
    seed, text_model, tied = request.param
    folder = tiny_model(tmp_path_factory.mktemp("model"), seed=seed, text_model=text_model, tied=tied)
    found = Perceiver.from_pretrained(str(folder))
    torch.manual_seed(seed)
    with torch.no_grad():  # so that what was read before matters, and no token wins everywhere
        for weight in found.model.model.language_model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.4)
        if not tied:
            found.model.lm_head.weight.normal_(std=0.4)
    return found


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    sizes = [(128, 128), (60, 90), (90, 60)] * 3
    return [
        Request(rng.integers(0, 256, (*size, 3), dtype=np.uint8), f"{'Is it so? ' * number}What is it?", *parts)
        for number, (size, parts) in enumerate(zip(sizes, PARTS, strict=True))
    ]


def inputs(perceiver: Perceiver, asked: list[Request]) -> tuple[Tensor, Tensor, Tensor]:
    found = perceiver.processor.ask(asked)
    return found["input_ids"], found["attention_mask"], found["pixel_values"]


def written(perceiver: Perceiver, asked: list[Request], **options: Any) -> list[Written]:
    grammars = [perceiver.processor.grammar(request.segmentation, request.depth) for request in asked]
    settings: dict[str, Any] = {"eos_id": perceiver.eos_id, "max_new_tokens": WORDS} | options
    return decode(perceiver.model, *inputs(perceiver, asked), grammars, **settings)


@torch.inference_mode()
def distances(perceiver: Perceiver, request: Request, ids: list[int]) -> tuple[list[float], Tensor]:
    """How far each token's logit is below the best that was allowed, from one pass without a cache; and the states."""
    ids_BT, _, pixels = inputs(perceiver, [request])
    whole_BT = torch.cat([ids_BT, torch.tensor([ids], dtype=torch.long)], dim=1)
    hidden_TD = perceiver.model.hidden_states(whole_BT, torch.ones_like(whole_BT), pixels)[0]
    logits_TV = perceiver.model.lm_head(hidden_TD)[ids_BT.shape[1] - 1 :]
    grammar, state, found = perceiver.processor.grammar(request.segmentation, request.depth), State(), []
    kind_V = kinds_of(grammar, logits_TV.shape[1], perceiver.eos_id)
    for logits_V, token_id in zip(logits_TV, ids, strict=False):  # the last state has no token of its own
        (open_V,) = open_tokens([grammar.allowed(state)], kind_V)
        found.append(float(logits_V[open_V].max() - logits_V[token_id]))
        if token_id != perceiver.eos_id:
            state = grammar.advance(state, token_id)
    return found, hidden_TD[ids_BT.shape[1] :]


def test_every_token_is_the_best_that_may_come_and_near_ties_alone_tell_ways_apart(
    perceiver: Perceiver, record_property: Callable[[str, object], None]
) -> None:
    asked = requests()
    replies = written(perceiver, asked)
    together = [reply.ids for reply in replies]
    alone = [reply.ids for request in asked for reply in written(perceiver, [request])]
    grammars = [perceiver.processor.grammar(request.segmentation, request.depth) for request in asked]
    limit = max(len(ids) for ids in together)
    ways = {"together": together, "alone": alone}
    for cached in (True, False):
        ways[f"transformers {cached}"] = [
            ids[: len(ours)] if len(ids) > len(ours) else ids  # it bounds the whole reply, we the words
            for ids, ours in zip(
                generate(
                    perceiver.model,
                    *inputs(perceiver, asked),
                    grammars,
                    eos_id=perceiver.eos_id,
                    new_tokens=limit,
                    use_cache=cached,
                ),
                together,
                strict=True,
            )
        ]
    near_ties = 0
    ended = [reply.ids + [perceiver.eos_id] * (reply.finish == "stop") for reply in replies]
    for found in (*ways.values(), ended):
        for request, ids in zip(asked, found, strict=True):
            below, _ = distances(perceiver, request, ids)
            assert max(below, default=0.0) <= NEAR
            near_ties += sum(distance > 0 for distance in below)
    differing = sum(other != ours for found in ways.values() for other, ours in zip(found, together, strict=True))
    record_property("near_ties", near_ties)
    record_property("differing_replies", f"{differing} of {3 * len(asked)}")
    assert near_ties or not differing
    assert len({tuple(ids) for ids in together}) > 4, "they must not all write the same"


def test_every_part_is_there_as_asked(perceiver: Perceiver) -> None:
    asked = requests()
    tokens = perceiver.codec.tokens
    for request, reply in zip(asked, written(perceiver, asked), strict=True):
        read = reply.grammar.parse(reply.ids)
        assert read.well_formed and reply.finish in ("stop", "length")
        assert len(read.codes) in {"on": (tokens,), "off": (0,), "auto": (0, tokens)}[request.depth]
        low, high = {"on": (1, 2), "off": (0, 0), "auto": (0, 2)}[request.segmentation]
        assert low <= read.objects <= high and len(reply.seg_states) == read.objects
        assert len(read.text_ids) <= WORDS and (reply.finish == "stop" or len(read.text_ids) == WORDS)


@pytest.fixture
def after(perceiver: Perceiver) -> Iterator[Perceiver]:
    perceiver.processor.depth_after_text = True
    yield perceiver
    perceiver.processor.depth_after_text = False


def test_a_block_may_come_after_the_words(after: Perceiver) -> None:
    asked = requests()
    for request, reply in zip(asked, written(after, asked), strict=True):
        read, known = reply.grammar.parse(reply.ids), reply.grammar.vocabulary
        assert read.well_formed and len(read.text_ids) <= WORDS
        assert len(read.codes) in {"on": (4,), "off": (0,), "auto": (0, 4)}[request.depth]
        assert reply.finish == ("length" if len(read.text_ids) == WORDS else "stop"), "words that were cut are told of"
        if read.codes:
            assert reply.ids[-1] == known.depth_end_id
            assert reply.ids[-6] == known.depth_start_id and read.text_ids[-1] == reply.ids[-7]
        below, _ = distances(after, request, reply.ids)
        words = len(read.text_ids)
        start = reply.ids.index(known.depth_start_id) if read.codes else len(reply.ids)
        # where the words were at their limit the block was forced, whatever the model liked
        assert max(b for at, b in enumerate(below) if at != start or words < WORDS) <= NEAR


def test_forced_codes_stand_in_the_block_and_what_follows_has_read_them(perceiver: Perceiver) -> None:
    asked, codes = requests()[:2], {0: (7, 6, 5, 4)}
    free, forced = written(perceiver, asked), written(perceiver, asked, forced_codes=codes)
    read = [reply.grammar.parse(reply.ids) for reply in forced]
    assert read[0].codes == codes[0] != free[0].grammar.parse(free[0].ids).codes
    assert read[0].well_formed and forced[1].ids == free[1].ids
    below, _ = distances(perceiver, asked[0], forced[0].ids)
    block = forced[0].ids.index(forced[0].grammar.vocabulary.depth_start_id)
    assert max(below[block + 1 : block + 5]) > NEAR, "the model would have written others"
    assert max(below[block + 5 :]) <= NEAR, "behind them it writes what it likes best"
    with pytest.raises(ValueError, match=r"3 with depth 'on' and the grammar on, expected 4"):
        written(perceiver, asked, forced_codes={0: (1, 2, 3)})
    with pytest.raises(ValueError, match=r"4 with depth 'off'.*expected 4 with depth 'on'"):
        written(perceiver, asked, forced_codes={1: (1, 2, 3, 4)})
    with pytest.raises(ValueError, match=r"4 with depth 'auto'"):
        written(perceiver, requests()[2:3], forced_codes={0: (1, 2, 3, 4)})


def test_no_reply_under_the_grammar_holds_a_control_token_or_a_padded_row(perceiver: Perceiver) -> None:
    """Even where the model likes these best."""
    grammar, head = perceiver.processor.grammar(), perceiver.model.lm_head
    start = perceiver.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    hidden_BD = 10 * head.weight[[start]]
    loose = decoding._Head(head.weight, grammar.vocabulary, perceiver.eos_id, grammar)
    assert loose.best(hidden_BD, [decoding.ANYTHING]) == [start]
    assert grammar.kind(loose.best(hidden_BD, [grammar.allowed(State())])[0]) != "control"
    padded_VD = torch.cat([head.weight, 20 * head.weight[[start]]])
    rows = decoding._Head(padded_VD, grammar.vocabulary, perceiver.eos_id, grammar)
    assert rows.best(hidden_BD, [grammar.allowed(State())])[0] < len(head.weight)


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(perceiver: Perceiver) -> None:
    asked = requests()[:2]
    room = perceiver.model.config.get_text_config().max_position_embeddings
    with pytest.raises(ValueError, match=rf"request 0: its prompt is \d+ tokens and its reply up to \d+, .* {room}"):
        perceiver.perceive(asked, max_new_tokens=room)
    long = Request(asked[0].rgb_HW3, "Is it so? " * room, "off", "off")
    with pytest.raises(ValueError, match="request 1: its prompt is"):
        perceiver.perceive([asked[0], long], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"depth code: got 8, expected 0 to 7"):
        written(perceiver, asked, forced_codes={0: (1, 2, 3, 8)})


def test_seg_states_are_those_where_seg_is_the_input(perceiver: Perceiver) -> None:
    asked, compared = requests(), 0
    for request, reply in zip(asked, written(perceiver, asked), strict=True):
        _, hidden_TD = distances(perceiver, request, reply.ids)
        places = [t for t, token_id in enumerate(reply.ids) if token_id == reply.grammar.vocabulary.seg_id]
        for place, state_D in zip(places, reply.seg_states, strict=True):
            torch.testing.assert_close(state_D, hidden_TD[place], atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared >= 3


def test_nothing_runs_twice_and_inside_the_block_the_head_has_k_rows(
    perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request for request in requests() if (request.segmentation, request.depth) == ("off", "on")]
    rows: list[int] = []
    linear = decoding.F.linear

    def counted(hidden: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(weight))
        return linear(hidden, weight)

    seen: dict[str, int] = {"vision": 0, "language": 0}
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: seen.update({name: seen[name] + 1}))
        for name, part in (
            ("vision", perceiver.model.model.vision_tower),
            ("language", perceiver.model.model.language_model),
        )
    ]
    monkeypatch.setattr(decoding, "F", type("Counted", (), {"linear": counted, "pad": decoding.F.pad}))
    (reply,) = written(perceiver, asked)
    for handle in handles:
        handle.remove()
    codes, size = perceiver.codec.codes, len(perceiver.model.lm_head.weight)
    words = len(reply.ids) - perceiver.codec.tokens - 2 + (reply.finish == "stop")
    assert rows == [codes] * perceiver.codec.tokens + [size] * words  # markers are forced: no head at all
    assert seen["vision"] == 1 and seen["language"] == len(reply.ids) + (reply.finish == "stop")


def test_masks_and_depth_of_a_batch_come_from_one_pass_of_each_part(perceiver: Perceiver) -> None:
    asked = [request for request in requests() if "on" in (request.segmentation, request.depth)]
    sam2, seen = perceiver.model.segmenter.sam2, Counter[str]()
    parts = {"vision": perceiver.model.model.vision_tower, "trunk": sam2.image_encoder, "masks": sam2.sam_mask_decoder}
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: seen.update([name])) for name, part in parts.items()
    ]
    found = perceiver.perceive(asked, max_new_tokens=WORDS)
    for handle in handles:
        handle.remove()
    assert sum(len(one.masks_MHW) > 0 for one in found) >= 2 and sum(one.inv_depth_HW is not None for one in found) >= 2
    assert seen == {"vision": 1, "trunk": 1, "masks": 1}


def test_a_processor_of_another_model_is_refused_with_both_values(perceiver: Perceiver) -> None:
    other = copy.copy(perceiver.processor)
    other.max_objects = 7
    with pytest.raises(ValueError, match="max_objects: the model's is 2, the processor's 7: load both from one folder"):
        Perceiver(perceiver.model, other)


def test_a_batch_answers_long_after_its_first_reply_ended(perceiver: Perceiver) -> None:
    asked = requests()
    replies = written(perceiver, asked, max_new_tokens=1)
    assert [len(reply.grammar.parse(reply.ids).text_ids) for reply in replies] == [
        0 if reply.finish == "stop" else 1 for reply in replies
    ]
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        written(perceiver, asked, max_new_tokens=0)
