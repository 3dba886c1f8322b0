"""A plan by real stages: it says everything, touches no table, and comes true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import s3fs
from conftest import CHECKOUT, ROOMS, recipe_of, rooms
from s3_server import BUCKET, Faults, FaultyProxy, s3_server
from typer.testing import CliRunner

from schemas.plan import PLAN_NAME, Plan
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import CODES, REJECTS
from workflows import estimate, ingest
from workflows.cli import app
from workflows.commits import Table
from workflows.plan_table import STAGE_COLUMNS
from workflows.store import open_root

SOURCES = [rooms("training", count=30), rooms("heldout", count=12, seed=2, held_out=True)]
MACHINES = "{big: {cpus: 16, memory_gb: 64, count: 2, usd_per_hour: 1.5}}"
PRICES = "{storage_usd_per_gb_month: 0.02, put_usd_per_1000: 0.005, get_usd_per_1000: 0.0004}"
PLANNED = """
import sys
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from workflows import plan
print(plan.run(Recipe.model_validate_json(sys.argv[1])).model_dump_json())
"""
DONE = """
import json, sys, time
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from workflows import assemble, codebook, depth, ingest, masks, runtime, tokenize_depth
recipe = Recipe.model_validate_json(sys.argv[1])
runtime.start(recipe)
seconds = {}
for name, stage in {"ingest": ingest, "depth": depth, "masks": masks, "codebook": codebook,
                    "tokenize": tokenize_depth, "assemble": assemble}.items():
    began = time.monotonic()
    stage.run(recipe)
    seconds[name] = time.monotonic() - began
print(json.dumps(seconds))
"""


def small(root: Path) -> Recipe:
    fields = {"image_size": 32, "stride": 16, "codes": 8, "dim": 8, "channels": [4, 4, 8, 8], "steps": 12}
    fields |= {"global_batch": 8, "workers": 1, "checkpoint_every": 6}
    settings = {f"codebook__{key}": value for key, value in fields.items()}
    settings |= {"plan__sample_rows": 16, "plan__machines": MACHINES, "plan__prices": PRICES}
    settings["train__mixture"] = [{"source": "training", "weight": 1, "segmentation": False, "depth": True}]
    return recipe_of(root, SOURCES, depth__teacher="recorded", masks__pool__max_actors=1, **settings)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_plan_says_everything_and_touches_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(tmp_path / "root")
    half = recipe.model_copy(update={"sources": recipe.sources[:1]})
    ingest.run(half)  # a table that stands already
    before = files(tmp_path / "root")
    whole = tmp_path / "recipe.json"  # JSON is YAML
    whole.write_text(recipe.model_dump_json(), encoding="utf-8")
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", "--recipe", str(whole), "--json", str(out)])
    assert result.exit_code == 0, result.output
    for text in (*STAGE_COLUMNS, "bottleneck: ", "USD a month", "big", "depth", "samples"):
        assert text in result.output
    made = Plan.model_validate_json(out.read_text(encoding="utf-8"))
    after = files(tmp_path / "root")
    assert after.pop(PLAN_NAME) and after == before
    assert not (tmp_path / "root" / "plan").exists()
    check_figures(made)
    ingest.run(recipe)
    manifest = Table(open_root(recipe.root), "images", "heldout").require()
    stage = made.stage("ingest")
    assert manifest.extra["planned"]["hours"] == pytest.approx(stage.hours - stage.preparing_hours)
    assert manifest.extra["actual"]["rows"] == manifest.read and manifest.extra["actual"]["hours"] > 0
    assert manifest.extra["planned"]["rows"] == pytest.approx(manifest.read, rel=0.5)
    result = CliRunner().invoke(app, ["plan", "--recipe", str(whole), "--compare"])
    assert result.exit_code == 0 and "ingest" in result.output


def check_figures(made: Plan) -> None:
    assert [stage.stage for stage in made.stages] == ["ingest", "depth", "masks", "codebook", "tokenize", "assemble"]
    assert made.table("listing", "training").read == 30  # type: ignore[union-attr]
    images = made.table("images", "training")
    assert images is not None and images.kept >= 30 and images.bytes > 30 * 500
    assert made.stage("depth").rows == sum(t.kept for t in made.tables if t.table == "images")
    assert made.stage("codebook").rows == 12 * 8
    for stage in made.stages:
        assert 0 < stage.suggested_hours <= stage.hours < 1 and stage.rows_per_s_actor > 0 and stage.machine == "big"
        assert stage.usd == pytest.approx(stage.suggested_hours * stage.machines * 1.5)
    assert made.hours == pytest.approx(sum(stage.hours for stage in made.stages))
    assert made.machines_usd == pytest.approx(sum(stage.usd or 0 for stage in made.stages))
    assert made.storage_usd_per_month == pytest.approx(made.bytes / 1e9 * 0.02)
    assert made.requests_usd == pytest.approx(made.puts / 1e3 * 0.005 + made.gets / 1e3 * 0.0004)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before an S3 server that counts what is asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as port, FaultyProxy(port, Faults()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_shard_costs_the_requests_that_are_planned(counted: FaultyProxy) -> None:
    root = open_root(f"s3://{BUCKET}/planned")
    depth, codes = Table(root, "depth", "rooms"), Table(root, "codes", "rooms")
    maps = [{"id": f"{i:016x}", "inv_depth": b"x", "raw_min": 0.0, "raw_max": 1.0} for i in range(3)]
    depth.commit(0, "a", pa.Table.from_pylist(maps, schema=depth.schema), REJECTS.empty_table(), 3)
    reject = {"stage": "tokenize", "source": "rooms", "shard": 0, "row": 0, "id": "", "uri": "", "message": ""}
    rejects = pa.Table.from_pylist([{**reject, "reason": "bad_record"}], schema=REJECTS)
    row = {"id": "0", "codes": [1], "depth_target": b"x", "reconstruction_mae": 0.1}
    made = pa.Table.from_pylist([row], schema=CODES)
    counted.requests.clear()
    assert codes.find(0) is None
    assert depth.read_shard(0).num_rows == 3
    assert codes.commit(0, "a", made, rejects, 2).rejected == 1
    planned = estimate.shard_requests(1, 1000, reject_share=1.0)
    seen = counted.requests
    assert (seen["PUT"] + seen["POST"], seen["GET"] + seen["HEAD"]) == (planned.puts, planned.gets), seen


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_planned_hours_come_true_on_rooms(tmp_path: Path, record: Callable[..., None]) -> None:
    recipe = load_recipe(ROOMS, root=str(tmp_path / "root"))
    load = [psutil.getloadavg()[0]]
    made = Plan.model_validate_json(json.dumps(in_process(PLANNED, recipe)))
    load.append(psutil.getloadavg()[0])
    actual = in_process(DONE, recipe)
    load.append(psutil.getloadavg()[0])
    planned = {stage.stage: stage.hours * 3600 for stage in made.stages}
    off = sum(planned.values()) / sum(actual.values()) - 1
    record(
        planned_seconds={name: round(value, 1) for name, value in planned.items()},
        actual_seconds={name: round(value, 1) for name, value in actual.items()},
        planned_total=round(sum(planned.values()), 1),
        actual_total=round(sum(actual.values()), 1),
        planned_is_off_by=round(off, 3),
        load_before_between_after=[round(value, 1) for value in load],
    )
    assert abs(off) < 0.2, (planned, actual)


def in_process(code: str, recipe: Recipe) -> Any:
    """What a process of its own, with a Ray of its own, prints last."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", code, recipe.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
