"""Reading an answer out of a reply, by rules alone: a letter, an option, or the exact words.

A reply that names no option, or two, is wrong; no model judges it and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = re.compile(r"\(?([A-Z])\)?")
_LEAD = re.compile(
    r"^(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*", re.IGNORECASE
)
_MARKED = re.compile(r"\(([A-Z])\)|^([A-Z])(?=[.:,/)&]|\s+(?:or|and)\b|\s*$)")
_JOINED = re.compile(
    r"(?:[,/&]|\bor\b|\band\b)\s*(?:(?:option|point)\s+)?\(?([A-Z])\)?(?=\s*(?:[.,:;/&)]|or\b|and\b|$))"
)
_DENIED = re.compile(r"\bnot\s+(?:(?:option|point)\s+)?\(?[A-Z]\b", re.IGNORECASE)


def normalise(text: str) -> str:
    """The text without case, runs of spaces, outer quotes and the closing stop."""
    return " ".join(text.split()).strip("\"'` ").rstrip(".!").strip().casefold()


def exact_match(reply: str, answer: str) -> bool:
    """Whether the reply says the answer and nothing else, both normalised."""
    return normalise(reply) == normalise(answer)


def read_letter(reply: str, letters: Sequence[str]) -> str | None:
    """The one letter that the reply names ("B", "(B)", "B. the chair", "The answer is (B)"), else None.

    letters: capital letters without brackets. A bare capital counts only at the beginning, so that the article in
    "A chair is closest" is no answer; in brackets it counts anywhere. One that is joined to another by a comma, "or" or
    "and" makes two, and one behind "not" is no answer.
    """
    rest = _LEAD.sub("", reply.strip())
    if _DENIED.search(rest):
        return None
    named = {bracketed or bare for bracketed, bare in _MARKED.findall(rest)}
    named |= set(_JOINED.findall(rest)) if named else set()
    return named.pop() if len(named) == 1 and named <= set(letters) else None


def read_option(reply: str, options: Sequence[str]) -> str | None:
    """The one option that the reply is, word for word once normalised, with an introduction or without; else None."""
    for said in (normalise(reply), normalise(_LEAD.sub("", reply.strip()))):
        if found := [option for option in options if normalise(option) == said]:
            return found[0] if len(found) == 1 else None
    return None


def read_choice(reply: str, choices: Sequence[str]) -> str | None:
    """The member of a question's closed set of answers that the reply names, as it stands in the set; else None.

    Lettered sets ("A" or "(A)") are read as letters, all others as options.
    """
    letters = {match[1]: choice for choice in choices if (match := _LETTER.fullmatch(choice))}
    if len(letters) == len(choices):
        found = read_letter(reply, list(letters))
        return None if found is None else letters[found]
    return read_option(reply, choices)


def is_right(reply: str, answer: str, choices: Sequence[str] = ()) -> bool:
    """Whether the reply names the right member of the closed set, or is the answer's words where there is no set.

    Raises ValueError where the answer is not in the set.
    """
    if not choices:
        return exact_match(reply, answer)
    if answer not in choices:
        raise ValueError(f"answer {answer!r} is not among the choices {list(choices)}: mend the record")
    return read_choice(reply, choices) == answer
