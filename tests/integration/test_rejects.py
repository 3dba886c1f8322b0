"""Every way in which a row can be refused: it leaves a row with stage, reason and message, and costs no neighbour.

The workers run here as they do in an actor, but in this process, on shards between whose good rows the bad one stands.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT, in_this_process, recipe_of
from PIL import Image

from perceptio.data.masks import masks_to_rle
from perceptio.sources import files
from schemas.recipe import Recipe
from schemas.tables import Reason
from workflows import depth, ingest
from workflows.commits import Table
from workflows.ingest import IngestWorker, image_id
from workflows.listing import listed
from workflows.pool import TooManyRejectsError
from workflows.shards import ShardResult, Work, rejects_table, shards_of
from workflows.store import open_root

SIDES = (40, 60)
TESTS = CHECKOUT / "tests"
WATCHED = (  # modules whose refusals all have their case here
    "perceptio/data/images.py",
    "perceptio/sources/files.py",
    "perceptio/sources/folder.py",
    "perceptio/sources/record.py",
    "workflows/ingest.py",
)
CASES_ELSEWHERE = {  # and those whose cases lie in another file of tests
    "perceptio/depth/teacher.py": "unit/test_depth_teacher.py",
    "perceptio/sources/address_list.py": "unit/test_sources_list.py",
    "perceptio/sources/coco.py": "unit/test_sources_refcoco.py",
    "perceptio/sources/coco_file.py": "unit/test_sources_refcoco.py",
    "perceptio/sources/json_array.py": "unit/test_sources_*.py",
    "perceptio/sources/llava.py": "unit/test_sources_llava.py",
    "perceptio/sources/maps.py": "unit/test_sources_*.py",
    "perceptio/sources/parquet.py": "unit/test_sources_parquet.py",
    "perceptio/sources/parquet_file.py": "unit/test_sources_parquet.py",
    "perceptio/sources/parquet_record.py": "unit/test_sources_parquet.py",
    "perceptio/sources/refcoco.py": "unit/test_sources_refcoco.py",
    "perceptio/sources/rgbd.py": "unit/test_sources_rgbd.py",
    "perceptio/sources/tar.py": "unit/test_sources_webdataset.py",
    "perceptio/sources/web.py": "unit/test_sources_list.py",
    "perceptio/sources/webdataset.py": "unit/test_sources_webdataset.py",
    "workflows/assemble.py": "integration/test_reject_stages.py",
    "workflows/teacher_maps.py": "integration/test_reject_stages.py",
    "workflows/depth.py": "integration/test_reject_stages.py",
    "workflows/doubles.py": "unit/test_doubles.py",
    "workflows/drop.py": "integration/test_upkeep.py",
    "workflows/masks.py": "integration/test_reject_stages.py",
    "workflows/rooms_source.py": "unit/test_rooms_source.py",
}
REFUSING = ("ImageError", "RowError", "DepthError", "Refused", "Reject", "refuse", "problem")


@dataclass(frozen=True)
class Case:
    """One file, with its line of `records.jsonl`, that is refused."""

    where: str  # the module that refuses it
    reason: Reason
    message: str  # a part of it
    data: bytes | None = None  # None: no file
    line: Any = None  # the record's fields, or the whole line as bytes
    prepare: Callable[[Path], None] = lambda folder: None  # before it is listed
    later: Callable[[Path], None] = lambda folder: None  # after it was listed
    settings: dict[str, Any] = field(default_factory=dict)
    forgotten: tuple[str, ...] = ()


def noise(seed: int, height: int = SIDES[0], width: int = SIDES[1]) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def chunked(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with right checksums."""
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def empty_png(width: int, height: int) -> bytes:
    return chunked(header(width, height), (b"IDAT", zlib.compress(b"0")), (b"IEND", b""))


PNG, JPEG, WEBP = (encoded(noise(7), kind) for kind in ("PNG", "JPEG", "WEBP"))
FRAMES = [Image.fromarray(noise(i)) for i in (90, 91)]
TEXT_BOMB = (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 2**27))
MASK = masks_to_rle(np.pad(np.ones((1, 15, 20), bool), ((0, 0), (5, 20), (10, 30))))[0]
TURN = {"kind": "referring", "prompt": "Segment it.", "answer": "Sure.", "expression": "the patch", "objects": [0]}


def frames(kind: str) -> bytes:
    stream = io.BytesIO()
    FRAMES[0].save(stream, kind, save_all=True, append_images=FRAMES[1:])
    return stream.getvalue()


def name_of_no_text(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/b\xff.png")).write_bytes(PNG)


IMAGES, FILES, FOLDER, RECORD, INGEST = WATCHED
FILE_CASES = {
    "truncated JPEG": Case(IMAGES, Reason.TRUNCATED_IMAGE, "cannot be decoded", JPEG[: len(JPEG) // 2]),
    "truncated PNG": Case(IMAGES, Reason.TRUNCATED_IMAGE, "cannot be decoded", PNG[: len(PNG) // 2]),
    "truncated WebP": Case(IMAGES, Reason.TRUNCATED_IMAGE, "", WEBP[: len(WEBP) // 2]),
    "flipped PNG": Case(IMAGES, Reason.TRUNCATED_IMAGE, "cannot be decoded", PNG[:999] + b"\0\0\0\0" + PNG[1003:]),
    "PNG of a broken header": Case(IMAGES, Reason.TRUNCATED_IMAGE, "header cannot be read", PNG[:20]),
    "text that unpacks to 128 MB": Case(
        IMAGES, Reason.TRUNCATED_IMAGE, "", chunked(header(60, 40), TEXT_BOMB, (b"IDAT", zlib.compress(b"0")))
    ),
    "empty file": Case(IMAGES, Reason.EMPTY_FILE, "0 bytes", b""),
    "letter": Case(IMAGES, Reason.NOT_AN_IMAGE, "are none of JPEG", b"Dear reader, this is no picture."),
    "zip": Case(IMAGES, Reason.NOT_AN_IMAGE, "are none of JPEG", b"PK\x03\x04" + bytes(100)),
    "floats": Case(IMAGES, Reason.NOT_AN_IMAGE, "holds floats", encoded(noise(1)[..., 0].astype(np.float32), "TIFF")),
    "decompression bomb, 200 MP": Case(IMAGES, Reason.TOO_LARGE, "exceeds limit", empty_png(20_000, 10_000)),
    "64 MP": Case(IMAGES, Reason.TOO_LARGE, "8000 x 8000 pixels; the limit", empty_png(8_000, 8_000)),
    "0 x 0": Case(IMAGES, Reason.NOT_AN_IMAGE, "are none of JPEG", empty_png(0, 0)),
    "0 x 0 GIF": Case(IMAGES, Reason.NOT_AN_IMAGE, "are none of JPEG", b"GIF89a" + bytes(7) + b";"),
    "one pixel": Case(IMAGES, Reason.TOO_SMALL, "1 x 1 pixels", encoded(noise(2, 1, 1), "PNG")),
    "a line": Case(IMAGES, Reason.TOO_SMALL, "900 x 1 pixels", encoded(noise(2, 1, 900), "PNG")),
    "animated GIF": Case(IMAGES, Reason.ANIMATED_IMAGE, "more than one frame", frames("GIF")),
    "animated PNG": Case(IMAGES, Reason.ANIMATED_IMAGE, "more than one frame", frames("PNG")),
    "animated WebP": Case(IMAGES, Reason.ANIMATED_IMAGE, "more than one frame", frames("WEBP")),
    "file gone after it was listed": Case(
        FILES, Reason.MISSING_FILE, "is not there", PNG, later=lambda folder: (folder / "b.png").unlink()
    ),
    "link to nothing": Case(
        FILES, Reason.MISSING_FILE, "is not there", prepare=lambda folder: (folder / "b.png").symlink_to("nothing")
    ),
    "pipe": Case(FILES, Reason.MISSING_FILE, "no regular file", prepare=lambda folder: os.mkfifo(folder / "b.png")),
    "link to itself": Case(
        FILES,
        Reason.MISSING_FILE,
        "cannot be a file",
        PNG,
        later=lambda folder: ((folder / "b.png").unlink(), (folder / "b.png").symlink_to("b.png"))[0],
    ),
    "file cut off after it was listed": Case(
        FILES, Reason.TRUNCATED_IMAGE, "were listed", PNG, later=lambda f: (f / "b.png").write_bytes(PNG[:-5])
    ),
    "name of a number": Case(FILES, Reason.BAD_RECORD, "expected the path of a file", line={"image": 7}),
    "name that is no text": Case(FILES, Reason.BAD_RECORD, "no valid text", line=b'{"image": "\\ud800.png"}'),
    "name outside the folder": Case(FILES, Reason.BAD_RECORD, "outside the folder", line={"image": "../secret.png"}),
    "name too long": Case(FILES, Reason.BAD_RECORD, "longer than", line={"image": "b" * 2000}),
    "file name that is no UTF-8": Case(FOLDER, Reason.BAD_RECORD, "is no UTF-8", prepare=name_of_no_text),
    "line of no UTF-8": Case(FOLDER, Reason.BAD_RECORD, "no JSON in UTF-8", line=b"\xff\xfe{}"),
    "line of no JSON": Case(FOLDER, Reason.BAD_RECORD, "no JSON in UTF-8", line=b'{"image": '),
    "line of a list": Case(FOLDER, Reason.BAD_RECORD, "no JSON object with an 'image'", line=["b.png"]),
    "line without image": Case(FOLDER, Reason.BAD_RECORD, "no JSON object with an 'image'", line={"turns": []}),
    "two lines of one image": Case(FOLDER, Reason.DUPLICATE_ID, "has a line before", line={"image": "a.png"}),
    "line of a missing image": Case(FOLDER, Reason.MISSING_FILE, "'b.png' is not there", line={"image": "b.png"}),
}
RECORD_CASES = {
    "unknown field": Case(RECORD, Reason.BAD_RECORD, "turn: Extra", PNG, {"turn": []}),
    "empty expression": Case(
        RECORD, Reason.BAD_RECORD, "expression is empty", PNG, {"turns": [TURN | {"expression": " "}]}
    ),
    "NUL": Case(RECORD, Reason.BAD_RECORD, "NUL", PNG, {"turns": [TURN | {"answer": "\0"}]}),
    "lone surrogate": Case(RECORD, Reason.BAD_RECORD, "", PNG, {"turns": [TURN | {"answer": "\ud800"}]}),
    "box of NaN": Case(RECORD, Reason.BAD_RECORD, "boxes.0.0", PNG, {"boxes": [[float("nan"), 0, 1, 1]]}),
    "box of three": Case(RECORD, Reason.BAD_RECORD, "boxes.0", PNG, {"boxes": [[0, 1, 1]]}),
    "mask of no size": Case(RECORD, Reason.BAD_RECORD, "height", PNG, {"masks": [MASK | {"height": -1}]}),
    "object that is not there": Case(
        INGEST, Reason.BAD_RECORD, "names objects (1,) of 1", PNG, {"turns": [TURN | {"objects": [1]}], "masks": [MASK]}
    ),
    "more boxes than masks": Case(
        INGEST, Reason.BAD_RECORD, "2 boxes but 1 masks", PNG, {"boxes": [[0, 0, 9, 9]] * 2, "masks": [MASK]}
    ),
    "box outside": Case(INGEST, Reason.MASK_OUTSIDE_IMAGE, "outside", PNG, {"boxes": [[10, 5, 300, 20]]}),
    "box below zero": Case(INGEST, Reason.MASK_OUTSIDE_IMAGE, "outside", PNG, {"boxes": [[-1, 5, 30, 20]]}),
    "empty box": Case(INGEST, Reason.MASK_OUTSIDE_IMAGE, "is empty", PNG, {"boxes": [[10, 5, 10, 20]]}),
    "box in the margin of rounding": Case(
        INGEST, Reason.MASK_OUTSIDE_IMAGE, "outside", PNG, {"boxes": [[60.1, 5, 60.4, 20]]}
    ),
    "mask of another image": Case(INGEST, Reason.BAD_MASK, "mask is 30 x 60", PNG, {"masks": [MASK | {"height": 30}]}),
    "mask of 256 megapixels": Case(
        INGEST, Reason.BAD_MASK, "16000 x 16000", PNG, {"masks": [{"height": 16000, "width": 16000, "counts": "oooo_"}]}
    ),
    "click outside the image": Case(INGEST, Reason.MASK_OUTSIDE_IMAGE, "click (99.0, 5.0)", PNG, {"clicks": [[99, 5]]}),
    "run lengths too short": Case(INGEST, Reason.BAD_MASK, "cover", PNG, {"masks": [MASK | {"counts": "52"}]}),
    "run lengths of other letters": Case(INGEST, Reason.BAD_MASK, "letters", PNG, {"masks": [MASK | {"counts": "!"}]}),
    "run lengths cut off": Case(INGEST, Reason.BAD_MASK, "cut off", PNG, {"masks": [MASK | {"counts": "o"}]}),
    "the same image twice": Case(INGEST, Reason.DUPLICATE_ID, "the same image as", encoded(noise(0), "PNG")),
    "forgotten image": Case(INGEST, Reason.FORGOTTEN, "taken out by `forget`", PNG, forgotten=(image_id(PNG),)),
}
CASES = FILE_CASES | RECORD_CASES


def recipe_for(folder: Path, root: Path, **settings: Any) -> Recipe:
    source = {"name": "photos", "format": "folder", "path": str(folder)}
    return recipe_of(root, [source], ingest__rows_per_shard=1000, **settings)


def ingested(recipe: Recipe, later: Callable[[], None] = lambda: None, forgotten: tuple[str, ...] = ()) -> ShardResult:
    """What the worker makes of the one shard of the source."""
    root = open_root(recipe.root)
    manifest = listed(recipe, root, recipe.sources[0])
    later()
    over = Table(root, "listing", "photos")
    inputs = shards_of(listing=manifest)[0]
    return IngestWorker(recipe.model_dump_json(), forgotten).process(
        Work(Table(root, "images", "photos"), over, 0, inputs)
    )


@pytest.mark.parametrize("name", list(CASES))
def test_a_bad_row_is_refused_and_its_neighbours_are_kept(tmp_path: Path, name: str) -> None:
    case, folder = CASES[name], tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(noise(0), "PNG"))
    (folder / "c.jpg").write_bytes(encoded(noise(1), "JPEG"))
    if case.data is not None:
        (folder / "b.png").write_bytes(case.data)
    good = [json.dumps({"image": name, "turns": [TURN], "masks": [MASK]}).encode() for name in ("a.png", "c.jpg")]
    bad = {"image": "b.png", **case.line} if case.data is not None and case.line is not None else case.line
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    (folder / "records.jsonl").write_bytes(b"\n".join(good + ([line] if bad is not None else [])))
    case.prepare(folder)
    recipe = recipe_for(folder, tmp_path / "root", **case.settings)
    made = ingested(recipe, lambda: case.later(folder), case.forgotten)
    kept = {Path(row["uri"]).name: row for row in made.table.to_pylist()}
    assert kept.keys() == {"a.png", "c.jpg"} and made.read == 3
    assert all(row["turns"][0]["expression"] == "the patch" and row["masks"] == [MASK] for row in kept.values())
    (reject,) = made.rejects
    assert reject.reason is case.reason and case.message in reject.message and reject.message, reject
    table = Table(open_root(recipe.root), "images", "photos")
    (stored,) = rejects_table(table, 0, made.rejects).to_pylist()
    assert (stored["stage"], stored["source"], stored["reason"]) == ("ingest", "photos", case.reason.value)
    commit = table.commit(0, "a", made.table, rejects_table(table, 0, made.rejects), made.read)
    assert (commit.read, commit.kept, commit.rejected) == (3, 2, 1)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(encoded(noise(ord(name)), "PNG"))
    (folder / "b.png").chmod(0)
    if os.geteuid() == 0:  # root may read every file: what the system says to others is said for it
        read = files.read_bytes

        def refusing(fs: Any, path: str) -> bytes:
            if path.endswith("b.png"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return read(fs, path)

        monkeypatch.setattr(files, "read_bytes", refusing)
    made = ingested(recipe_for(folder, tmp_path / "root"))
    assert [reject.reason for reject in made.rejects] == [Reason.MISSING_FILE] and made.table.num_rows == 1
    assert "may not be read" in made.rejects[0].message


@pytest.mark.parametrize(
    ("name", "data"), [("b.jpg", PNG), ("b.png", JPEG), ("b.gif", WEBP), ("B.TIFF", JPEG), ("b.png", JPEG + b"tail")]
)
def test_a_wrong_suffix_and_bytes_behind_the_end_cost_nothing(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(data)
    made = ingested(recipe_for(tmp_path / "photos", tmp_path / "root"))
    assert (made.read, made.table.num_rows) == (1, 1) and not made.rejects


def test_every_refusal_in_the_code_has_its_case() -> None:
    """Each place that refuses for a reason is told from the module's others by its message."""
    told = Counter((case.where, case.reason) for case in set_of_messages())
    told[FILES, Reason.MISSING_FILE] += 1  # the file that may not be read
    told[INGEST, Reason.BAD_RECORD] += 1  # recorded depth, in test_reject_stages.py
    places = refusals()
    unknown = {module for module, _ in places} - {*WATCHED, *CASES_ELSEWHERE}
    assert not unknown, f"{unknown} refuse rows: write their cases here, or name where they are in CASES_ELSEWHERE"
    lacking = {key: count for key, count in places.items() if key[0] in WATCHED and told[key] < count}
    assert not lacking, f"places without a case of their own: {lacking}"
    untold = [
        (module, reason.name, CASES_ELSEWHERE[module])
        for module, reason in places
        if module in CASES_ELSEWHERE
        and not any(f"Reason.{reason.name}" in path.read_text() for path in TESTS.glob(CASES_ELSEWHERE[module]))
    ]
    assert not untold, f"refusals that no test of theirs names: {untold}"


def set_of_messages() -> list[Case]:
    """One case for each message of a module and reason."""
    return list({(case.where, case.reason, case.message): case for case in CASES.values() if case.message}.values())


def refusals() -> Counter[tuple[str, Reason]]:
    """How many places of each module refuse a row for each reason."""
    found: Counter[tuple[str, Reason]] = Counter()
    for path in [*(CHECKOUT / "perceptio").rglob("*.py"), *(CHECKOUT / "workflows").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in REFUSING and node.args:
                first = node.args[0]
                if isinstance(first, ast.Attribute) and getattr(first.value, "id", "") == "Reason":
                    found[str(path.relative_to(CHECKOUT)), Reason[first.attr]] += 1
    return found


def test_no_row_is_dropped_by_the_engine() -> None:
    code = [*(CHECKOUT / "workflows").rglob("*.py"), *(CHECKOUT / "perceptio").rglob("*.py")]
    assert code and not [path for path in code if "max_errored_blocks" in path.read_text()]


def test_too_many_rejects_end_the_job_with_the_reasons_before_it_is_over(tmp_path: Path, teacher: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02d}.png").write_bytes(encoded(noise(i), "PNG"))
    source = {"name": "photos", "format": "folder", "path": str(folder)}
    recipe = recipe_of(tmp_path / "root", [source], ingest__rows_per_shard=1, depth__teacher="recorded")
    with in_this_process():
        ingest.run(recipe)
    strict = recipe.model_copy(update={"max_reject_share": 0.1})
    with pytest.raises(
        TooManyRejectsError, match=r"(?s)3 of 24 rows were refused.*max_reject_share = 0\.1.*no_recorded_depth\s+3"
    ):
        depth.run(strict)
    table = Table(open_root(recipe.root), "depth", "photos")
    assert table.manifest() is None and 0 < len(table.committed()) < 24, "the job went on to its end"
