"""What is done to tables that stand: more is appended, refused rows are tried again, doubles are taken out."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import in_this_process, recipe_of
from photographs import all_commits, digests, folder_of, ids_by_name, png, refused, source, table

from schemas.recipe import Recipe
from schemas.tables import Reason
from workflows import append, ingest, requeue, verify
from workflows.store import DamagedTableError, StageError


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[str]:
    """No Ray: what is tested here is what stands in the tables."""
    with in_this_process():
        yield ""


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


def test_by_rule_reasons_are_not_asked_for_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": png(1)})
    with pytest.raises(StageError, match="--reason 'forgotten'"):
        requeue.run(recipe_of(tmp_path / "root", [source(folder)]), Reason.FORGOTTEN.value)
