"""`depth.maps: sample`: few full maps, the same codes; and accelerators shared by actors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import recipe_of, rooms

from perceptio.depth.teacher import TeacherCard
from schemas.manifest import Licence
from schemas.recipe import Recipe
from schemas.tables import DEPTH, REJECTS, Reason
from workflows import assemble, depth, ingest, tokenize_depth, verify
from workflows.commits import Table
from workflows.listing import listed
from workflows.pool import run_shards
from workflows.shards import Job, Reject, ShardResult, ShardWorker, Work, shards_of
from workflows.store import OtherInputsError, open_root


def table(recipe: Recipe, name: str, source: str) -> Table:
    return Table(open_root(recipe.root), name, source)


def contents(recipe: Recipe, name: str, source: str) -> dict[int, str]:
    return {commit.shard: commit.content for commit in table(recipe, name, source).require().shards}


def standing(recipe: Recipe) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(recipe.root).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Recipe:
    """Images of two sources, brought in without a pool."""
    sources = [rooms("training", 12), rooms("heldout", 5, seed=2, held_out=True)]
    settings = {"depth__teacher": teacher, "depth__batch_size": 3, "codebook__sample_rows": 3, "depth__maps": "sample"}
    settings["train__mixture"] = [{"source": "training", "weight": 1, "segmentation": False, "depth": True}]
    recipe = recipe_of(tmp_path_factory.mktemp("images"), sources, **settings, max_reject_share=0.1)
    worker = ingest.IngestWorker(recipe.model_dump_json())
    for source in recipe.sources:
        over = shards_of(listing=listed(recipe, open_root(recipe.root), source))
        made = over_shards(recipe, worker, "images", "listing", source.name, over)
        licences = (Licence(part=f"data: {source.name}", source="rooms", licence="Apache-2.0"),)
        made.finish(made.committed(), attempt="a", recipe="r", code="c", licences=licences)
    return recipe


def over_shards(
    recipe: Recipe, worker: ShardWorker, name: str, over: str, source: str, shards: Mapping[int, Mapping[str, str]]
) -> Table:
    """A table with these shards committed, in this process."""
    made = table(recipe, name, source)
    for shard, inputs in shards.items():
        result = worker.process(Work(made, table(recipe, over, source), shard, inputs))
        made.commit(shard, "a", result.table, REJECTS.empty_table(), result.read, inputs=inputs)
    return made


@pytest.mark.usefixtures("without_ray")
def test_a_sample_of_maps_gives_the_codes_of_all_maps(
    ingested: Recipe, tmp_path: Path, teacher: Path, put_codebook: Callable[..., None]
) -> None:
    shutil.copytree(ingested.root, tmp_path / "root")
    recipe = ingested.model_copy(update={"root": str(tmp_path / "root")})
    depth.run(recipe)
    put_codebook(recipe, TeacherCard.read(teacher).digest)
    tokenize_depth.run(recipe)
    assemble.run(recipe)
    assert len(contents(recipe, "depth", "training")) == 1
    assert [len(contents(recipe, name, "training")) for name in ("images", "codes", "samples")] == [3, 3, 3]
    assert contents(recipe, "depth", "heldout").keys() == contents(recipe, "images", "heldout").keys()
    manifest = table(recipe, "codes", "training").require()
    assert {licence.part for licence in manifest.licences} == {"data: training", "teacher"}
    assert manifest.inputs["teacher"] == TeacherCard.read(teacher).digest
    for source in ("training", "heldout"):
        for name in ("depth", "codes", "samples"):
            assert verify.problems_of(table(recipe, name, source)) == []
    before = standing(recipe)
    for stage in (depth, tokenize_depth, assemble):
        stage.run(recipe)
    assert standing(recipe) == before

    whole = recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"maps": "all"})})
    depth.run(whole)  # the maps that are missing are made, the others stay
    made = table(whole, "depth", "training").require()
    assert len(made.shards) == 3 and verify.problems_of(table(whole, "depth", "training")) == []
    after = standing(whole)
    assert all(after[path] == time for path, time in before.items() if path.name.startswith("part-"))
    codes = contents(recipe, "codes", "training")
    shutil.rmtree(Path(recipe.root) / "codes")
    worker = tokenize_depth.CodecWorker(recipe.root, recipe.tokenize.batch_size, recipe.tokenize.pool.threads)
    again = over_shards(recipe, worker, "codes", "depth", "training", shards_of(depth=made))
    assert {shard: commit.content for shard, commit in again.committed().items()} == codes


def test_images_meet_no_codebook_for_another_teacher(
    ingested: Recipe, tmp_path: Path, put_codebook: Callable[..., None]
) -> None:
    shutil.copytree(Path(ingested.root) / "images", tmp_path / "images")
    recipe = ingested.model_copy(update={"root": str(tmp_path), "sources": ingested.sources[:1]})
    put_codebook(recipe, "another teacher")
    with pytest.raises(OtherInputsError, match="made for teacher 'another teacher', but the recipe's depth has"):
        tokenize_depth.run(recipe)
    assert table(recipe, "codes", "training").committed() == {}


class TellsItsShare:
    """Refuses every row and says what Ray gave its actor."""

    def process(self, work: Work) -> ShardResult:
        import ray

        told = json.dumps(ray.get_runtime_context().get_assigned_resources())
        ids = work.rows(["id"])["id"].to_pylist()
        rejects = [Reject(Reason.BAD_RECORD, told, key, "", row) for row, key in enumerate(ids)]
        return ShardResult(DEPTH.empty_table(), len(ids), rejects)


def test_an_actor_is_given_the_share_of_an_accelerator_that_its_pool_asks_for(ingested: Recipe, tmp_path: Path) -> None:
    shutil.copytree(Path(ingested.root) / "images", tmp_path / "images")
    recipe = ingested.model_copy(update={"root": str(tmp_path), "max_reject_share": 1.0})
    pool = recipe.depth.pool.model_copy(update={"min_actors": 2, "max_actors": 2, "cpus": 0.5, "gpus": 0.25})
    images, to = table(recipe, "images", "training"), table(recipe, "depth", "training")
    job = Job(to, images, shards_of(images=images.require()), {"settings": "shares"})
    run_shards(recipe, [job], TellsItsShare, {}, pool=pool)
    told = [row["message"] for c in to.committed().values() for row in to.rejects_of(c).to_pylist()]
    assert len(told) == 12 and {(s["GPU"], s["CPU"]) for s in map(json.loads, told)} == {(0.25, 0.5)}
