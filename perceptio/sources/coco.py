"""COCO instances: `instances.json` and a folder of images."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence

from perceptio.sources.coco_file import CocoFile, Values, box_of, image_of, read_coco, rle_of
from perceptio.sources.files import folder_at, found, place_of
from perceptio.sources.record import Found, Item, Refused, RowError, SourceError, problem, shown
from perceptio.sources.referring import referring_turn
from schemas.sources import CocoSource
from schemas.tables import Reason

log = logging.getLogger(__name__)


class CocoReader:
    """One item an image, by the image's id. The JSON file is held in memory while items are made."""

    def __init__(self, source: CocoSource) -> None:
        self.source = source
        self.images = place_of(source.images, f"sources.{source.name}.images")

    def items(self) -> Iterator[Item]:
        """Every image with its annotations, then annotations of no image. Raises SourceError for unusable files."""
        source, field = self.source, f"sources.{self.source.name}.path"
        folder_at(source.images, f"sources.{source.name}.images")
        coco = read_coco(source.path, field, source.max_file_bytes)
        if not coco.images:
            raise SourceError(f"{field}: '{source.path}' lists no image: mend the path, or download it again")
        uri = place_of(source.path, field).uri
        by_image: dict[int, list[Values]] = {key: [] for key in coco.images}
        strays = []
        crowds = 0
        for key, annotation in coco.annotations.items():
            image_id = annotation.get("image_id")
            if type(image_id) is int and image_id in by_image:
                by_image[image_id].append(annotation)
                crowds += _is_crowd(annotation)
            else:
                message = f"annotation {key}: image_id {shown(image_id)} is no image of the file"
                strays.append(problem(Reason.BAD_RECORD, message, f"{uri}#annotation={key}"))
        if crowds:
            log.info("%s: %d crowd annotations are no single object, left out", source.name, crowds)
        for key in sorted(by_image):
            try:
                yield self._item(coco, key, by_image[key])
            except RowError as error:
                yield problem(error.reason, str(error), f"{uri}#image_id={key}")
        yield from strays

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The image with a box and a mask per object."""
        yield found(self.images, item)

    def _item(self, coco: CocoFile, key: int, annotations: Sequence[Values]) -> Item:
        name, height, width = image_of(coco.images[key])
        objects = [annotation for annotation in annotations if not _is_crowd(annotation)]
        record = {
            "turns": _turns(coco, annotations, objects) if self.source.turns == "category" else [],
            "boxes": [box_of(annotation) for annotation in objects],
            "masks": [rle_of(annotation, height, width) for annotation in objects],
        }
        return Item(self.images.below(name).uri, record=json.dumps(record))


def _is_crowd(annotation: Values) -> bool:
    return bool(annotation.get("iscrowd", 0) == 1)


def _turns(coco: CocoFile, annotations: Sequence[Values], objects: Sequence[Values]) -> list[Values]:
    """A turn for each category with one annotation, in the objects' order: more than one, or a crowd, is ambiguous."""
    names = [_category(coco, annotation) for annotation in annotations]
    count = Counter(names)
    said = [_category(coco, annotation) for annotation in objects]
    return [referring_turn(name, [i], f"the {name}") for i, name in enumerate(said) if count[name] == 1]


def _category(coco: CocoFile, annotation: Values) -> str:
    key = annotation.get("category_id")
    name = coco.categories.get(key, {}).get("name") if type(key) is int else None
    if not isinstance(name, str) or not name.strip():
        message = f"annotation {annotation['id']}: category_id {shown(key)} has no category with a name"
        raise RowError(Reason.BAD_RECORD, message)
    return name.strip()
