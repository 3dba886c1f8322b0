"""Packed maps come back bit for bit, are smaller than PNGs, and broken ones are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from perceptio.data.images import encode_depth16
from perceptio.data.maps import HEADER, MAGIC, pack_map, unpack_map

SIDES = st.integers(1, 9)


@settings(max_examples=200, deadline=None)
@given(st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.uint16, shape)))
def test_any_map_comes_back_bit_for_bit(values: np.ndarray) -> None:
    found = unpack_map(pack_map(values))
    assert found.dtype == np.uint16 and found.shape == values.shape
    assert (found == values).all()


def test_a_view_of_a_larger_map_comes_back_and_stays_as_it_was() -> None:
    whole = np.random.default_rng(0).integers(0, 65536, (40, 60)).astype(np.uint16)
    before = whole.copy()
    assert (unpack_map(pack_map(whole[3:30:2, 5:50])) == whole[3:30:2, 5:50]).all()
    assert (whole == before).all()


def test_a_smooth_map_takes_less_than_half_of_a_png() -> None:
    y, x = np.mgrid[0:200, 0:300] / 100.0
    smooth = np.rint(30000 * (np.sin(x) * np.cos(y) + 1)).astype(np.uint16)
    assert len(pack_map(smooth)) < len(encode_depth16(smooth)) / 2


def test_the_bytes_are_what_the_format_says() -> None:
    data = pack_map(np.array([[7, 6], [9, 8]], np.uint16))
    assert HEADER.unpack_from(data) == (MAGIC, 2, 2)
    assert data[:12] == b"MAP1" + bytes([2, 0, 0, 0, 2, 0, 0, 0])


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int32), np.zeros(4, np.uint16)])
def test_other_arrays_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint16 \(H, W\)"):
        pack_map(values)


def test_broken_bytes_are_refused() -> None:
    data = pack_map(np.arange(600, dtype=np.uint16).reshape(20, 30))
    with pytest.raises(ValueError, match="no packed map"):
        unpack_map(encode_depth16(np.zeros((2, 2), np.uint16)))
    with pytest.raises(ValueError, match="no packed map"):
        unpack_map(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        unpack_map(data[:-5])
    with pytest.raises(ValueError, match="cannot be read"):
        unpack_map(HEADER.pack(MAGIC, 21, 30) + data[HEADER.size :])
    with pytest.raises(ValueError, match="damaged"):
        unpack_map(HEADER.pack(MAGIC, 2**31, 2**31) + data[HEADER.size :])
