"""RefCOCO, RefCOCO+ and RefCOCOg as they were released: a pickle of refs, COCO's instances, a folder of images.

    PATH/refs(unc).p       a list of {ref_id, ann_id, image_id, split, sentences: [{sent, raw, ...}], ...}
    PATH/instances.json    COCO's images and annotations
    IMAGES/COCO_train2014_000000581857.jpg

A ref's own `file_name` carries its annotation's number and names no file: the image's name is in instances.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from perceptio.sources.coco_file import CocoFile, Values, box_of, image_of, read_coco, rle_of
from perceptio.sources.files import folder_at, found, place_of, read_whole
from perceptio.sources.record import Found, Item, Refused, RowError, SourceError, problem, shown
from perceptio.sources.referring import plain_expression, referring_turn
from perceptio.sources.restricted_pickle import load_plain
from schemas.sources import RefcocoSource
from schemas.tables import Reason

LONGEST_SENTENCE = 2000  # characters; a real one has some dozens


class RefcocoReader:
    """One item an image of the split, by the image's id. Refs and instances are held in memory while items are made."""

    def __init__(self, source: RefcocoSource) -> None:
        self.source = source
        self.images = place_of(source.images, f"sources.{source.name}.images")

    def items(self) -> Iterator[Item]:
        """Per image its item, before it what cannot be used of it: a sentence without words, a ref without its object.

        Raises SourceError for unusable files and for a split without refs.
        """
        source = self.source
        folder_at(source.images, f"sources.{source.name}.images")
        refs, uri = self._refs()
        coco = read_coco(f"{source.path.rstrip('/')}/instances.json", f"sources.{source.name}.path", self._most)
        by_image: dict[int, list[Values]] = {}
        for ref in refs:
            by_image.setdefault(ref["image_id"], []).append(ref)
        for image_id in sorted(by_image):
            strays: list[Item] = []
            try:
                item = self._item(coco, image_id, by_image[image_id], uri, strays)
            except RowError as error:
                item = problem(error.reason, str(error), f"{uri}#image_id={image_id}")
            yield from strays
            if item:
                yield item

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The image with the masks and sentences of its refs."""
        yield found(self.images, item)

    @property
    def _most(self) -> int:
        return self.source.max_file_bytes

    def _refs(self) -> tuple[list[Values], str]:
        """The refs of the split, their fields checked; and the address of their file."""
        source, field = self.source, f"sources.{self.source.name}.path"
        place = place_of(source.path, field).below(f"refs({source.splits_by}).p")
        data = read_whole(place, field, self._most)
        refs = load_plain(data, place.uri)
        if not isinstance(refs, list):
            raise SourceError(f"{field}: '{place.uri}' holds {shown(refs)}, expected a list of refs")
        checked = [_checked(ref, f"{field}: '{place.uri}': ref {number}") for number, ref in enumerate(refs)]
        kept = [ref for ref in checked if ref["split"] == source.split]
        if not kept:
            splits = sorted({ref["split"] for ref in checked})
            raise SourceError(
                f"sources.{source.name}.split '{source.split}' has no ref in '{place.uri}', which has {splits[:9]}"
            )
        # a pickle can name one list many times over: a small file must not become an endless one
        if sum(len(ref["sentences"]) for ref in kept) > len(data):
            raise SourceError(f"{field}: '{place.uri}' has more sentences than bytes: download it again")
        return kept, place.uri

    def _item(self, coco: CocoFile, image_id: int, refs: list[Values], uri: str, strays: list[Item]) -> Item | None:
        """The image's item, None without any sentence; what of the refs cannot be used is laid into `strays`."""
        if image_id not in coco.images:
            raise RowError(Reason.BAD_RECORD, f"image_id {image_id} of {len(refs)} refs is not in instances.json")
        name, height, width = image_of(coco.images[image_id])
        annotations: dict[int, int] = {}  # id to index into the record's masks
        turns: list[Values] = []
        for ref in refs:
            where = f"{uri}#ref_id={ref['ref_id']}"
            annotation = coco.annotations.get(ref["ann_id"])
            if annotation is None or annotation.get("image_id") != image_id:
                message = f"ref {ref['ref_id']}: ann_id {ref['ann_id']} is no annotation of image {image_id}"
                strays.append(problem(Reason.BAD_RECORD, message, where))
                continue
            index = annotations.setdefault(ref["ann_id"], len(annotations))
            for number, sentence in enumerate(ref["sentences"]):
                try:
                    turns.append(referring_turn(_expression(sentence), [index]))
                except RowError as error:
                    message = f"ref {ref['ref_id']}: sentences[{number}]: {error}"
                    strays.append(problem(error.reason, message, where))
        if not turns:
            return None
        objects = [coco.annotations[key] for key in annotations]
        record: Values = {
            "turns": turns,
            "boxes": [box_of(annotation) for annotation in objects],
            "masks": [rle_of(annotation, height, width) for annotation in objects],
        }
        return Item(self.images.below(name).uri, record=json.dumps(record))


def _checked(ref: Any, where: str) -> Values:
    if not isinstance(ref, dict):
        raise SourceError(f"{where} is {shown(ref)}, expected a dict")
    for field in ("ref_id", "ann_id", "image_id"):
        value = ref.get(field)
        if type(value) is not int or value.bit_length() > 64:
            raise SourceError(f"{where}: {field} is {shown(value)}, expected a whole number")
    if not isinstance(ref.get("split"), str):
        raise SourceError(f"{where}: split is {shown(ref.get('split'))}, expected a text such as 'train'")
    if not isinstance(ref.get("sentences"), list | tuple):
        raise SourceError(f"{where}: sentences is {shown(ref.get('sentences'))}, expected a list")
    return ref


def _expression(sentence: Any) -> str:
    """What a sentence says; its raw words where it has no others. Raises RowError where there are none."""
    said = sentence.get("sent") or sentence.get("raw") if isinstance(sentence, dict) else sentence
    if not isinstance(said, str) or len(said) > LONGEST_SENTENCE:
        message = f"sent is {shown(said)}, expected a text of up to {LONGEST_SENTENCE} characters"
        raise RowError(Reason.BAD_RECORD, message)
    expression = plain_expression(said)
    if not expression:
        raise RowError(Reason.BAD_RECORD, f"sent is {said!r}, expected words that refer to the object")
    return expression
