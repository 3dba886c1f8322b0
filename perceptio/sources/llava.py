"""LLaVA's instruction data: one JSON array of conversations, and a folder of images that they name.

[{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
  "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"}, {"from": "gpt", "value": "..."}, ...]}, ...]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from perceptio.sources.files import folder_at, found, place_of, relative
from perceptio.sources.json_array import array_items
from perceptio.sources.record import Found, Item, Refused, RowError, SourceError, problem, shown
from schemas.sources import LlavaSource
from schemas.tables import Reason

IMAGE = "<image>"
SPEAKERS = ("human", "gpt")


class LlavaReader:
    """One item an image, in the order in which they are first named. The texts are held in memory, no image is."""

    def __init__(self, source: LlavaSource) -> None:
        self.source = source
        self.images = place_of(source.images, f"sources.{source.name}.images")

    def items(self) -> Iterator[Item]:
        """What cannot be used, by record; then the images with the turns of all their records.

        Raises SourceError for a file that is no JSON array.
        """
        source, field = self.source, f"sources.{self.source.name}.path"
        folder_at(source.images, f"sources.{source.name}.images")
        place = place_of(source.path, field)
        if place.size() is None:
            raise SourceError(f"{field}: '{place.uri}' is no file: mend the path, or download it")
        turns: dict[str, list[str]] = {}
        with place.opened() as stream:
            for number, entry in enumerate(array_items(stream, f"{field}: '{place.uri}'")):
                try:
                    image, said = _conversation(entry)
                    turns.setdefault(image, []).extend(said)
                except RowError as error:
                    key = entry.get("id") if isinstance(entry, dict) else None
                    message = f"record {number}, id {shown(key)}: {error}"
                    yield problem(error.reason, message, f"{place.uri}#{number}")
        for image, said in turns.items():
            yield Item(self.images.below(image).uri, record=f'{{"turns": [{", ".join(said)}]}}')

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The image with its turns."""
        yield found(self.images, item)


def _conversation(entry: Any) -> tuple[str, list[str]]:
    """The image of a record, and its turns as JSON. Raises RowError for a record that is no talk about one image."""
    if not isinstance(entry, dict):
        raise RowError(Reason.BAD_RECORD, f"it is {shown(entry)}, expected an object")
    if entry.get("image") is None:
        raise RowError(Reason.TEXT_ONLY, "it has no image: text alone is not learnt from")
    image = relative(entry["image"], "image")
    talk = entry.get("conversations")
    if not isinstance(talk, list) or not talk or len(talk) % 2:
        what = f"{len(talk)} turns" if isinstance(talk, list) else shown(talk)
        raise RowError(Reason.BAD_RECORD, f"conversations has {what}, expected pairs of human and gpt")
    said = [_value(turn, SPEAKERS[i % 2], f"conversations[{i}]") for i, turn in enumerate(talk)]
    return image, [
        json.dumps({"kind": "vqa", "prompt": prompt, "answer": answer})
        for prompt, answer in zip(said[::2], said[1::2], strict=True)
    ]


def _value(turn: Any, speaker: str, where: str) -> str:
    """What a turn says, less the place of the image at its start or end."""
    values = turn if isinstance(turn, dict) else {}
    if values.get("from") != speaker:
        message = f"{where}.from is {shown(values.get('from'))}, expected '{speaker}': they take turns"
        raise RowError(Reason.BAD_RECORD, message)
    said = values.get("value")
    if not isinstance(said, str):
        raise RowError(Reason.BAD_RECORD, f"{where}.value is {shown(said)}, expected a text")
    if speaker == "human":
        said = said.strip().removeprefix(IMAGE).removesuffix(IMAGE).strip()
    if not said.strip():
        raise RowError(Reason.BAD_RECORD, f"{where}.value is empty, expected words")
    if IMAGE in said:
        message = f"{where}.value has {IMAGE} inside the text: one image, at the start or end, can be read"
        raise RowError(Reason.BAD_RECORD, message)
    return said
