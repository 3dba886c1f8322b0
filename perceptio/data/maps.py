"""16-bit maps packed for tables: half of a PNG's bytes, written and read several times as fast.

    b"MAP1", height and width as little-endian uint32, then one zstd frame of the map's residuals: each column and then
    each row minus the one before (modulo 2^16), folded so that small negative numbers are small (0, -1, 1, -2, ...
    become 0, 1, 2, 3, ...), all low bytes and then all high bytes.

Maps are smooth, so their second differences are small, and the high bytes nearly all 0. Bits a pixel, where 16 are raw,
and megapixels that one thread packs / unpacks in a second of processor time:

| packed as | rooms' true depth | teacher on rooms | teacher on photographs | depth targets |
|---|---|---|---|---|
| PNG, level 1 | 3.1, 49 / 97 | 10.7, 23 / 52 | 10.6, 24 / 56 | 12.5, 17 / 40 |
| PNG, level 6 | 1.9, 24 / 125 | 10.2, 6 / 57 | 10.2, 6 / 61 | 12.1, 12 / 41 |
| PNG, level 9 | 1.7, 5 / 124 | 10.2, 5 / 59 | 10.2, 5 / 59 | 12.1, 13 / 42 |
| bytes apart, zstd 3 | 3.4, 244 / 286 | 10.5, 256 / 300 | 10.2, 227 / 308 | 13.5, 175 / 241 |
| differences in a row, zstd 3 | 1.7, 301 / 248 | 8.6, 315 / 232 | 8.2, 276 / 284 | 10.6, 155 / 183 |
| this, zstd 1 | 1.6, 318 / 178 | 5.4, 287 / 178 | 4.2, 242 / 177 | 8.6, 161 / 131 |
| this, zstd 3 | 1.5, 284 / 191 | 5.2, 187 / 179 | 3.9, 172 / 187 | 8.5, 148 / 130 |
| this, zstd 9 | 1.3, 66 / 184 | 5.0, 53 / 171 | 3.8, 49 / 193 | 8.4, 60 / 135 |

(The shipped rooms teacher in fp32 on 8 rooms of 256 px and 4 photographs of scikit-image at up to 640 px, brought to
their size as every teacher's maps are; targets of 96 px. One core of a busy machine, best of 3, Pillow 13, pyarrow 26.)

Shape legend: H, W height and width in pixels.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAGIC = b"MAP1"
HEADER = struct.Struct("<4sII")
MAX_PIXELS = 2**31  # a damaged header must not ask for all memory
LEVEL = 3  # of zstd: level 9 saves another 1 to 14 % and takes two to four times as long

Map = npt.NDArray[np.uint16]


def pack_map(values_HW: Map) -> bytes:
    """The bytes of a 16-bit map. Raises ValueError for another type or rank."""
    if values_HW.dtype != np.uint16 or values_HW.ndim != 2:
        raise ValueError(f"map is {values_HW.dtype} of shape {values_HW.shape}, expected uint16 (H, W): scale it first")
    rows_HW = values_HW.copy()
    rows_HW[:, 1:] -= values_HW[:, :-1]
    residuals_HW = rows_HW.copy()
    residuals_HW[1:] -= rows_HW[:-1]
    signed_HW = residuals_HW.view(np.int16)
    folded_HW = ((signed_HW << 1) ^ (signed_HW >> 15)).astype("<i2", copy=False)
    planes = np.ascontiguousarray(folded_HW.reshape(-1, 1).view(np.uint8).T)  # low bytes, high bytes
    packed: bytes = _codec().compress(planes.tobytes(), asbytes=True)
    return HEADER.pack(MAGIC, *values_HW.shape) + packed


def unpack_map(data: bytes) -> Map:
    """The map (H, W) of `pack_map`. Raises ValueError for any other bytes."""
    height, width = _shape(data)
    try:
        raw = _codec().decompress(memoryview(data)[HEADER.size :], decompressed_size=2 * height * width, asbytes=True)
    except OSError as error:
        raise ValueError(f"packed map of {width} x {height} pixels cannot be read: {error}") from error
    planes = np.frombuffer(raw, np.uint8).reshape(2, -1)
    folded_HW = np.ascontiguousarray(planes.T).view("<u2").astype(np.uint16, copy=False).reshape(height, width)
    residuals_HW = (folded_HW >> 1) ^ (np.uint16(0) - (folded_HW & np.uint16(1)))
    rows_HW = np.cumsum(residuals_HW, axis=0, dtype=np.uint16)
    return np.cumsum(rows_HW, axis=1, dtype=np.uint16)


def _shape(data: bytes) -> tuple[int, int]:
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise ValueError(f"{len(data)} bytes that begin with {data[:8]!r} are no packed map, expected {MAGIC!r}")
    _, height, width = HEADER.unpack_from(data)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"packed map says {width} x {height} pixels, expected 1 to {MAX_PIXELS} in all: damaged?")
    return height, width


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=LEVEL)  # one for each call: threads share none
