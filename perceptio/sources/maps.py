"""Masks and depth maps that come as image files beside their image.

Shape legend: H, W image height and width in pixels, 3 the red, green and blue channels.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from perceptio.data.images import FORMATS, ORIENTATION, UNREADABLE, decode_depth16, encode_depth16
from perceptio.data.masks import Rle, masks_to_rle
from perceptio.sources.record import RowError
from schemas.tables import Reason

Size = tuple[int, int]  # width, height
BROKEN = (*UNREADABLE, Image.DecompressionBombError, struct.error)  # what PIL raises for a file that is no image
MILLIMETRES = 1000.0  # of a metre
MOST = np.iinfo(np.uint16).max  # millimetres that the table can hold
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap the sides


def upright_size(data: bytes, *, may_turn: bool) -> Size | None:
    """The size of an image once it is upright, None where it cannot be opened.

    Raises RowError for an image that is to be turned where that may not be.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            turned = image.getexif().get(ORIENTATION, 1)
            width, height = image.size
    except BROKEN:
        return None
    if turned != 1 and not may_turn:
        message = f"the image is turned by its EXIF tag ({turned}), its depth may not be: save it upright"
        raise RowError(Reason.BAD_RECORD, message)
    return (height, width) if turned in TRANSPOSED else (width, height)


def mask_of(data: bytes, size: Size) -> Rle:
    """The mask of an image file: inside is what is not black. Raises RowError for another size or a broken file."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != size:
                message = f"the mask is {image.size}, the upright image {size} (width, height): they must be equal"
                raise RowError(Reason.BAD_MASK, message)
            wide = image.mode.startswith(("I", "F"))
            values = np.asarray(image if wide else image.convert("RGB"))
    except RowError:
        raise
    except BROKEN as error:
        raise RowError(Reason.BAD_MASK, f"the mask cannot be read as an image: {error!s:.200}") from error
    inside_HW = values != 0 if wide else (values != 0).any(-1)
    return masks_to_rle(inside_HW[None])[0]


def millimetres_of(data: bytes, size: Size, scale: float) -> bytes:
    """A 16-bit PNG in millimetres out of one with `scale` units a metre; beyond 65.535 m becomes 0, unknown.

    Raises RowError for another size than the image's, and for a file that is no such PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != size:
                message = f"the depth map is {image.size}, the image {size} (width, height): they must be equal"
                raise RowError(Reason.BAD_RECORD, message)
        units_HW = decode_depth16(data)
    except RowError:
        raise
    except BROKEN as error:
        raise RowError(Reason.BAD_RECORD, f"the depth map is no whole 16-bit grey PNG: {error!s:.200}") from error
    if scale == MILLIMETRES:
        return data
    millimetres_HW = np.rint(units_HW * (MILLIMETRES / scale))
    return encode_depth16(np.where(millimetres_HW > MOST, 0, millimetres_HW).astype(np.uint16))
