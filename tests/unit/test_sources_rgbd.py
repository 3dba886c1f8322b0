"""RGB-D folders from rooms: depth comes back in millimetres, whatever units it was stored in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perceptio.data.images import decode_depth16
from perceptio.sources.record import Found, Refused, SourceError
from perceptio.sources.rgbd import RgbdReader
from schemas.sources import RgbdSource
from schemas.tables import Reason
from tests.sources import encoded, good, jpeg, png, refusals, results, room, unique, write


def units(index: int, scale: float) -> Any:
    return np.rint(room(index).depth_HW * scale).astype(np.uint16)


def lay_out(folder: Path, scale: float = 1000) -> None:
    for index, name in enumerate(("a/0", "1")):
        write(folder / "images" / f"{name}.jpg", jpeg(index))
        write(folder / "depth" / f"{name}.png", encoded(units(index, scale), "PNG"))


def reader(folder: Path, scale: float = 1000, **more: Any) -> RgbdReader:
    section = {"format": "rgbd", "name": "nyu", "path": str(folder), "depth_scale": scale, **more}
    return RgbdReader(RgbdSource.model_validate(section))


@pytest.mark.parametrize("scale", [1000, 5000, 256])
def test_depth_comes_back_in_millimetres(tmp_path: Path, scale: float) -> None:
    lay_out(tmp_path, scale)
    found = good(reader(tmp_path, scale))
    assert [row.data for row in found] == [jpeg(1), jpeg(0)]
    for index, row in zip((1, 0), found, strict=True):
        assert row.recorded_depth is not None
        np.testing.assert_allclose(
            decode_depth16(row.recorded_depth) / 1000, room(index).depth_HW, atol=0.51 / scale + 0.0006
        )
    assert len(unique(reader(tmp_path).items())) == 2


def test_folders_may_have_other_names(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "images").rename(tmp_path / "rgb")
    (tmp_path / "depth").rename(tmp_path / "d")
    assert len(good(reader(tmp_path, image_folder="rgb", depth_folder="./d"))) == 2
    with pytest.raises(SourceError, match=r"sources.nyu.image_folder '.*images' is no folder"):
        list(reader(tmp_path).items())
    with pytest.raises(SourceError, match=r"sources.nyu.depth_folder '.*depth' is no folder"):
        list(reader(tmp_path, image_folder="rgb").items())


def test_what_is_unknown_or_beyond_the_table_is_zero(tmp_path: Path) -> None:
    lay_out(tmp_path)
    values = np.zeros((64, 64), np.uint16)
    values[0, :4] = (1, 256, 16776, 16777)  # 3.9 mm, 1 m, 65.531 m, 65.535 m
    values[1, 0] = 65535
    write(tmp_path / "depth" / "1.png", encoded(values, "PNG"))
    depth = decode_depth16(good(reader(tmp_path, 256))[0].recorded_depth or b"")
    assert depth[0, :5].tolist() == [4, 1000, 65531, 65535, 0] and depth[1, 0] == 0


def grey(size: tuple[int, int], mode: str = "I;16") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (grey((64, 63)), "the depth map is (64, 63), the image (64, 64)"),
        (grey((64, 64), "L"), "no whole 16-bit grey PNG"),
        (grey((64, 64), "RGB"), "no whole 16-bit grey PNG"),
        (encoded(units(1, 1000), "PNG")[:-900], "no whole 16-bit grey PNG"),
        (jpeg(1), "no whole 16-bit grey PNG"),
        (b"", "no whole 16-bit grey PNG"),
    ],
)
def test_depth_of_another_kind_or_size_is_refused(tmp_path: Path, depth: bytes, message: str) -> None:
    lay_out(tmp_path)
    write(tmp_path / "depth" / "1.png", depth)
    for scale in (1000, 5000):
        ((reason, text),) = refusals(reader(tmp_path, scale))
        assert reason == Reason.BAD_RECORD and message in text
        assert len(results(reader(tmp_path, scale))) == 2


def test_images_and_depth_without_a_partner_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path)
    write(tmp_path / "images" / "lonely.png", png(0))
    write(tmp_path / "images" / "1.png", png(0))
    write(tmp_path / "depth" / "stray.png", png(0))
    write(tmp_path / "images" / "notes.txt", b"")
    assert [(row.reason, row.uri.removeprefix(f"{tmp_path}/")) for row in results(reader(tmp_path))
            if isinstance(row, Refused)] == [
        (Reason.DUPLICATE_ID, "images/1.png"),
        (Reason.MISSING_FILE, "images/lonely.png"),
        (Reason.MISSING_FILE, "depth/stray.png"),
    ]  # fmt: skip
    assert len(good(reader(tmp_path, image_folder="images/a", depth_folder="depth/a"))) == 1


def test_depth_that_goes_before_it_is_read_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path)
    made = reader(tmp_path)
    items = list(made.items())
    (tmp_path / "depth" / "1.png").unlink()
    assert [type(row) for item in items for row in made.read(item)] == [Refused, Found]


def test_a_turned_image_is_refused_and_a_broken_one_is_left_to_the_decoder(tmp_path: Path) -> None:
    lay_out(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(room(1).rgb_HW3).save(stream, "JPEG", exif=exif)
    write(tmp_path / "images" / "1.jpg", stream.getvalue())
    write(tmp_path / "images" / "a" / "0.jpg", b"no image")
    turned, broken = results(reader(tmp_path))
    assert isinstance(turned, Refused) and "turned by its EXIF tag (6)" in turned.message
    assert isinstance(broken, Found) and broken.recorded_depth is None


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.txt", b"")
    write(tmp_path / "depth" / "a.png", b"")
    with pytest.raises(SourceError, match=r"sources.nyu.image_folder '.*images' holds no image"):
        list(reader(tmp_path).items())


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_are_found_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    for name, whole in (("images/1.jpg", jpeg(1)), ("depth/1.png", encoded(units(1, 1000), "PNG"))):
        flipped = bytearray(whole)
        for _ in range(data.draw(st.integers(0, 3))):
            flipped[data.draw(st.integers(0, min(200, len(whole) - 1)))] = data.draw(st.integers(0, 255))
        write(folder / name, bytes(flipped))
    (row,) = results(reader(folder, 5000))
    assert isinstance(row, Found) or row.reason == Reason.BAD_RECORD
