"""The reader of a source, by its format."""

from __future__ import annotations

from typing import assert_never

from perceptio.sources.address_list import ListReader
from perceptio.sources.coco import CocoReader
from perceptio.sources.folder import FolderReader
from perceptio.sources.llava import LlavaReader
from perceptio.sources.parquet import ParquetReader
from perceptio.sources.record import Reader
from perceptio.sources.refcoco import RefcocoReader
from perceptio.sources.rgbd import RgbdReader
from perceptio.sources.webdataset import WebDatasetReader
from schemas.sources import (
    CocoSource,
    FileSource,
    FolderSource,
    ListSource,
    LlavaSource,
    ParquetSource,
    RefcocoSource,
    RgbdSource,
    WebDatasetSource,
)


def reader_of(source: FileSource) -> Reader:
    """What reads a source. Raises SourceError for a path in a store that is not read from."""
    match source:
        case FolderSource():
            return FolderReader(source)
        case RefcocoSource():
            return RefcocoReader(source)
        case CocoSource():
            return CocoReader(source)
        case LlavaSource():
            return LlavaReader(source)
        case ParquetSource():
            return ParquetReader(source)
        case RgbdSource():
            return RgbdReader(source)
        case WebDatasetSource():
            return WebDatasetReader(source)
        case ListSource():
            return ListReader(source)
    assert_never(source)
