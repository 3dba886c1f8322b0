"""The reader of a source, by its format."""

from __future__ import annotations

from perceptio.sources.coco import CocoReader
from perceptio.sources.folder import FolderReader
from perceptio.sources.record import Reader
from perceptio.sources.refcoco import RefcocoReader
from schemas.sources import CocoSource, FileSource, FolderSource, RefcocoSource


def reader_of(source: FileSource) -> Reader:
    """What reads a source. Raises SourceError for a path in a store that is not read from."""
    match source:
        case FolderSource():
            return FolderReader(source)
        case RefcocoSource():
            return RefcocoReader(source)
        case CocoSource():
            return CocoReader(source)
        case _:
            raise NotImplementedError(source.format)
