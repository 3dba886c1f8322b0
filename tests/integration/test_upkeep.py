"""What is done to tables that stand: more is appended, refused rows are tried again, images forgotten, strays go."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
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
from workflows.forgotten import Request
from workflows.shards import ShardResult, Work
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
    return {"name": name, "format": "folder", "path": str(folder)} | more


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


@pytest.mark.parametrize("form", ["folder", "list"])
def test_an_interrupted_listing_is_cut_as_an_undisturbed_one(tmp_path: Path, form: str) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i:02}.png": png(i) for i in range(10)})
    (folder / "list.txt").write_text("".join(f"{i:02}.png\n" for i in (0, 0, 1, 2, 0, 1, 3, 3, 4, 0, 5)))
    listed = (
        source(folder) if form == "folder" else {"name": "photos", "format": form, "path": str(folder / "list.txt")}
    )
    whole, broken = (recipe_of(tmp_path / name, [listed]) for name in ("whole", "broken"))
    for recipe in (whole, broken):
        ingest.run(recipe)
    listing = table(broken, "listing")
    listing.reopen()
    (Path(broken.root) / "listing" / "photos" / "_commits" / "000002.json").unlink()
    shutil.rmtree(Path(broken.root) / "images")
    ingest.run(broken)
    assert digests(broken) == digests(whole)
    assert table(whole, "listing").require().read == (10 if form == "folder" else 11)
    append.run(broken)
    assert digests(broken) == digests(whole), "an address that is listed twice was taken for a new one"


def tar_of(pictures: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_a_tar_that_was_cut_off_gives_all_its_rows_after_it_was_mended(tmp_path: Path) -> None:
    whole = tar_of({f"{i}.png": png(i) for i in range(6)})
    folder = folder_of(tmp_path / "shards", {"a.tar": whole[: len(whole) // 2], "b.tar": tar_of({"9.png": png(9)})})
    recipe = recipe_of(tmp_path / "root", [source(folder, format="webdataset")])
    ingest.run(recipe)
    before = table(recipe, "images").require()
    assert 0 < before.kept < 7 and before.rejected == 1
    (reason,) = before.shards[0].reasons
    (folder / "a.tar").write_bytes(whole)
    (done,) = requeue.run(recipe, reason)
    after = table(recipe, "images").require()
    assert (done.refused, after.read, after.kept, after.rejected) == (0, 7, 7, 0)
    assert after.shards[1] == before.shards[1]
    verify.run(recipe)


def test_what_is_mended_does_not_change_a_row_that_stands_under_its_id(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": png(1)[:200], "b.png": png(1), "c.png": png(2)})
    turns = {name: [{"kind": "vqa", "prompt": f"Is it {name}?", "answer": "yes"}] for name in ("a.png", "b.png")}
    records = [json.dumps({"image": name, "turns": asked}) + "\n" for name, asked in turns.items()]
    (folder / "records.jsonl").write_text("".join(records))
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    ingest.run(recipe)
    before = table(recipe, "images").read_shard(0).to_pylist()
    (folder / "a.png").write_bytes(png(1))
    requeue.run(recipe, "truncated_image")
    assert table(recipe, "images").read_shard(0).to_pylist() == before
    assert refused(recipe, "images") == {"a.png": "duplicate_id"}


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
    folder_of(two, {"new.png": png(55)})
    append.run(recipe)
    ingest.run(recipe)
    assert table(recipe, "images", "two").require().kept == 3
    assert sorted(table(recipe, "images", "two").require().extra["shared"]) == sorted(shared)


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


def test_of_two_requests_at_once_each_is_kept(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(4)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    one, other, *rest = ids_by_name(recipe).values()
    without, began = forget.without, []

    def second_first(*arguments: Any) -> ShardResult:
        """The first request has read its shard and not committed it when the second one does all of its work."""
        made = without(*arguments)
        if not began:
            began.append(True)
            assert forget.run(recipe, [other]).rows["images/photos"] == 1
        return made

    monkeypatch.setattr(forget, "without", second_first)
    assert forget.run(recipe, [one]).rows["images/photos"] == 1
    assert began and list(ids_by_name(recipe).values()) == rest
    ingest.run(recipe)
    for stage in (ingest, depth, tokenize_depth, assemble):
        stage.run(recipe)
    verify.run(recipe)
    for name in ("depth", "codes", "samples"):
        assert [key for c in table(recipe, name).committed().values() for key in table(recipe, name).ids_of(c)] == rest


def test_a_request_while_ingest_works_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(6)})
    recipe = recipe_of(tmp_path / "root", [source(folder)])
    key = ingest.image_id(png(0))
    process = ingest.IngestWorker.process

    def told_meanwhile(worker: ingest.IngestWorker, work: Work) -> ShardResult:
        if work.shard == 0:
            with pytest.raises(StageError, match="no table"):
                forget.run(recipe, [key])
        return process(worker, work)

    monkeypatch.setattr(ingest.IngestWorker, "process", told_meanwhile)
    ingest.run(recipe)
    assert refused(recipe, "images")[key] == "forgotten" and key not in ids_by_name(recipe).values()
    verify.run(recipe)


def test_verify_knows_what_was_forgotten_and_every_file_of_a_codebook(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None]
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(4)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    run_stages(recipe)
    verify.run(recipe)
    key = next(iter(ids_by_name(recipe).values()))
    request = Request(ids=(key,), at="2026-01-01T00:00:00Z").model_dump_json()
    open_root(recipe.root).create(request.encode(), "forgotten", "unfinished.json")
    weights = Path(recipe.root) / "codebook" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedTableError) as caught:
        verify.run(recipe)
    assert "codebook: file model.safetensors has sha256" in str(caught.value)
    for name in ("images", "depth", "codes", "samples"):
        assert f"{name}/photos: shard 0: image {key} stands, which `forget` was told" in str(caught.value)


def test_marks_come_before_any_id_goes(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(4)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher, assemble__row_group_rows=2)
    run_stages(recipe)
    (Path(recipe.root) / "runs" / "train-1").mkdir(parents=True)
    key = next(iter(ids_by_name(recipe).values()))
    with monkeypatch.context() as patch:
        patch.setattr(forget, "_taken_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forget.run(recipe, [key])
    assert json.loads((Path(recipe.root) / "runs" / "train-1" / FORGOTTEN_NAME).read_text())["ids"] == [key]
    plan = folder_of(Path(recipe.root) / "plan" / "attempt" / "images", {"sample.parquet": b"images"})
    assert forget.run(recipe, [key]).rows["samples/photos"] == 1
    assert not list(plan.iterdir())
    samples = table(recipe, "samples")
    assert samples.row_group_rows(samples.committed()[0]) == 2


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_clean_takes_the_scratch_of_what_ended(
    tmp_path: Path, teacher: Path, run_stages: Callable[[Recipe], None]
) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": png(i) for i in range(4)})
    recipe = recipe_of(tmp_path / "root", [source(folder)], depth__teacher=teacher)
    root, tomorrow = Path(recipe.root), time.time() + 25 * 3600
    scratch = [folder_of(root / name / "deep", {"a": b"x"}) for name in ("plan/one", "runs/codebook-one")]
    kept = folder_of(root / "runs" / "train-one", {"checkpoint": b"x"})
    ingest.run(recipe)
    assert clean.run(recipe) == []
    assert [s.path for s in clean.run(recipe, now=tomorrow)] == ["plan/one/deep/a"], "a killed training goes on"
    run_stages(recipe)
    assert [s.path for s in clean.run(recipe, yes=True, now=tomorrow)] == [
        "plan/one/deep/a",
        "runs/codebook-one/deep/a",
    ]
    assert not any(list(place.iterdir()) for place in scratch) and list(kept.iterdir())


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
