"""What is done to tables that stand: more is appended, refused rows are tried again, images forgotten, strays go."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import in_this_process, recipe_of
from PIL import Image

from perceptio.depth.teacher import DepthTeacher
from schemas.manifest import ShardCommit
from schemas.recipe import Recipe
from schemas.tables import TABLES, Reason
from workflows import append, assemble, clean, depth, forget, ingest, requeue, tokenize_depth, verify
from workflows.commits import Table
from workflows.folders import FORGOTTEN_NAME
from workflows.store import DamagedTableError, StageError, open_root

PER_SHARD = 4  # rows, as in conftest.recipe_of

Commits = dict[int, ShardCommit]


def png(seed: int) -> bytes:
    """A smooth picture of its own for every seed."""
    y, x = np.mgrid[0:1:32j, 0:1:40j]
    waves = [np.sin(2 * np.pi * ((seed % 7 + 1) * x + (seed % 5) * y) + seed + channel) for channel in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1))).save(stream, "PNG")
    return stream.getvalue()


def folder_of(place: Path, pictures: dict[str, bytes]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (place / name).write_bytes(data)
    return place


def source(folder: Path, name: str = "photos", **more: Any) -> dict[str, Any]:
    return {"name": name, "format": "folder", "path": str(folder), **more}


def table(recipe: Recipe, name: str, of: str = "photos") -> Table:
    return Table(open_root(recipe.root), name, of)


def ids_by_name(recipe: Recipe, of: str = "photos") -> dict[str, str]:
    images = table(recipe, "images", of)
    rows = [row for shard in images.committed() for row in images.read_shard(shard, ["id", "uri"]).to_pylist()]
    return {Path(row["uri"]).name: row["id"] for row in rows}


def refused(recipe: Recipe, name: str, of: str = "photos") -> dict[str, str]:
    """Reason by the name of the file."""
    found = table(recipe, name, of)
    rows = [row for commit in found.committed().values() for row in found.rejects_of(commit).to_pylist()]
    return {Path(row["uri"]).name or row["id"]: row["reason"] for row in rows}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[str]:
    """No Ray: what is tested here is what stands in the tables."""
    with in_this_process():
        yield ""


@pytest.fixture(scope="module")
def teacher_digest(teacher: Path) -> str:
    return DepthTeacher.from_pretrained(teacher).digest


@pytest.fixture
def run_stages(teacher_digest: str, put_codebook: Callable[..., None]) -> Callable[[Recipe], None]:
    def run(recipe: Recipe) -> None:
        ingest.run(recipe)
        depth.run(recipe)
        if not (Path(recipe.root) / "codebook").exists():
            put_codebook(recipe, teacher_digest)
        tokenize_depth.run(recipe)
        assemble.run(recipe)

    return run


def all_commits(recipe: Recipe, of: str = "photos") -> dict[str, Commits]:
    return {name: table(recipe, name, of).committed() for name in TABLES if name != "masks"}


def digests(recipe: Recipe) -> dict[str, list[str]]:
    return {name: [c.content for c in commits.values()] for name, commits in all_commits(recipe).items()}


def test_what_is_appended_gets_shards_of_its_own_and_the_rest_is_left_alone(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    before = all_commits(recipe)
    folder_of(folder, {f"a{i}.png": png(100 + i) for i in range(3)} | {"again.png": png(2)})
    run_stages(recipe)
    assert all_commits(recipe) == before, "a finished table looked for more by itself"
    append.run(recipe)
    run_stages(recipe)
    after = all_commits(recipe)
    for name, commits in after.items():
        assert {shard: commits[shard] for shard in before[name]} == before[name]
        assert [commits[shard].read for shard in sorted(commits)][2:] == [4 if name in ("listing", "images") else 3]
    assert refused(recipe, "images") == {"again.png": "duplicate_id"}
    verify.run(recipe)
    append.run(recipe)
    run_stages(recipe)
    assert all_commits(recipe) == after


def test_an_interrupted_listing_is_cut_as_an_undisturbed_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i:02}.png": png(i) for i in range(10)})
    whole, broken = (recipe_of(tmp_path / name, [source(folder)]) for name in ("whole", "broken"))
    for recipe in (whole, broken):
        ingest.run(recipe)
    listing = table(broken, "listing")
    listing.reopen()
    (Path(broken.root) / "listing" / "photos" / "_commits" / "000002.json").unlink()
    shutil.rmtree(Path(broken.root) / "images")
    ingest.run(broken)
    assert digests(broken) == digests(whole)


def test_refused_rows_are_tried_again_in_their_place_and_nothing_else_is(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None]
) -> None:
    pictures = {f"{i}.png": png(i) for i in range(9)}
    folder = folder_of(tmp_path / "photos", pictures)
    whole = recipe_of(tmp_path / "whole", [source(folder)], depth__teacher=teacher)
    run_stages(whole)
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(pictures[name][:200])
    (folder / "5.png").write_bytes(b"no picture")
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    broken = {"1.png": "truncated_image", "2.png": "truncated_image", "5.png": "not_an_image"}
    assert refused(recipe, "images") == broken
    before = all_commits(recipe)
    (folder / "1.png").write_bytes(pictures["1.png"])
    (folder / "5.png").write_bytes(pictures["5.png"])
    (folder / "0.png").unlink()  # what is kept is not read again
    done = requeue.run(recipe, "truncated_image")
    assert [(d.stage, d.tried, d.refused) for d in done] == [("ingest", 2, 1)]
    assert refused(recipe, "images") == {"2.png": "truncated_image", "5.png": "not_an_image"}
    images = all_commits(recipe)["images"]
    assert [images[shard].revision for shard in sorted(images)] == [1, 0, 0]
    (folder / "2.png").write_bytes(pictures["2.png"])
    requeue.run(recipe, "truncated_image")
    requeue.run(recipe, "not_an_image", stage="ingest")
    with pytest.raises(DamagedTableError, match="made from another images/photos"):
        verify.run(recipe)
    run_stages(recipe)
    assert {name: d for name, d in digests(recipe).items() if name == "images"} == {"images": digests(whole)["images"]}
    assert ids_by_name(recipe) == ids_by_name(whole)
    after = all_commits(recipe)
    assert after["depth"][2] == before["depth"][2]
    for name in ("depth", "codes", "samples"):
        found = table(recipe, name)
        assert [row for c in after[name].values() for row in found.ids_of(c)] == list(ids_by_name(whole).values())
    verify.run(recipe)
    with pytest.raises(StageError, match="refused a row as 'truncated_image'"):
        requeue.run(recipe, "truncated_image")
    with pytest.raises(StageError, match=r"--reason 'ugly', expected one of missing_file"):
        requeue.run(recipe, "ugly")


def test_a_training_image_that_is_held_out_too_is_taken_out_and_a_shared_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = folder_of(tmp_path / "one", {f"{i}.png": png(i) for i in range(6)} | {"x.png": png(0)})
    two = folder_of(tmp_path / "two", {f"{i}.png": png(10 * i) for i in range(3)})
    test = folder_of(tmp_path / "test", {"a.png": png(3), "b.png": png(20), "c.png": png(99)})
    sources = [source(one, "one"), source(two, "two"), source(test, "test", held_out=True)]
    recipe = recipe_of(tmp_path / "root", sources[:2] + sources[2:], train__mixture=mixture("one"))
    ingest.run(recipe)
    assert refused(recipe, "images", "one") == {"x.png": "duplicate_id", "3.png": "in_evaluation_split"}
    assert refused(recipe, "images", "two") == {"2.png": "in_evaluation_split"}
    assert refused(recipe, "images", "test") == {}
    shared = [["one", "two", 1], ["test", "one", 1], ["test", "two", 1]]
    assert sorted(table(recipe, "images", "one").require().extra["shared"]) == sorted(shared)
    verify.run(recipe)
    before = {name: table(recipe, "images", name).committed() for name in ("one", "two", "test")}
    ingest.run(recipe)
    assert {name: table(recipe, "images", name).committed() for name in before} == before
    told = recipe_of(tmp_path / "told", sources, train__mixture=mixture("one"), ingest__contamination="report")
    ingest.run(told)
    assert refused(told, "images", "one") == {"x.png": "duplicate_id"} and refused(told, "images", "two") == {}
    assert sorted(table(told, "images", "two").require().extra["shared"]) == sorted(shared)


def mixture(name: str) -> str:
    return json.dumps([{"source": name, "weight": 1, "segmentation": False, "depth": True}])


def test_a_forgotten_image_is_gone_from_every_table_and_does_not_come_back(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None], caplog: pytest.LogCaptureFixture
) -> None:
    pictures = {f"{i}.png": png(i) for i in range(6)} | {"secret.png": png(77), "secret_copy.png": png(77)}
    folder = folder_of(tmp_path / "photos", pictures)
    record = {"image": "secret.png", "turns": [{"kind": "vqa", "prompt": "Who is it?", "answer": "Jane Roe"}]}
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    before, key = all_commits(recipe), ids_by_name(recipe)["secret.png"]
    done = forget.run(recipe, [key])
    assert done.rows == {f"{name}/photos": 1 for name in ("images", "depth", "codes", "samples")}
    for path in Path(recipe.root).rglob("*.parquet"):
        assert b"Jane Roe" not in path.read_bytes() and b"secret" not in path.read_bytes()
    assert list(refused(recipe, "images").values()) == ["forgotten"]
    verify.run(recipe)
    after = all_commits(recipe)
    assert all(after[name][0] == before[name][0] for name in after), "a shard without it was touched"
    run_stages(recipe)
    assert all_commits(recipe) == after, "a stage made anew what forget had put right"
    (folder / "secret_third.png").write_bytes(png(77))
    append.run(recipe)
    run_stages(recipe)
    assert key not in ids_by_name(recipe).values()
    assert refused(recipe, "images")[key] == "forgotten"
    verify.run(recipe)
    with pytest.raises(StageError, match="no table under"):
        forget.run(recipe, [key])
    with pytest.raises(StageError, match=r"id '\.\./etc', expected 16 hex digits"):
        forget.run(recipe, ["../etc"])


def test_what_was_made_from_a_forgotten_image_is_marked(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(5)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    root, ids = open_root(recipe.root), ids_by_name(recipe)
    codebook = root.manifest("codebook")
    assert codebook is not None
    first = table(recipe, "depth").committed()[0]
    sample = [{"source": "photos", "shard": 0, "content": first.content, "rows": 2}]
    changed = codebook.model_copy(update={"extra": {**codebook.extra, "sample": sample}})
    root.write(changed.model_dump_json().encode(), "codebook", "manifest.json")
    in_sample, out_of_sample = (key for i, key in enumerate(ids.values()) if i in (1, 3))
    assert "codebook" not in forget.run(recipe, [out_of_sample]).marked
    shutil.rmtree(root.path)
    run_stages(recipe)
    root.write(changed.model_dump_json().encode(), "codebook", "manifest.json")
    assert "codebook" in forget.run(recipe, [in_sample]).marked
    assert json.loads((Path(recipe.root) / "codebook" / FORGOTTEN_NAME).read_text())["ids"] == [in_sample]
    caplog.clear()
    verify.run(recipe)
    assert "codebook was made from images that were forgotten" in caplog.text


def test_clean_shows_first_and_takes_only_what_nobody_needs(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    ingest.run(recipe)
    images, rejects = Path(recipe.root) / "images" / "photos", Path(recipe.root) / "rejects" / "ingest" / "photos"
    rejects.mkdir(parents=True, exist_ok=True)
    lost = [images / "part-000000-lost.parquet", rejects / "part-000001-lost.parquet"]
    draft, young = images / "_commits" / "000001.json~1234", images / "part-000001-x.parquet~12"
    foreign = images / "notes.txt"
    for path in (*lost, draft, young, foreign):
        path.write_bytes(b"left behind")
    yesterday = time.time() - 25 * 3600
    os.utime(draft, (yesterday, yesterday))
    found = clean.run(recipe)
    assert {stray.path for stray in found} == {path.relative_to(recipe.root).as_posix() for path in (*lost, draft)}
    assert all(path.exists() for path in (*lost, draft))
    assert clean.run(recipe, yes=True) == found
    assert not any(path.exists() for path in (*lost, draft)) and young.exists() and foreign.exists()
    for path in (foreign, young):
        path.unlink()
    verify.run(recipe)


def test_clean_leaves_alone_what_an_attempt_may_still_commit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    ingest.run(recipe)
    table(recipe, "images").reopen()
    working = Path(recipe.root) / "images" / "photos" / "part-000002-working.parquet"
    working.write_bytes(b"half")
    assert clean.run(recipe) == []
    assert [stray.path for stray in clean.run(recipe, now=time.time() + 25 * 3600)] == [
        "images/photos/part-000002-working.parquet"
    ]


def test_by_rule_reasons_are_not_asked_for_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": png(1)})
    with pytest.raises(StageError, match="--reason 'forgotten'"):
        requeue.run(recipe_of(tmp_path / "root", [source(folder)]), Reason.FORGOTTEN.value)
