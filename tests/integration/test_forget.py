"""A forgotten image goes from every table, stays out, and marks what was made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import in_this_process, recipe_of
from photographs import all_commits, folder_of, ids_by_name, png, refused, source, table

from schemas.recipe import Recipe
from workflows import append, assemble, depth, forget, ingest, tokenize_depth, verify
from workflows.folders import FORGOTTEN_NAME
from workflows.forgotten import Request
from workflows.shards import ShardResult, Work
from workflows.store import DamagedTableError, StageError, open_root


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[str]:
    """No Ray: what is tested here is what stands in the tables."""
    with in_this_process():
        yield ""


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
