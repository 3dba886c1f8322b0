"""Image files in, upright 8-bit RGB out, and 16-bit maps as PNG. Nothing is decoded before its header was checked.

Shape legend: H, W height and width in pixels, 3 the red, green and blue channels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from schemas.tables import Reason

Pixels = npt.NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # what PIL may try; its other readers are never reached
LOSSY = ("JPEG", "MPO", "WEBP")  # stored again as JPEG, all else as PNG
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
PNG_DEPTH = 24  # offset of the byte that says bits per channel
# what PIL's readers raise on broken files: they trust lengths and offsets that stand in them
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """A file that is no usable image; `reason` is fit for a rejects row."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageLimits:
    """What is refused from the header alone."""

    min_side: int  # pixels
    max_pixels: int


@dataclass(frozen=True)
class StoredImage:
    """An image as tables hold it: upright, RGB, 8 bit."""

    data: bytes  # JPEG or PNG
    width: int
    height: int
    scale: float  # its sides over those of the upright original; 1 where it was not scaled down


def decode(data: bytes, limits: ImageLimits) -> Pixels:
    """The image, rgb_HW3, turned upright by its EXIF tag; grey, palette, CMYK, 16 bits and alpha (on white) made RGB.

    Raises ImageError for an empty, unknown, cut-off, animated, too small or too large file.
    """
    with _opened(data, limits) as image, _decoding(image):
        return _pixels(data, image)


def stored(data: bytes, limits: ImageLimits, *, max_side: int, jpeg_quality: int) -> StoredImage:
    """The file as it came if it is upright RGB in JPEG or PNG within max_side, else encoded anew.

    Photographs (JPEG, WebP) are encoded as JPEG, all else as PNG without loss. The whole file is decoded either way, so
    what is stored can be read. Raises ImageError as `decode` does.
    """
    with _opened(data, limits) as image, _decoding(image):
        eight_bits = image.format == "JPEG" or (image.format == "PNG" and data[PNG_DEPTH] == 8)
        if eight_bits and _is_plain(image) and max(image.size) <= max_side:
            _pixels(data, image, smallest=True)
            return StoredImage(data, *image.size, 1.0)
        rgb_HW3 = _pixels(data, image)
        lossy = image.format in LOSSY
    height, width = rgb_HW3.shape[:2]
    scale = min(1.0, max_side / max(width, height))
    if scale < 1:
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        rgb_HW3 = np.asarray(Image.fromarray(rgb_HW3).resize((width, height), Image.Resampling.LANCZOS))
    encoded = encode_jpeg(rgb_HW3, jpeg_quality) if lossy else encode_png(rgb_HW3)
    return StoredImage(encoded, width, height, scale)


def encode_jpeg(rgb_HW3: Pixels, quality: int) -> bytes:
    """The bytes of a JPEG with full colour resolution."""
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb_HW3), quality, "RGB", "444")
    return encoded


def encode_png(rgb_HW3: Pixels) -> bytes:
    """The bytes of an 8-bit RGB PNG."""
    return _png(Image.fromarray(rgb_HW3))


def encode_depth16(values_HW: npt.NDArray[np.uint16]) -> bytes:
    """The bytes of a 16-bit grey PNG."""
    if values_HW.dtype != np.uint16 or values_HW.ndim != 2:
        raise ValueError(f"map is {values_HW.dtype} of shape {values_HW.shape}, expected uint16 (H, W): scale it first")
    return _png(Image.fromarray(values_HW))


def decode_depth16(data: bytes) -> npt.NDArray[np.uint16]:
    """The values (H, W) of a 16-bit grey PNG. Raises ValueError for any other image."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("I;16", "I"):
                raise ValueError(f"depth map is a PNG of mode '{image.mode}', expected 16-bit grey")
            return np.asarray(image).astype(np.uint16)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"the depth map cannot be read: {error}") from error


def _opened(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image, its header read and checked, its pixels not yet decoded."""
    if not data:
        raise ImageError(Reason.EMPTY_FILE, "the file has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(Reason.TOO_LARGE, f"{error}; the limit is {limits.max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        message = f"{len(data)} bytes that begin with {data[:8]!r} are none of {', '.join(FORMATS)}"
        raise ImageError(Reason.NOT_AN_IMAGE, message) from error
    except UNREADABLE as error:
        raise ImageError(Reason.TRUNCATED_IMAGE, f"the header cannot be read: {error}") from error
    width, height = image.size
    if min(width, height) < limits.min_side:
        raise ImageError(Reason.TOO_SMALL, f"{width} x {height} pixels; the shorter side needs {limits.min_side}")
    if width * height > limits.max_pixels:
        raise ImageError(Reason.TOO_LARGE, f"{width} x {height} pixels; the limit is {limits.max_pixels} pixels")
    with _decoding(image):  # frames are counted by reading through all of them
        # a phone's multi-picture JPEG is one photograph with extras, so it counts as still
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    if animated:
        raise ImageError(Reason.ANIMATED_IMAGE, f"the {image.format} holds more than one frame; give one picture")
    if image.mode == "F":
        raise ImageError(Reason.NOT_AN_IMAGE, f"the {image.format} holds floats, whose range nobody states; scale it")
    return image


def _pixels(data: bytes, image: Image.Image, *, smallest: bool = False) -> Pixels:
    """The decoded image. `smallest` may give an eighth of it, where only the file's soundness is asked for.

    All of a JPEG's coefficients are read for that too, so it fails where the whole would; most of the rest is left out.
    """
    if image.format == "JPEG" and _is_plain(image):
        least = int(smallest)  # of either side, in pixels; 0 asks for the full size
        try:
            rgb_HW3: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
        except ValueError:  # its decoder is strict: PIL decides whether the file is broken or only untidy
            return _by_pil(image)
        return rgb_HW3
    return _by_pil(image)


@contextmanager
def _decoding(image: Image.Image) -> Iterator[None]:
    """Raises ImageError for what decoders raise. PIL decodes a PNG as soon as its EXIF tags are asked for."""
    try:
        yield
    except UNREADABLE as error:
        raise ImageError(Reason.TRUNCATED_IMAGE, f"the {image.format} cannot be decoded: {error}") from error


def _by_pil(image: Image.Image) -> Pixels:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a pixel, in one of PIL's several spellings
        grey_HW = np.clip(np.asarray(upright), 0, 65535).astype(np.uint32)
        upright = Image.fromarray((grey_HW // 257).astype(np.uint8))
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return np.array(upright.convert("RGB"))


def _is_plain(image: Image.Image) -> bool:
    """True for RGB that needs no turning: such a file can be kept as it is."""
    return image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(ORIENTATION, 1) == 1


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
