"""A referring expression of a data set as a turn."""

from __future__ import annotations

from typing import Any

ANSWER = "Sure."  # as for the rooms: the masks are the answer
PROMPT = "Please segment {} in this image."


def referring_turn(expression: str, objects: list[int], named: str | None = None) -> dict[str, Any]:
    """The fields of a turn that asks for the objects of an expression; `named` stands in the prompt instead of it."""
    return {
        "kind": "referring",
        "prompt": PROMPT.format(named or expression),
        "answer": ANSWER,
        "expression": expression,
        "objects": objects,
    }


def plain_expression(sentence: str) -> str:
    """A sentence lower-cased, without the space around it and a full stop at its end (lineage: Sa2VA)."""
    return sentence.strip().lower().removesuffix(".").rstrip()
