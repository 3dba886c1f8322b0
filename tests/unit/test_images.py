"""Images: every kind of file ends as upright RGB or as a reason, and nothing large is decoded to find out."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from perceptio.data.images import ImageError, ImageLimits, decode, decode_depth16, encode_depth16, encode_png, stored
from perceptio.data.masks import masks_to_rle, rle_to_mask
from schemas.tables import Reason

LIMITS = ImageLimits(min_side=8, max_pixels=50_000_000)
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """A smooth picture whose four quarters differ, so that turning it shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y // height, 255 * x // width, 120 + 0 * x], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG header that claims side x side pixels, with almost no data behind it."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


PLAIN = Image.fromarray(picture())
JPEG = encoded(PLAIN, "JPEG", quality=95)
PNG = encoded(PLAIN, "PNG")
FRAMES = [Image.fromarray(np.roll(picture(), k, 0)) for k in range(3)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"this is a letter, not a picture", Reason.NOT_AN_IMAGE),
        (JPEG[: len(JPEG) // 2], Reason.TRUNCATED_IMAGE),
        (PNG[: len(PNG) // 2], Reason.TRUNCATED_IMAGE),
        (encoded(PLAIN, "WEBP")[:100], Reason.TRUNCATED_IMAGE),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), Reason.TOO_SMALL),
        (encoded(Image.new("RGB", (400, 4)), "JPEG"), Reason.TOO_SMALL),
        (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), Reason.ANIMATED_IMAGE),
        (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), Reason.ANIMATED_IMAGE),
        (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), Reason.ANIMATED_IMAGE),
        (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), Reason.ANIMATED_IMAGE),
        (huge_png(14_143), Reason.TOO_LARGE),
        (huge_png(8_000), Reason.TOO_LARGE),
        (encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"), Reason.NOT_AN_IMAGE),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
def test_a_useless_file_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(ImageError) as refused:
        decode(data, LIMITS)
    assert refused.value.reason == reason and len(str(refused.value)) > 10
    with pytest.raises(ImageError):
        stored(data, LIMITS, max_side=100, jpeg_quality=95)


def test_200_megapixels_are_refused_without_decoding_them() -> None:
    tracemalloc.start()
    with pytest.raises(ImageError, match="limit"):
        decode(huge_png(14_143), LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation_is_undone(tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition of PIL's that the tag asks to undo
    image = PLAIN.transpose(Image.Transpose(turned[tag])) if tag > 1 else PLAIN
    data = encoded(image, "JPEG", quality=95, exif=exif)
    rgb = decode(data, LIMITS)
    assert rgb.shape == (24, 40, 3)
    assert np.abs(rgb.astype(int) - picture()).mean() < 8
    kept = stored(data, LIMITS, max_side=100, jpeg_quality=95)
    assert (kept.width, kept.height) == (40, 24)
    assert (kept.data == data) == (tag == 1)
    with Image.open(io.BytesIO(kept.data)) as again:
        assert again.size == (40, 24) and again.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "PA", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = PLAIN.convert("P").convert("PA") if mode == "PA" else PLAIN.convert(mode)
    rgb = decode(encoded(image, "TIFF"), LIMITS)
    assert rgb.dtype == np.uint8 and rgb.shape == (24, 40, 3)
    expected = np.asarray(image.convert("RGB"), int)
    assert np.abs(rgb - expected).mean() < 2


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(24, 0)
    rgb = decode(encoded(Image.fromarray(ramp), "PNG"), LIMITS)
    assert (rgb[0, :, 0] == ramp[0] // 257).all()
    kept = stored(encoded(Image.fromarray(ramp), "PNG"), LIMITS, max_side=100, jpeg_quality=95)
    with Image.open(io.BytesIO(kept.data)) as again:
        assert again.mode == "RGB"


def test_clear_pixels_become_white() -> None:
    clear = np.dstack([picture(), np.zeros((24, 40), np.uint8)])
    assert (decode(encode_png(clear), LIMITS) == 255).all()


def test_what_is_stored_is_the_file_itself_where_it_can_be() -> None:
    for data in (JPEG, PNG):
        assert stored(data, LIMITS, max_side=100, jpeg_quality=95).data == data


@pytest.mark.parametrize("options", [{"subsampling": 0}, {}, {"progressive": True}, {"restart_marker_blocks": 5}])
def test_what_is_stored_can_be_decoded_and_what_can_is_stored(options: dict[str, Any]) -> None:
    """The check before storing looks at an eighth of a JPEG: it must see what decoding the whole would see."""
    rng = np.random.default_rng(0)
    whole = encoded(Image.open(PHOTOGRAPHS / "rocket.jpg").resize((200, 136)), "JPEG", **options)
    verdicts = []
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[int(rng.integers(len(whole))) :]
        else:  # one bit, or a few bytes in the pixels' part
            at = int(rng.integers(len(whole) // 2, len(whole) - 8))
            damaged[at : at + trial % 2 * 8] = rng.bytes(trial % 2 * 8)
            damaged[at] ^= 1 << trial % 8
        verdicts.append([refusal(decode, damaged), refusal(partial(stored, max_side=300, jpeg_quality=95), damaged)])
    assert all(one == other for one, other in verdicts)
    assert 15 < sum(one is None for one, _ in verdicts) < 135


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PNG", "WEBP"])
def test_a_file_cut_off_anywhere_is_refused_or_read(kind: str) -> None:
    small = [frame.resize((24, 18)) for frame in FRAMES]
    whole = encoded(small[0], kind, **({"save_all": True, "append_images": small[1:]} if kind == "GIF" else {}))
    for end in range(len(whole)):
        refusal(partial(stored, max_side=300, jpeg_quality=95), whole[:end])
    assert refusal(decode, whole[: len(whole) // 2]) is not None


def test_tags_that_cannot_be_read_refuse_the_file() -> None:
    header, rest = PNG[:33], PNG[33:]
    tags = struct.pack(">I", 4) + b"eXIfMM\0*" + struct.pack(">I", zlib.crc32(b"eXIfMM\0*"))
    assert refusal(partial(stored, max_side=300, jpeg_quality=95), header + tags + rest) is Reason.TRUNCATED_IMAGE


def refusal(read: Callable[[bytes, ImageLimits], Any], data: bytes) -> Reason | None:
    try:
        read(bytes(data), LIMITS)
    except ImageError as error:
        return error.reason
    return None


def test_a_larger_image_is_scaled_down_keeping_its_shape() -> None:
    kept = stored(PNG, LIMITS, max_side=20, jpeg_quality=95)
    assert (kept.width, kept.height, kept.scale) == (20, 12, 0.5)
    assert decode(kept.data, LIMITS).shape == (12, 20, 3)


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"])
def test_photographs_decode_as_pil_decodes_them(name: str) -> None:
    data = (PHOTOGRAPHS / name).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"), int)
    assert np.abs(decode(data, LIMITS) - expected).max() <= 1


def test_sixteen_bit_maps_come_back_exactly() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (31, 17)).astype(np.uint16)
    assert (decode_depth16(encode_depth16(values)) == values).all()
    with pytest.raises(ValueError, match="16-bit"):
        decode_depth16(PNG)
    with pytest.raises(ValueError, match="uint16"):
        encode_depth16(values.astype(np.float32))  # type: ignore[arg-type]


def test_masks_come_back_exactly() -> None:
    masks = np.random.default_rng(0).random((5, 13, 7)) > 0.6
    masks[0], masks[1] = False, True
    assert all((rle_to_mask(rle) == mask).all() for rle, mask in zip(masks_to_rle(masks), masks, strict=True))


@pytest.mark.parametrize("counts", ["", "0", "zzzz", "~~", "\x00", "5", "o", "o" * 10**7])
def test_wrong_run_lengths_are_refused_before_they_are_decoded(counts: str) -> None:
    with pytest.raises(ValueError, match="run"):
        rle_to_mask({"height": 4, "width": 6, "counts": counts})


def test_a_mask_of_another_size_is_refused() -> None:
    (rle,) = masks_to_rle(np.ones((1, 4, 6), bool))
    with pytest.raises(ValueError, match="24 pixels, expected 5 x 6"):
        rle_to_mask({**rle, "height": 5})
