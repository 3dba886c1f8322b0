"""The endpoint's requests and replies."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PerceiveRequest(BaseModel):
    """`POST /v1/perceive` as JSON."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="base64 of a JPEG, PNG or WebP file, with or without a data: prefix")
    question: str = Field(min_length=1, description="what to answer")
    segmentation: Literal["auto", "on", "off"] = Field(default="auto", description="write [SEG] tokens and masks")
    depth: Literal["auto", "on", "off"] = Field(default="auto", description="write the depth block and the map")
    max_new_tokens: int | None = Field(default=None, ge=1, description="of the text; the server's limit is the default")


class Rle(BaseModel):
    """A mask in COCO's compressed run lengths: size [height, width], counts."""

    size: tuple[int, int]
    counts: str


class MaskReply(BaseModel):
    rle: Rle
    png: str = Field(description="base64 of an 8-bit PNG, 0 or 255, the image's size")
    box: tuple[int, int, int, int] = Field(description="x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros if empty")
    area: int = Field(description="pixels")
    score: float = Field(description="predicted IoU in [0, 1]")


class DepthReply(BaseModel):
    png: str = Field(description="base64 of a 16-bit PNG of inv_depth * 65535, larger = closer, the image's size")
    codes: list[int] = Field(description="N codes, row-major")
    grid: tuple[int, int] = Field(description="rows, columns")
    convention: Literal["inv_depth: 0 farthest, 1 closest, per image"] = "inv_depth: 0 farthest, 1 closest, per image"


class PerceiveReply(BaseModel):
    request_id: str
    model: str = Field(description="digest of the weights that answered")
    text: str
    masks: list[MaskReply]
    depth: DepthReply | None
    width: int
    height: int
    finish: Literal["stop", "length"]
    seconds: dict[str, float] = Field(description="per phase: decode, generate, masks, depth")


class ErrorReply(BaseModel):
    """Every refusal: what was wrong, what was seen, what is expected."""

    error: str
    field: str | None = None
    request_id: str
