"""The items of a JSON array one after another: files of conversations are too large to hold as a whole."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from perceptio.sources.record import SourceError, shown

CHUNK = 2**20  # bytes that are read at once
LONGEST_ITEM = 2**26  # characters; a conversation has some thousands
_SPACE = " \t\r\n"
_BEHIND = (*_SPACE, ",", "]")  # a value of an array


def array_items(stream: BinaryIO, where: str) -> Iterator[Any]:
    """The values of an array. Raises SourceError, with `where`, for anything else and for what is cut off."""
    text = _Text(stream, where)
    if text.next_letter() != "[":
        raise SourceError(f"{where} begins with {shown(text.rest()[:20])}, expected a JSON array: [{{...}}, ...]")
    text.skip()
    separator = "]" if text.next_letter() == "]" else ","
    while separator == ",":
        yield text.value()
        separator = text.next_letter()
        if separator not in (",", "]"):
            raise text.broken(f"expected ',' or ']', found {shown(separator)}")
        if separator == ",":
            text.skip()
    text.skip()
    if behind := text.next_letter():
        raise text.broken(f"expected the end behind ']', found {shown(behind)}")


class _Text:
    """A window on the file's text; `at` is where reading goes on."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self.stream, self.where = stream, where
        self.decoder, self.letters = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.passed, self.ended = "", 0, 0, False

    def rest(self) -> str:
        return self.text[self.at :]

    def skip(self) -> None:
        self.at += 1

    def next_letter(self) -> str:
        """The next one that is no space, "" at the end; it is not passed over."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The next value, passed over."""
        self.next_letter()
        while True:
            try:
                found, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.broken("it is nested too deep") from error
            except ValueError as error:
                if not self._more():
                    raise self.broken(str(error)) from error
                continue
            if self.text[end : end + 1] in _BEHIND or not self._more():  # a number may go on in the next piece
                self.at = end
                return found

    def broken(self, problem: str) -> SourceError:
        place = self.passed + self.at
        return SourceError(f"{self.where} is no JSON behind character {place}: {problem:.200}: download it again")

    def _more(self) -> bool:
        """Reads on, twice as much as is still unread: so a long item is not parsed at every chunk. False at the end."""
        if self.ended:
            return False
        self.passed, self.text, self.at = self.passed + self.at, self.rest(), 0
        if len(self.text) > LONGEST_ITEM:
            raise self.broken(f"one item is longer than {LONGEST_ITEM} characters")
        data = self.stream.read(max(CHUNK, len(self.text)))
        self.ended = not data
        try:
            self.text += self.letters.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        return not self.ended
