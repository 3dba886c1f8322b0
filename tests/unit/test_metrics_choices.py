"""Answers are read by rules: one option named is an answer, none or two is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceptio.metrics.choices import exact_match, is_right, read_choice, read_letter, read_option


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" B. ", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        ("B. the red chair", "B"),
        ("B: the red chair", "B"),
        ("Answer: B", "B"),
        ("The answer is (B).", "B"),
        ("The correct option is B", "B"),
        ("Point (B) is the closest to the camera.", "B"),
        ("(B), so (B)", "B"),
        ("", None),
        ("b", None),
        ("E", None),  # not among the letters
        ("A chair", None),  # an article
        ("(A) or (B)", None),
        ("A, or (B)", None),
        ("Both of them", None),
        ("A, B", None),
        ("A, B, C or D", None),
        ("A and B", None),
        ("A/B", None),
        ("(A) or B", None),
        ("B or (A)", None),
        ("Option A, option B", None),
        ("Not (B)", None),
        ("It is not B, it is (C)", None),
        ("(B), and a chair is behind it", "B"),
        ("B, and A chair is behind it", "B"),
        ("B and nothing else", "B"),
    ],
)
def test_letters(reply: str, letter: str | None) -> None:
    assert read_letter(reply, "ABCD") == letter


@pytest.mark.parametrize(
    ("reply", "option"),
    [
        ("the red chair", "the red chair"),
        ("The red  chair.", "the red chair"),
        ("The answer is the lamp", "the lamp"),
        ("best view", "best view"),
        ("The answer is best view", "best view"),
        ("chair", None),
        ("the red chair or the lamp", None),
    ],
)
def test_options(reply: str, option: str | None) -> None:
    assert read_option(reply, ["the red chair", "the lamp", "best view"]) == option


def test_sets_are_read_as_letters_only_if_all_are_letters() -> None:
    assert read_choice("the closest is (C)", ["(A)", "(B)", "(C)"]) == "(C)"
    assert read_choice("C", ["(A)", "(B)", "(C)"]) == "(C)"
    assert read_choice("2", ["0", "1", "2"]) == "2"
    assert read_choice("12", ["0", "1", "2"]) is None


def test_right_and_wrong() -> None:
    assert is_right("(B)", "B", ["A", "B"])
    assert not is_right("(A)", "B", ["A", "B"])
    assert is_right("Yes.", "Yes", ["Yes", "No"])
    assert not is_right("Yes and no", "Yes", ["Yes", "No"])
    assert is_right("a lamp", "A lamp.") and exact_match(" X ", "x")
    with pytest.raises(ValueError, match="not among the choices"):
        is_right("C", "C", ["A", "B"])


@given(st.sampled_from(["red", "blue", "0", "the vase"]))
def test_each_option_names_itself(option: str) -> None:
    assert read_choice(option, ["red", "blue", "0", "the vase"]) == option


@given(st.text(max_size=30))
def test_no_reply_breaks_the_reader(reply: str) -> None:
    assert read_choice(reply, ["A", "B"]) in (None, "A", "B")
