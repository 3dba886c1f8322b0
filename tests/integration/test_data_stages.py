"""The data stages on a real Ray: rooms, real photographs and every kind of broken file, from ingest to samples."""

from __future__ import annotations

import io
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import skimage
from conftest import recipe_of, rooms
from PIL import Image

from perceptio.data.images import ImageLimits, decode, decode_depth16
from perceptio.data.maps import unpack_map
from perceptio.data.masks import masks_to_rle, rle_to_mask
from perceptio.depth.teacher import DepthTeacher
from schemas.recipe import Recipe
from schemas.tables import Reason
from workflows import assemble, depth, ingest, runtime, tokenize_depth, verify
from workflows.commits import Table
from workflows.pool import TooManyRejectsError
from workflows.runtime import NotEnoughError
from workflows.store import DamagedTableError, OtherInputsError, open_root

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
LIMITS = ImageLimits(1, 10**9)


def table(recipe: Recipe, name: str, source: str) -> Table:
    return Table(open_root(recipe.root), name, source)


def all_rows(recipe: Recipe, name: str, source: str) -> list[dict[str, Any]]:
    found = table(recipe, name, source)
    shards = [found.read_shard(shard) for shard in sorted(found.committed())]
    return pa.concat_tables(shards).to_pylist()


def all_rejects(recipe: Recipe, stage: str, source: str) -> list[dict[str, Any]]:
    files = sorted((Path(recipe.root) / "rejects" / stage / source).glob("part-*"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def run_all(recipe: Recipe, teacher_digest: str, put_codebook: Callable[..., None]) -> None:
    ingest.run(recipe)
    depth.run(recipe)
    put_codebook(recipe, teacher_digest)
    tokenize_depth.run(recipe)
    assemble.run(recipe)


@pytest.fixture(scope="module")
def rooms_run(tmp_path_factory: pytest.TempPathFactory, teacher: Path, put_codebook: Callable[..., None]) -> Recipe:
    """From ingest to samples: rooms with exact masks, boxes only, points, no questions; and real photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    sources = [
        rooms("exact", 6),
        rooms("boxes", 2, exact_masks=False, seed=2),
        rooms("points", 3, questions=["points"], size=64, seed=3),
        rooms("bare", 2, questions=[], seed=4),
        {"name": "photos", "format": "folder", "path": str(folder)},
    ]
    settings = {"depth__teacher": teacher, "depth__batch_size": 3, "ingest__max_side": 400}
    recipe = recipe_of(tmp_path_factory.mktemp("rooms"), sources, **settings)
    run_all(recipe, DepthTeacher.from_pretrained(teacher).digest, put_codebook)
    return recipe


def test_rooms_become_samples_row_for_row(rooms_run: Recipe) -> None:
    for source in ("exact", "boxes", "points", "bare", "photos"):
        ids = [row["id"] for row in all_rows(rooms_run, "images", source)]
        assert len(ids) == len(set(ids)) > 0
        for name in ("depth", "codes", "samples"):
            assert [row["id"] for row in all_rows(rooms_run, name, source)] == ids
    assert [commit.read for commit in table(rooms_run, "images", "exact").require().shards] == [4, 2]
    verify.run(rooms_run)


def test_rows_are_counted_for_prometheus(rooms_run: Recipe) -> None:
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    wanted = 'outcome="kept",source="exact",stage="depth"'
    end = time.monotonic() + 60  # Ray sends figures on every ten seconds
    lines: list[str] = []
    while not lines and time.monotonic() < end:
        text = httpx.get(address, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("ray_perceptio_rows_total") and wanted in line]
        time.sleep(1)
    assert [float(line.split()[-1]) for line in lines] == [6.0]


def test_rooms_carry_what_they_were_asked_for(rooms_run: Recipe) -> None:
    exact = all_rows(rooms_run, "images", "exact")[0]
    masks = [rle_to_mask(rle) for rle in exact["masks"]]
    assert {turn["kind"] for turn in exact["turns"]} == {"referring"} and masks
    assert all(0 <= i < len(masks) for turn in exact["turns"] for i in turn["objects"])
    for mask, box in zip(masks, exact["boxes"], strict=True):
        y, x = np.nonzero(mask)
        assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == [box["x0"], box["y0"], box["x1"], box["y1"]]
    millimetres = decode_depth16(exact["recorded_depth"])
    assert millimetres.shape == (32, 32) and millimetres.min() > 100
    boxes = all_rows(rooms_run, "images", "boxes")[0]
    assert boxes["masks"] == [] and boxes["boxes"]
    assert [row["turns"] for row in all_rows(rooms_run, "images", "bare")] == [[], []]
    points = all_rows(rooms_run, "images", "points")
    assert all([turn["kind"] for turn in row["turns"]] == ["points"] for row in points) and points


def test_depth_is_the_teachers_own_answer(rooms_run: Recipe, teacher: Path) -> None:
    images, maps = all_rows(rooms_run, "images", "exact")[:3], all_rows(rooms_run, "depth", "exact")[:3]
    expected = DepthTeacher.from_pretrained(teacher)([decode(row["image"], LIMITS) for row in images])
    for row, found in zip(maps, expected, strict=True):
        stored = unpack_map(row["inv_depth"])
        assert stored.min() == 0 and stored.max() == 65535
        assert np.abs(stored.astype(int) - found.inv_depth_HW).max() <= 1
        assert row["raw_min"] == pytest.approx(found.raw_min, rel=1e-5)
    manifest = table(rooms_run, "depth", "exact").require()
    assert manifest.inputs["teacher"] == DepthTeacher.from_pretrained(teacher).digest
    assert {licence.part for licence in manifest.licences} == {"data: exact", "teacher"}


def test_codes_are_within_the_codebook_and_have_their_error(rooms_run: Recipe) -> None:
    rows = all_rows(rooms_run, "codes", "exact")
    assert len(rows) == 6
    for row in rows:
        assert len(row["codes"]) == 16 and max(row["codes"]) < 8
        assert unpack_map(row["depth_target"]).shape == (32, 32)
        assert 0 < row["reconstruction_mae"] < 1


def test_a_second_run_does_nothing(rooms_run: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(rooms_run.root).rglob("*") if path.is_file()}
    began = time.monotonic()
    for stage in (ingest, depth, tokenize_depth, assemble):
        stage.run(rooms_run)
    assert time.monotonic() - began < 5
    assert before == {path: path.stat().st_mtime_ns for path in Path(rooms_run.root).rglob("*") if path.is_file()}


def test_other_settings_are_refused_and_name_both_sides(rooms_run: Recipe) -> None:
    changed = rooms_run.model_copy(update={"depth": rooms_run.depth.model_copy(update={"batch_size": 5})})
    with pytest.raises(OtherInputsError, match=r"depth/exact was made from other inputs.*settings .*, now "):
        depth.run(changed)


def test_a_codebook_for_another_teacher_is_refused(
    rooms_run: Recipe, tmp_path: Path, put_codebook: Callable[..., None]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(rooms_run.root, root)
    recipe = rooms_run.model_copy(update={"root": str(root)})
    put_codebook(recipe, "another teacher")
    with pytest.raises(OtherInputsError, match="made for teacher 'another teacher'"):
        tokenize_depth.run(recipe)


@pytest.mark.usefixtures("without_ray")
def test_verify_names_a_changed_file_and_a_stale_table(rooms_run: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(rooms_run.root, root)
    recipe = rooms_run.model_copy(update={"root": str(root)})
    next((root / "depth" / "boxes").glob("part-*")).unlink()
    shutil.rmtree(root / "images" / "bare")
    with pytest.raises(
        DamagedTableError, match=r"(?s)depth/boxes: file part.* is missing.*images/bare has no manifest"
    ):
        verify.run(recipe)


def png(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge() -> bytes:
    """A PNG whose header says 200 megapixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)


@pytest.mark.usefixtures("without_ray")
def test_every_wrong_file_is_a_reject_and_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(noise(i)) for i in (90, 91)]
    jpeg = saved(Image.fromarray(noise(1)), "JPEG")
    good = {
        "a_good.jpg": jpeg,
        "b_cmyk.jpg": saved(Image.fromarray(noise(2)).convert("CMYK"), "JPEG"),
        "c_16bit.png": png(noise(3)[..., 0].astype(np.uint16) * 257),
        "d_turned.jpg": saved(Image.fromarray(noise(4)), "JPEG", exif=exif),
        "e_clear.png": png(np.dstack([noise(5), noise(6)[..., 0]])),
        "more/f_wrong_suffix.jpg": png(noise(7)),
        "z_good.png": png(noise(8)),
    }
    bad = {
        "b_truncated.jpg": (jpeg[: len(jpeg) // 2], Reason.TRUNCATED_IMAGE),
        "c_empty.png": (b"", Reason.EMPTY_FILE),
        "d_letter.jpg": (b"Dear reader, this is no picture.", Reason.NOT_AN_IMAGE),
        "e_dot.png": (png(noise(9)[:1, :1]), Reason.TOO_SMALL),
        "f_animated.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), Reason.ANIMATED_IMAGE),
        "g_huge.png": (huge(), Reason.TOO_LARGE),
        "y_again.jpg": (jpeg, Reason.DUPLICATE_ID),
    }
    for name, data in [*good.items(), *((name, data) for name, (data, _) in bad.items())]:
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("not an image by its suffix")
    recipe = recipe_of(tmp_path / "root", [{"name": "photos", "format": "folder", "path": str(folder)}])
    ingest.run(recipe)
    manifest = table(recipe, "images", "photos").require()
    assert (manifest.read, manifest.kept, manifest.rejected) == (14, 7, 7)
    kept = {row["uri"].removeprefix(f"{folder}/"): row for row in all_rows(recipe, "images", "photos")}
    assert kept.keys() == good.keys()
    for row in kept.values():
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.mode == "RGB" and image.size == (row["width"], row["height"])
    assert (kept["d_turned.jpg"]["width"], kept["d_turned.jpg"]["height"]) == (40, 60)
    assert kept["a_good.jpg"]["image"] == jpeg
    refused = {row["uri"].removeprefix(f"{folder}/"): row for row in all_rejects(recipe, "ingest", "photos")}
    assert {name: row["reason"] for name, row in refused.items()} == {name: r.value for name, (_, r) in bad.items()}
    assert all(row["message"] and row["stage"] == "ingest" for row in refused.values())
    strict = recipe.model_copy(update={"max_reject_share": 0.1, "root": str(tmp_path / "strict")})
    with pytest.raises(TooManyRejectsError, match=r"(?s)7 of 14 rows were refused.*too_large\s+1"):
        ingest.run(strict)
    assert table(strict, "images", "photos").manifest() is None


@pytest.mark.usefixtures("without_ray")
def test_records_bring_turns_masks_and_boxes_or_say_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(noise(i)))
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 5:20, 10:30] = True
    rle = masks_to_rle(mask)[0]
    turn = {
        "kind": "referring",
        "prompt": "Segment the patch.",
        "answer": "Sure.",
        "expression": "the patch",
        "objects": [0],
    }
    lines: list[Any] = [
        {"image": "0.png", "turns": [turn], "masks": [rle], "boxes": [[10, 5, 30, 20]]},
        {"image": "1.png", "turns": [{**turn, "objects": [1]}], "masks": [rle]},
        {"image": "2.png", "masks": [{**rle, "height": 39}]},
        {"image": "3.png", "boxes": [[10, 5, 300, 20]]},
        {"image": "4.png", "turn": []},
        {"image": "0.png"},
        {"image": "../secret.png"},
        {"image": "9.png"},
        ["no object"],
    ]
    text = "\n".join(json.dumps(line) for line in lines).encode() + b"\n\xff\xfe\n"
    (folder / "records.jsonl").write_bytes(text)
    (tmp_path / "secret.png").write_bytes(png(noise(99)))
    recipe = recipe_of(tmp_path / "root", [{"name": "photos", "format": "folder", "path": str(folder)}])
    ingest.run(recipe)
    kept = {Path(row["uri"]).name: row for row in all_rows(recipe, "images", "photos")}
    assert kept.keys() == {"0.png", "5.png", "6.png"}
    assert (rle_to_mask(kept["0.png"]["masks"][0]) == mask[0]).all()
    assert kept["0.png"]["turns"][0]["prompt"] == "Segment the patch." and kept["5.png"]["turns"] == []
    refused = [(Path(row["uri"]).name, row["reason"]) for row in all_rejects(recipe, "ingest", "photos")]
    assert sorted(refused[:4]) == [
        ("1.png", "bad_record"),
        ("2.png", "bad_mask"),
        ("3.png", "mask_outside_image"),
        ("4.png", "bad_record"),
    ]
    assert [reason for _, reason in refused[4:]] == [
        "duplicate_id",
        "bad_record",
        "missing_file",
        "bad_record",
        "bad_record",
    ]


def test_real_photographs_become_samples(rooms_run: Recipe) -> None:
    samples = all_rows(rooms_run, "samples", "photos")
    assert len(samples) == len(PHOTOGRAPHS) and all(max(row["width"], row["height"]) <= 400 for row in samples)
    maps = all_rows(rooms_run, "depth", "photos")
    for image, row in zip(all_rows(rooms_run, "images", "photos"), maps, strict=True):
        assert unpack_map(row["inv_depth"]).shape == (image["height"], image["width"])


@pytest.mark.usefixtures("without_ray")
def test_recorded_depth_is_exact_and_a_row_without_it_is_refused_all_the_way(
    tmp_path: Path, put_codebook: Callable[..., None]
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(noise(0)))
    source = {"name": "photos", "format": "folder", "path": str(folder)}
    recipe = recipe_of(tmp_path / "root", [source, rooms(count=2)], depth__teacher="recorded")
    run_all(recipe, "recorded", put_codebook)
    for image, row in zip(all_rows(recipe, "images", "rooms"), all_rows(recipe, "depth", "rooms"), strict=True):
        nearness = 1000 / decode_depth16(image["recorded_depth"]).astype(float)
        expected = (nearness - nearness.min()) / (nearness.max() - nearness.min())
        assert np.abs(unpack_map(row["inv_depth"]) / 65535 - expected).max() < 2 / 65535
        assert row["raw_max"] == pytest.approx(nearness.max())
    assert [row["reason"] for row in all_rejects(recipe, "depth", "photos")] == ["no_recorded_depth"]
    assert [row["reason"] for row in all_rejects(recipe, "assemble", "photos")] == ["upstream_reject"]
    assert table(recipe, "samples", "photos").require().rejected == 1
    assert table(recipe, "samples", "rooms").require().kept == 2


def test_too_small_a_machine_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(NotEnoughError, match="min_memory_gb is 100000"):
        runtime.start(recipe_of(tmp_path, [rooms()], cluster__min_memory_gb=100000))
    with pytest.raises(NotEnoughError, match=r"logical_cpus is 1, but `\w+` needs"):
        runtime.start(recipe_of(tmp_path, [rooms()], cluster__logical_cpus=1))
