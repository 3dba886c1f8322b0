"""Images with recorded depth: two folders whose files match by path, less the suffix."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from perceptio.sources.files import IMAGE_SUFFIXES, folder_at, is_text, place_of, read_file, walk
from perceptio.sources.maps import millimetres_of, upright_size
from perceptio.sources.record import (
    Found,
    Item,
    Record,
    Refused,
    RowError,
    SourceError,
    problem,
    refuse_problem,
    refused,
)
from schemas.sources import RgbdSource
from schemas.tables import Reason

DEPTH_SUFFIX = ".png"


class RgbdReader:
    """Items by the image's path, then depth without an image. Names of depth files are held in memory for it."""

    def __init__(self, source: RgbdSource) -> None:
        self.source = source
        self.place = place_of(source.path, f"sources.{source.name}.path")
        self.images = self.place.below(source.image_folder)
        self.depth = self.place.below(source.depth_folder)

    def items(self) -> Iterator[Item]:
        """One item an image. Raises SourceError where a folder is missing or there is no image."""
        for field, place in (("image_folder", self.images), ("depth_folder", self.depth)):
            folder_at(place.uri, f"sources.{self.source.name}.{field}")
        taken = {path.removesuffix(DEPTH_SUFFIX): "" for path, _ in walk(self.depth) if path.endswith(DEPTH_SUFFIX)}
        images = 0
        for path, size in walk(self.images):
            if not path.lower().endswith(IMAGE_SUFFIXES):
                continue
            images += 1
            stem, uri = posixpath.splitext(path)[0], self.images.below(path).uri
            if not is_text(path):
                yield problem(Reason.BAD_RECORD, f"the file's name {path!r} is no UTF-8: rename it", uri)
            elif stem not in taken:
                message = f"it has no depth: '{self.depth.below(stem).uri}{DEPTH_SUFFIX}' is not there"
                yield problem(Reason.MISSING_FILE, message, uri)
            elif taken[stem]:
                message = f"it would share its depth with '{taken[stem]}': keep one of the two"
                yield problem(Reason.DUPLICATE_ID, message, uri)
            else:
                yield Item(uri, size=size)
            taken[stem] = path
        if not images:
            raise SourceError(f"sources.{self.source.name}.image_folder '{self.images.uri}' holds no image: mend it")
        for stem in sorted(stem for stem, image in taken.items() if not image):
            uri = f"{self.depth.below(stem).uri}{DEPTH_SUFFIX}"
            yield problem(Reason.MISSING_FILE, f"no image in '{self.images.uri}' goes with this depth", uri)

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The image, and its depth in millimetres; without depth where the image cannot be opened."""
        try:
            refuse_problem(item)
            data = read_file(self.place.at(item.uri), item.size)
            stem = posixpath.splitext(item.uri.removeprefix(self.images.uri).lstrip("/"))[0]
            depth = read_file(self.depth.below(stem + DEPTH_SUFFIX))
            size = upright_size(data, may_turn=False)
            recorded = None if size is None else millimetres_of(depth, size, self.source.depth_scale)
            yield Found(item.uri, data, Record(), recorded)
        except RowError as error:
            yield refused(error, item.uri)
