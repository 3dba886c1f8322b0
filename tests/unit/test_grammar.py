"""The reply's grammar: what may follow, what is read, what is called malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceptio.grammar import Allowed, Phase, ReplyGrammar, State
from perceptio.vocabulary import SpatialVocabulary

VOCABULARY = SpatialVocabulary(seg_id=10, depth_start_id=11, depth_end_id=15, first_code_id=12, codes=3)
SEG, START, END, WORD = 10, 11, 15, 1
GRAMMAR = ReplyGrammar(VOCABULARY, tokens=2, max_objects=2)


def test_a_whole_reply_is_read() -> None:
    reply = GRAMMAR.parse([SEG, SEG, START, 12, 14, END, WORD, 2])
    assert reply.well_formed
    assert (reply.objects, reply.codes, reply.text_ids) == (2, (0, 2), (1, 2))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([START, 12, END], "position 2"),
        ([START, 12], "1 of 2 codes"),
        ([START, 12, 13], "after 2 codes without its end marker"),
        ([START, 12, 13, 14], "position 3"),
        ([WORD, SEG], "position 1"),
        ([WORD, 12], "position 1"),
        ([SEG, SEG, SEG], "position 2"),
        ([START, 12, 13, END, START], "position 4"),
    ],
)
def test_a_malformed_reply_says_where(ids: list[int], message: str) -> None:
    reply = GRAMMAR.parse(ids)
    assert not reply.well_formed
    assert message in reply.problem


def test_parts_are_demanded_and_forbidden() -> None:
    demanded = ReplyGrammar(VOCABULARY, tokens=2, max_objects=2, segmentation="on", depth="on")
    first = demanded.allowed(State())
    assert (first.seg, first.depth_start, first.text) == (True, False, False)
    second = demanded.allowed(State(Phase.OBJECTS, objects=1))
    assert (second.seg, second.depth_start, second.text) == (True, True, False)
    forbidden = ReplyGrammar(VOCABULARY, tokens=2, max_objects=2, segmentation="off", depth="off").allowed(State())
    assert (forbidden.seg, forbidden.depth_start, forbidden.text) == (False, False, True)
    assert demanded.parse([SEG]).problem == "the reply ends before a demanded part"


def test_a_grammar_without_objects_or_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="max_objects is 0, expected at least 1"):
        ReplyGrammar(VOCABULARY, tokens=2, max_objects=0)
    with pytest.raises(ValueError, match="tokens is 0, expected at least 1"):
        ReplyGrammar(VOCABULARY, tokens=0, max_objects=2)


AFTER = ReplyGrammar(VOCABULARY, tokens=2, max_objects=2, depth="on", depth_after_text=True)


def test_a_block_may_stand_behind_the_text() -> None:
    reply = AFTER.parse([SEG, WORD, 2, START, 12, 14, END])
    assert reply.well_formed
    assert (reply.objects, reply.codes, reply.text_ids) == (1, (0, 2), (1, 2))
    words = AFTER.advance(State(), WORD)
    assert AFTER.allowed(words) == Allowed(text=True, depth_start=True)
    last = AFTER.without_more_words(words)
    assert last is not None and AFTER.allowed(last) == Allowed(depth_start=True)
    for token_id in (START, 12, 12, END):
        last = AFTER.advance(last, token_id)
    assert AFTER.allowed(last) == Allowed(end=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([START, 12, 12, END], "position 0"),
        ([WORD], "ends before a demanded part"),
        ([WORD, START, 12, 12, END, WORD], "position 5"),
        ([WORD, START, 12], "1 of 2 codes"),
    ],
)
def test_a_block_behind_the_text_can_be_malformed_too(ids: list[int], message: str) -> None:
    assert message in AFTER.parse(ids).problem


@given(st.lists(st.integers(0, 9), max_size=30), st.sampled_from(["auto", "on", "off"]), st.booleans())
def test_whatever_follows_the_grammar_parses_well(choices: list[int], depth: str, after: bool) -> None:
    grammar = ReplyGrammar(VOCABULARY, 2, 2, depth=depth, depth_after_text=after)  # type: ignore[arg-type]
    state, ids = State(), []
    for choice in choices:
        allowed = grammar.allowed(state)
        options = [SEG] * allowed.seg + [START] * allowed.depth_start + [END] * allowed.depth_end
        options += [12, 13, 14] * allowed.codes + [WORD] * allowed.text
        if not options:
            assert allowed == Allowed(end=True)
            break
        ids.append(options[choice % len(options)])
        state = grammar.advance(state, ids[-1])
    problem = grammar.parse(ids).problem
    assert "position" not in problem  # it may end early, but never break the order
