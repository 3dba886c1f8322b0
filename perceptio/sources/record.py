"""What a source is read into: items to read, and for each of them an image with its record, or a refusal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from schemas.tables import Reason

LONGEST_SIDE = 65_535  # pixels of a mask; no JPEG is larger


class SourceError(ValueError):
    """A source that cannot be used as a whole; the message names the field or file, what was seen, what to do."""


class RowError(ValueError):
    """One row that cannot be used; `reason` is fit for a rejects row."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("text holds the character NUL: take it out")
    return text


def _rle_row(mask: dict[str, Any]) -> dict[str, Any]:
    if mask.keys() != {"height", "width", "counts"}:
        raise ValueError(f"mask has the keys {sorted(mask)[:5]}, expected height, width and counts")
    for side in ("height", "width"):
        if type(mask[side]) is not int or not 0 < mask[side] <= LONGEST_SIDE:
            raise ValueError(f"mask's {side} is no whole number from 1 to {LONGEST_SIDE}")
    if not isinstance(mask["counts"], str):
        raise ValueError("mask's counts are no string, expected COCO's compressed run lengths")
    return mask


Text = Annotated[str, AfterValidator(_no_nul)]
Mask = Annotated[dict[str, Any], AfterValidator(_rle_row)]


class Point(BaseModel):
    """A lettered point drawn into the image, in pixels."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    x: float
    y: float


class Turn(BaseModel):
    """One question about an image, with what a perfect reply says; fields as in schemas.tables.TURN."""

    model_config = ConfigDict(extra="forbid")

    kind: Text
    prompt: Text
    answer: Text
    form: Text = ""
    expression: Text = ""
    objects: tuple[int, ...] = ()
    choices: tuple[Text, ...] = ()
    points: tuple[Point, ...] = ()

    @model_validator(mode="after")
    def _refers(self) -> Turn:
        if self.kind == "referring" and not self.expression.strip():
            raise ValueError("expression is empty, expected the words that a referring turn refers by")
        return self


class Record(BaseModel):
    """What is known of an image, in pixels of the upright original: boxes (x0, y0, x1, y1), clicks (x, y), masks.

    Each of them is one per object, in the same order, or left out.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    turns: tuple[Turn, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    masks: tuple[Mask, ...] = ()  # rows of schemas.tables.RLE
    clicks: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Item:
    """What is read at once: a file, or a range of rows of one. With a `reason` it is one refusal, found in listing."""

    uri: str
    first: int = 0  # first row within a Parquet file
    rows: int = 1  # images that it stands for; 0 = not known before reading
    size: int = -1  # bytes, as listed; -1 = not known
    record: str = ""  # a Record as JSON, not yet checked
    reason: str = ""  # a schemas.tables.Reason
    message: str = ""

    @property
    def id(self) -> str:
        """The first 16 hex digits of the SHA-256 of where it lies, and of what is wrong with it."""
        key = f"{self.uri}#{self.first}" + (f"#{self.message}" if self.reason else "")
        return hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """An image file as it was read, not yet decoded, with what is known of it."""

    uri: str
    data: bytes
    record: Record
    recorded_depth: bytes | None = None  # 16-bit PNG, millimetres, 0 = unknown, of the original image's size


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used, and why."""

    reason: Reason
    message: str
    uri: str


class Reader(Protocol):
    """How a source is read. One reader may be used by several threads."""

    def items(self) -> Iterator[Item]:
        """All items, always in the same order, while they are found. Raises SourceError for an unusable source."""
        ...

    def read(self, item: Item) -> Iterator[Found | Refused]:
        """The images of an item in order: exactly `item.rows`, where that is known.

        What is wrong with a row is Refused. Raises OSError where the store fails, so that the read can be repeated.
        """
        ...


def problem(reason: Reason, message: str, uri: str) -> Item:
    """An item that stands for one refusal, found in listing."""
    return Item(clean(uri), reason=reason.value, message=clean(message))


def refused(error: RowError, uri: str) -> Refused:
    """The refusal that an error means."""
    return Refused(error.reason, clean(str(error)), clean(uri))


def record_of(text: str) -> Record:
    """The record of a JSON text, an empty one for "". Raises RowError with the names of the wrong fields."""
    try:
        return Record.model_validate_json(text) if text else Record()
    except ValidationError as error:
        raise RowError(Reason.BAD_RECORD, problems_of(error)) from error


def checked(values: dict[str, Any]) -> Record:
    """The record of these fields. Raises RowError with the names of the wrong ones."""
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        raise RowError(Reason.BAD_RECORD, problems_of(error)) from error


def problems_of(error: ValidationError) -> str:
    """Each wrong field with what is wrong with it, the first five of them."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in found[:5]]
    return "; ".join(told + ([f"and {len(found) - 5} more"] if len(found) > 5 else []))


def refuse_problem(item: Item) -> None:
    """Raises RowError for an item whose problem was found in listing."""
    if item.reason:
        raise RowError(Reason(item.reason), item.message)


def clean(text: str) -> str:
    """The text with what is no valid Unicode written as escapes: hostile names get into messages too."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def shown(value: object) -> str:
    """A value in short, for messages about data that nobody has checked."""
    if isinstance(value, str | bytes):
        return repr(value if len(value) <= 60 else value[:60]) + ("..." if len(value) > 60 else "")
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 64 else "a huge whole number"
    return f"a {type(value).__name__}"
