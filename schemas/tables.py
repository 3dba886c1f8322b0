"""Every column on disk, once: Arrow type, shape, range, meaning.

Tables lie under the recipe's root as `TABLE/SOURCE/`, one Parquet file per committed shard. The id of an image is the
first 16 hex digits of the SHA-256 of its stored bytes; every table of one source has the same shards and, within a
shard, the same order of ids (less what was rejected on the way), so that joins stay inside a shard.
"""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 2
READABLE_VERSIONS = (2,)
ID_DIGITS = 16  # of the SHA-256 that an id begins

LISTING = pa.schema(
    [
        ("id", pa.string()),  # 16 hex digits of the SHA-256 of "uri#first"
        ("uri", pa.string()),  # of the file that holds the rows: an image, a Parquet file, a tar
        ("first", pa.int64()),  # the first row within a Parquet file; a room's number; else 0
        ("rows", pa.int32()),  # rows that it stands for: 1 a file, n a range, 0 = known only when it is read
        ("size", pa.int64()),  # bytes of the file as listed, -1 where the listing does not say
        ("record", pa.string()),  # questions, boxes and masks as JSON, "" where there are none
        ("reason", pa.string()),  # a `Reason` to refuse it that was found while listing, else ""
        ("message", pa.string()),
    ]
)

RLE = pa.struct(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("counts", pa.string()),  # COCO compressed run lengths, column-major
    ]
)

BOX = pa.struct([("x0", pa.float32()), ("y0", pa.float32()), ("x1", pa.float32()), ("y1", pa.float32())])  # pixels

POINT = pa.struct([("x", pa.float32()), ("y", pa.float32())])  # pixels

TURN = pa.struct(
    [
        ("kind", pa.string()),  # referring, points, distance, count, attribute, yes_no, choice, ...
        ("form", pa.string()),  # the construction within the kind
        ("prompt", pa.string()),  # what the user says
        ("answer", pa.string()),  # what a perfect reply says after the spatial block
        ("expression", pa.string()),  # the bare referring expression, else ""
        ("objects", pa.list_(pa.int32())),  # indices into the row's `masks` / `boxes`, in the order named
        ("choices", pa.list_(pa.string())),  # the closed set of answers, else []
        ("points", pa.list_(POINT)),  # of the lettered points drawn in, in the order of their letters, else []
    ]
)

IMAGES = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),  # where it came from; enough to fetch it again
        ("image", pa.binary()),  # JPEG or PNG, upright, RGB, 8 bit
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("turns", pa.list_(TURN)),
        ("masks", pa.list_(RLE)),  # one per object, or [] where the record has none
        ("boxes", pa.list_(BOX)),  # one per object, or []
        ("clicks", pa.list_(POINT)),  # a pixel inside each object, or []; `masks` asks SAM2 by them where no box is
        ("recorded_depth", pa.binary()),  # 16-bit PNG, millimetres, 0 = unknown; null where the data set has none
    ]
)

DEPTH = pa.schema(
    [
        ("id", pa.string()),
        (
            "inv_depth",
            pa.binary(),
        ),  # of the image's size, packed (perceptio/data/maps.py); value / 65535, larger = closer
        ("raw_min", pa.float32()),  # of the teacher's output before scaling
        ("raw_max", pa.float32()),
    ]
)

MASKS = pa.schema(
    [
        ("id", pa.string()),
        ("masks", pa.list_(RLE)),  # one per object of the row
        ("predicted_iou", pa.list_(pa.float32())),  # 1.0 for a recorded mask
        ("stability", pa.list_(pa.float32())),  # 1.0 for a recorded mask
        ("recorded", pa.bool_()),  # true: the record's own masks, passed through
    ]
)

CODES = pa.schema(
    [
        ("id", pa.string()),
        ("codes", pa.list_(pa.uint16())),  # N codes, row-major, each < K
        ("depth_target", pa.binary()),  # inv_depth at the codebook's resolution, packed likewise
        ("reconstruction_mae", pa.float32()),  # mean |decode(codes) - target| in inv_depth
    ]
)

SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("turns", pa.list_(TURN)),
        ("masks", pa.list_(RLE)),
        ("codes", pa.list_(pa.uint16())),
        ("depth_target", pa.binary()),
    ]
)

REJECTS = pa.schema(
    [
        ("stage", pa.string()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int64()),  # number of the row that was read, within the shard
        ("id", pa.string()),  # "" where it was refused before it had one
        ("uri", pa.string()),
        ("reason", pa.string()),  # a `Reason`
        ("message", pa.string()),
    ]
)

PREDICTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("turn", pa.int32()),  # index into the row's turns; -1 where the row has none
        ("grammar", pa.bool_()),
        ("text", pa.string()),
        ("codes", pa.list_(pa.int32())),  # as generated; may be malformed with the grammar off
        ("masks", pa.list_(RLE)),
        ("well_formed", pa.bool_()),
        ("finish", pa.string()),  # "stop" or "length"
    ]
)

FIGURE_MARKS = pa.schema(
    [
        ("figure", pa.string()),  # name in metrics.json
        ("scene", pa.string()),
        ("numerator", pa.float64()),  # the figure is the sum of these over all scenes
        ("denominator", pa.float64()),  # over the sum of these
    ]
)

TABLES = {"listing": LISTING, "images": IMAGES, "depth": DEPTH, "masks": MASKS, "codes": CODES, "samples": SAMPLES}


class Reason(StrEnum):
    """Why a row was refused."""

    MISSING_FILE = "missing_file"
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    ANIMATED_IMAGE = "animated_image"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    DUPLICATE_ID = "duplicate_id"
    BAD_RECORD = "bad_record"
    MASK_OUTSIDE_IMAGE = "mask_outside_image"
    BAD_MASK = "bad_mask"
    CONSTANT_DEPTH = "constant_depth"
    NOT_FINITE_DEPTH = "not_finite_depth"
    NO_RECORDED_DEPTH = "no_recorded_depth"
    LOW_MASK_QUALITY = "low_mask_quality"
    UPSTREAM_REJECT = "upstream_reject"
    IN_EVALUATION_SPLIT = "in_evaluation_split"
    FORGOTTEN = "forgotten"
    TEXT_ONLY = "text_only"
    UNREACHABLE = "unreachable"
    DAMAGED_ARCHIVE = "damaged_archive"


# refused by rule, not for a fault: these do not count against max_reject_share
BY_RULE = (Reason.UPSTREAM_REJECT, Reason.TEXT_ONLY, Reason.IN_EVALUATION_SPLIT, Reason.FORGOTTEN)
