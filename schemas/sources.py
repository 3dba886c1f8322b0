"""Where images come from: one section of the recipe a format, as public data sets lie on disk.

A path is a local one or an s3:// address. `perceptio.sources` reads them; rooms are rendered instead.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from schemas.section import Positive, Section

Location = Annotated[str, StringConstraints(min_length=1)]
Column = Annotated[str, StringConstraints(min_length=1)]


class RoomsSource(Section):
    """Rooms that the project renders itself."""

    format: Literal["rooms"]
    name: str
    count: Positive
    size: Positive = Field(description="image side in pixels")
    seed: int = Field(description="layout seed; training and held-out sources must differ")
    questions: tuple[str, ...] = Field(description="kinds of questions to keep, e.g. [referring, count]; [] for none")
    exact_masks: bool = Field(description="true: the record carries exact masks; false: boxes only, for `masks`")
    held_out: bool = False


class FolderSource(Section):
    """A plain folder of images, with an optional `records.jsonl` of turns beside them.

    A line of it is {"image": path inside the folder, "turns": [...], "boxes": [...], "masks": [...]}, the last three
    optional, as in `perceptio.sources.record`.
    """

    format: Literal["folder"]
    name: str
    path: Location
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class RefcocoSource(Section):
    """RefCOCO, RefCOCO+ or RefCOCOg: one row an image, one turn a sentence, one mask an object that is referred to."""

    format: Literal["refcoco"]
    name: str
    path: Location = Field(description="folder of `refs(SPLITS_BY).p` and `instances.json`")
    images: Location = Field(description="folder of the COCO images, e.g. train2014")
    splits_by: Literal["unc", "umd", "google"] = Field(description="whose split: unc, or for RefCOCOg umd or google")
    split: Literal["train", "val", "testA", "testB", "test"]
    max_file_bytes: Positive = Field(default=2**30, description="a larger refs or instances file is not opened")
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class CocoSource(Section):
    """COCO instances: one row an image, with a box and a mask for each annotation.

    Crowd annotations (iscrowd 1) are no single object: they are left out, and counted in the log.
    """

    format: Literal["coco"]
    name: str
    path: Location = Field(description="the JSON file, e.g. annotations/instances_train2017.json")
    images: Location = Field(description="folder of the images, e.g. train2017")
    turns: Literal["none", "category"] = Field(
        default="none",
        description="none: boxes and masks only; category: one referring turn for each category that has exactly one "
        "object in the image and no crowd, by the category's name",
    )
    max_file_bytes: Positive = Field(default=2**30, description="a larger JSON file is not opened")
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class LlavaSource(Section):
    """LLaVA's conversations, e.g. llava_v1_5_mix665k.json: one row an image, with the turns of all its records.

    Records without an image are rejected as `text_only`.
    """

    format: Literal["llava"]
    name: str
    path: Location = Field(description="JSON file: an array of {id, image, conversations: [{from, value}, ...]}")
    images: Location = Field(description="folder that the records' `image` is relative to")
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class ParquetColumns(Section):
    """Which column of a Parquet file is what. A column that is not named is not read."""

    image: Column = Field(
        description="struct {bytes, path} as Hugging Face writes it, or binary: the image's file; or string: its path "
        "below the source's `images`"
    )
    question: Column | None = Field(default=None, description="string, or list of strings; needs `answer`")
    answer: Column | None = Field(default=None, description="string, or a list as long as `question`'s")
    expression: Column | None = Field(
        default=None,
        description="string, or list of strings: one referring turn each. With as many objects in the row as "
        "expressions, each means the object of its place; with one object, all mean that one",
    )
    mask: Column | None = Field(
        default=None,
        description="one mask, or a list of them, each an image file of the image's size (struct {bytes, path} or "
        "binary; not black = inside) or run lengths (struct {height, width, counts} or {size, counts}, COCO's "
        "compressed form)",
    )
    box: Column | None = Field(default=None, description="list of 4 numbers in pixels, or a list of such lists")
    box_form: Literal["xyxy", "xywh"] = Field(default="xyxy", description="two corners, or a corner and the sides")

    @model_validator(mode="after")
    def _pairs(self) -> ParquetColumns:
        if (self.question is None) != (self.answer is None):
            raise ValueError("question and answer go together: name both columns, or none")
        return self


class ParquetSource(Section):
    """Parquet files, one row an image. Of a file's columns only those that are named here are read."""

    format: Literal["parquet"]
    name: str
    path: Location = Field(description="a .parquet file, or a folder of them")
    images: Location | None = Field(default=None, description="folder for columns that hold paths of images or masks")
    columns: ParquetColumns
    kind: str = Field(default="vqa", description="kind of the turns that `question` and `answer` make")
    rows_per_item: Positive = Field(default=512, description="most rows that are read at once, within a row group")
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class RgbdSource(Section):
    """Images with recorded depth: two folders whose files match by path, less the suffix.

    Depth is 16-bit grey PNG of the image's size, named *.png; 0 is unknown. It is kept in millimetres, so what lies
    beyond 65.535 m becomes unknown.
    """

    format: Literal["rgbd"]
    name: str
    path: Location = Field(description="folder that holds the two folders")
    image_folder: Location = Field(default="images", description="name of the images' folder in `path`")
    depth_folder: Location = Field(default="depth", description="name of the depth maps' folder in `path`")
    depth_scale: Annotated[float, Field(gt=0)] = Field(
        description="units of a metre in the depth files: 1000 for millimetres, 5000 for TUM, 256 for KITTI"
    )
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class WebDatasetSource(Section):
    """Tar shards of samples: neighbouring files of one name up to the first dot, one of them an image.

    Partners: `.json` of a record's turns, boxes and masks, or of {question, answer} (any other JSON is data about the
    sample and not read); `.txt` a caption; `.cls` the number of a class.
    """

    format: Literal["webdataset"]
    name: str
    path: Location = Field(description="a .tar file, a folder of them, or a pattern such as shard-{000000..000010}.tar")
    caption_prompt: str = Field(default="Please describe this image.", description="what a `.txt` answers")
    class_prompt: str = Field(default="What does this image show?", description="what a `.cls` answers")
    class_names: tuple[str, ...] = Field(default=(), description="by number; without them the number is the answer")
    max_member_bytes: Positive = Field(default=2**28, description="a larger file of a shard is refused")
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


class ListSource(Section):
    """A list of addresses of images: local, s3://, http:// or https://.

    A text file has one address a line, a .jsonl file one {"image": address, ...} with the fields of a record. Relative
    addresses are relative to the list's folder. Web addresses are fetched without a proxy.
    """

    format: Literal["list"]
    name: str
    path: Location = Field(description="the list: a text file, or a .jsonl file")
    max_bytes: Positive = Field(default=2**26, description="a larger image is refused, on the web while it arrives")
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=30.0, description="of one try to fetch a web address")
    tries: Positive = Field(default=4, description="to fetch a web address, before it is refused as unreachable")
    allow_private_addresses: bool = Field(
        default=False, description="true: hosts may be inside this network; false: public addresses only"
    )
    held_out: bool = False
    licence: str = Field(default="unknown", description="SPDX identifier; it travels in the manifests")


FileSource = (
    FolderSource | RefcocoSource | CocoSource | LlavaSource | ParquetSource | RgbdSource | WebDatasetSource | ListSource
)  # whatever is read, not rendered
Source = Annotated[RoomsSource | FileSource, Field(discriminator="format")]
