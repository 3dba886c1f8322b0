"""A plan's arithmetic by worked numbers, its sample's draw, and what the recipe may say of machines and prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceptio.sources.record import Item
from schemas.plan import PLAN_NAME, Plan, StagePlan, TablePlan
from schemas.recipe import MachineRecipe, PoolRecipe, PriceRecipe, Recipe, RecipeError, RoomsSource
from schemas.recipe_file import load_recipe
from workflows import estimate, plan, plan_reckon, plan_table
from workflows.commits import Table
from workflows.plan_sample import census, pieces
from workflows.planned import codebook_planned_and_actual, planned_and_actual, read_plan
from workflows.store import DamagedTableError, StageError, open_root

ROOMS = Path(plan.__file__).parent / "recipes" / "rooms.yaml"
CPU = MachineRecipe(cpus=16, memory_gb=64, count=10, usd_per_hour=0.5)
GPU = MachineRecipe(cpus=8, gpus=2, memory_gb=64, count=3, usd_per_hour=4)
PRICES = PriceRecipe(storage_usd_per_gb_month=0.02, put_usd_per_1000=0.005, get_usd_per_1000=0.0004)


def pool(low: int = 1, high: int = 2, **more: float) -> PoolRecipe:
    return PoolRecipe.model_validate({"min_actors": low, "max_actors": high, **more})


def stage(name: str, **more: object) -> StagePlan:
    values = {
        "stage": name, "rows": 1000, "shards": 10, "rows_per_s_actor": 2.0, "cores_per_actor": 1.0, "memory_gb": 1.0,
        "actors": 2, "hours": 3.0, "preparing_hours": 0.5, "suggested_actors": 4, "suggested_hours": 2.0,
        "machine": "", "machines": 0, "puts": 30, "gets": 40, "usd": None,
    }  # fmt: skip
    return StagePlan.model_validate(values | more)


def whole(recipe: Recipe) -> Plan:
    images = TablePlan(table="images", source="referring", read=700, kept=690, bytes=1_400_000)
    return Plan(
        recipe=recipe.digest, name="rooms", made="2026-01-01 00:00:00", code="c", cores=2, sample_rows=64,
        stages=(stage("ingest"), stage("depth", suggested_hours=2.5)), tables=(images,), bottleneck="depth", hours=6,
        suggested_hours=4.5, bytes=1_400_000, puts=60, gets=80, machines_usd=None, requests_usd=0.01,
        storage_usd_per_month=0.5, notes=("a note",),
    )  # fmt: skip


def test_a_line_is_found_through_its_points_with_a_rate_for_each_source() -> None:
    points = [("a", 10, 0.5 + 10 * 0.2), ("a", 20, 0.5 + 20 * 0.2), ("b", 10, 0.5 + 10 * 0.05), ("b", 20, 0.5 + 1)]
    line = estimate.fitted(points)
    assert line.fixed == pytest.approx(0.5)
    assert line.rate == pytest.approx({"a": 0.2, "b": 0.05})
    assert line.at("a", 100) == pytest.approx(20.5)


def test_a_line_never_falls_below_zero() -> None:
    line = estimate.fitted([("a", 10, 1.0), ("a", 20, 2.5), ("a", 30, 4.0)])  # least squares alone: fixed -0.5
    assert line.fixed == 0
    assert line.rate["a"] == pytest.approx(180 / 1400)  # sum of rows x value over sum of rows squared
    with pytest.raises(ValueError, match="needs points"):
        estimate.fitted([])


@pytest.mark.parametrize(
    ("seconds", "starts", "expected"),
    [
        ([3, 3, 3], [0], 9),
        ([3, 3, 3], [0, 0], 6),  # the third waits
        ([3, 3, 3, 3], [0, 5], 9),  # the second comes after two were done: 3, 6, 5 + 3, 6 + 3
        ([1, 1], [0, 100], 2),  # too late to be of use
        ([], [0], 0),
    ],
)
def test_a_pool_takes_shards_by_whoever_is_free_first(
    seconds: list[float], starts: list[float], expected: float
) -> None:
    assert estimate.span(seconds, starts) == expected


def test_actors_above_the_least_number_come_later() -> None:
    assert estimate.starts(pool(1, 3), 3, 7.5) == [0.0, 7.5, 7.5]
    assert estimate.starts(pool(2, 8), 1, 7.5) == [0.0]


def test_shards_are_full_but_for_the_last() -> None:
    assert estimate.shard_rows(rows=250, weight=250, shards=3, rows_per_shard=100) == [100, 100, 50]
    assert estimate.shard_rows(rows=500, weight=250, shards=3, rows_per_shard=100) == [200, 200, 100]  # two an item
    assert estimate.shard_rows(rows=60, weight=60, shards=2, rows_per_shard=100) == [30, 30]
    assert estimate.shard_rows(rows=7, weight=7, shards=1, rows_per_shard=100) == [7]


def test_actors_beyond_the_cores_do_not_add_up() -> None:
    assert estimate.stretch(2, 1.0, 2) == 1
    assert estimate.stretch(4, 1.0, 2) == 2
    assert estimate.stretch(4, 0.25, 2) == 1  # they wait for the store most of the time


def test_a_pool_gets_what_its_machines_hold() -> None:
    machines = {"cpu": CPU, "gpu": GPU}
    assert estimate.fleet(pool(), machines, 1.0, 1.0, 10_000) == estimate.Fleet("cpu", 160, 10)
    assert estimate.fleet(pool(), machines, 2.0, 1.0, 10_000).actors == 80  # two cores each
    assert estimate.fleet(pool(), machines, 0.5, 8.0, 10_000).actors == 80  # 8 of them in 64 GB
    assert estimate.fleet(pool(gpus=0.5, cpus=1), machines, 0.5, 1.0, 10_000) == estimate.Fleet("gpu", 12, 3)
    assert estimate.fleet(pool(), machines, 1.0, 1.0, 20) == estimate.Fleet("cpu", 20, 2)  # no more than shards
    assert estimate.fleet(pool(), {"gpu": GPU}, 1.0, 1.0, 100).kind == "gpu"
    with pytest.raises(ValueError, match=r"no machine of plan.machines holds one actor of cpus 1, gpus 4"):
        estimate.fleet(pool(gpus=4), machines, 1.0, 1.0, 10)


def test_requests_follow_from_the_commit_protocol() -> None:
    assert estimate.shard_requests(1, 10**6, 0.0) == estimate.Requests(puts=2, gets=4)
    assert estimate.shard_requests(3, 10**6, 0.25) == estimate.Requests(puts=2.25, gets=10)
    assert estimate.shard_requests(1, 200 * 2**20, 0.0).puts == 1 + 2 + 4  # begun, four parts, ended; the marker


def test_money_needs_a_price() -> None:
    assert estimate.money(5_000_000, PRICES, "put_usd_per_1000", 1000) == pytest.approx(25)
    assert estimate.money(3e12, PRICES, "storage_usd_per_gb_month", 1e9) == pytest.approx(60)
    assert estimate.money(1, None, "put_usd_per_1000", 1000) is None


def test_the_sample_is_drawn_from_the_whole_listing_and_the_same_again() -> None:
    source = RoomsSource(format="rooms", name="r", count=1000, size=32, seed=1, questions=(), exact_masks=True)
    one = census(source, rows_per_shard=300, sample_rows=50, seed=7)
    assert (one.items, one.shards, one.unknown, one.weight, one.rows) == (1000, 4, 1000, 1000, 0)
    numbers = [item.first for item in one.sample]
    assert numbers == sorted(set(numbers)) and len(numbers) == 50
    assert {number // 250 for number in numbers} == {0, 1, 2, 3}
    again = census(source, rows_per_shard=300, sample_rows=50, seed=7)
    assert again.sample == one.sample
    assert census(source, rows_per_shard=300, sample_rows=50, seed=8).sample != one.sample


def test_a_source_that_is_smaller_than_the_sample_is_taken_whole() -> None:
    source = RoomsSource(format="rooms", name="r", count=5, size=32, seed=1, questions=(), exact_masks=True)
    assert len(census(source, rows_per_shard=300, sample_rows=50, seed=7).sample) == 5


def test_a_source_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    sources = [{"name": "here", "format": "folder", "path": str(tmp_path / "none")}]
    entry = {"source": "here", "weight": 1, "segmentation": False, "depth": True}
    recipe = load_recipe(ROOMS, overrides=[f"sources={sources}", f"train.mixture=[{entry}]"], root=str(tmp_path))
    with pytest.raises(StageError, match="source 'here'"):
        census(recipe.sources[0], 100, 10, 7)


def test_shards_of_a_sample_have_two_sizes_and_lose_nothing() -> None:
    items = [Item(uri=f"file-{i}") for i in range(30)]
    found = list(pieces(items, 4))
    assert [len(piece) for piece in found] == [5, 10, 5, 10]
    assert [item for piece in found for item in piece] == items
    assert [len(piece) for piece in pieces(items[:2], 4)] == [1, 1]


def test_where_no_maps_are_kept_depth_does_the_codebooks_sample_and_tokenize_the_images() -> None:
    settings = ["depth.maps=sample", "codebook.sample_rows=180", "max_reject_share=0.1"]
    recipe = load_recipe(ROOMS, overrides=settings)
    images = [estimate.Rows("referring", [100] * 8), estimate.Rows("heldout", [100, 50])]
    maps = [rows.times(0.5) for rows in images]
    flow = {"ingest": images, "depth": images, "masks": images, "tokenize": maps, "assemble": images}
    plan_reckon._without_maps(recipe, flow)
    assert [list(rows.shards) for rows in flow["depth"]] == [[100, 100], [100, 50]]  # 180 / 0.9 of 800 images
    assert [list(rows.shards) for rows in flow["tokenize"]] == [[100] * 8, [50, 25]]


def test_prices_and_machines_leave_the_recipes_digest_as_it_is() -> None:
    plain = load_recipe(ROOMS)
    machines = {"cpu": CPU.model_dump()}
    priced = load_recipe(ROOMS, overrides=[f"plan.machines={machines}", f"plan.prices={PRICES.model_dump()}"])
    assert priced.digest == plain.digest
    assert priced.plan.machines["cpu"] == CPU
    with pytest.raises(RecipeError, match=r"'plan.prices.get_usd_per_1000' is missing"):
        load_recipe(ROOMS, overrides=["plan.prices={storage_usd_per_gb_month: 1, put_usd_per_1000: 1}"])
    with pytest.raises(RecipeError, match=r"'plan.machines.cpu.count' = 0"):
        load_recipe(ROOMS, overrides=["plan.machines={cpu: {cpus: 4, memory_gb: 8, count: 0}}"])


def test_a_manifest_says_what_was_planned_beside_what_became_of_it(tmp_path: Path) -> None:
    recipe = load_recipe(ROOMS, root=str(tmp_path))
    root = open_root(recipe.root)
    table = Table(root, "images", "referring")
    assert read_plan(root, recipe) is None
    assert planned_and_actual(None, table, rows=1, seconds=1, wall=1, size=1) == {}
    root.write(whole(recipe).model_dump_json().encode(), PLAN_NAME)
    found = planned_and_actual(read_plan(root, recipe), table, rows=700, seconds=350, wall=7200, size=5)
    assert found["planned"] == {"rows": 700, "bytes": 1_400_000, "rows_per_s_actor": 2.0, "hours": 2.5}
    assert found["actual"] == {"rows": 700, "bytes": 5, "rows_per_s_actor": 2.0, "hours": 2.0}
    other = Table(root, "images", "added-later")
    assert planned_and_actual(read_plan(root, recipe), other, rows=1, seconds=1, wall=1, size=1) == {}


def test_a_codebooks_hours_stand_beside_its_plan() -> None:
    recipe = load_recipe(ROOMS)
    made = whole(recipe)
    made = made.model_copy(update={"stages": (*made.stages, stage("codebook"))})
    assert codebook_planned_and_actual(made, 7200) == {"planned": {"hours": 2.5}, "actual": {"hours": 2.0}}
    assert codebook_planned_and_actual(None, 7200) == {}


def test_a_plan_of_another_recipe_is_not_compared_with(tmp_path: Path) -> None:
    recipe = load_recipe(ROOMS, root=str(tmp_path))
    root = open_root(recipe.root)
    root.write(whole(recipe).model_dump_json().encode(), PLAN_NAME)
    other = load_recipe(ROOMS, root=str(tmp_path), overrides=["seed=8"])
    assert read_plan(root, other) is None
    with pytest.raises(StageError, match="there is no plan of this recipe"):
        plan.compare(other)
    root.write(b"{}", PLAN_NAME)
    with pytest.raises(DamagedTableError, match=r"plan.json cannot be read"):
        read_plan(root, recipe)


def test_the_table_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    plan_table.show(whole(load_recipe(ROOMS)))
    printed = capsys.readouterr().out
    for column in plan_table.STAGE_COLUMNS:
        assert column in printed
    for text in ("depth *", "bottleneck: depth", "0.50 USD a month", "60 PUT, 80 GET, 0.01 USD", "machines: - USD"):
        assert text in printed
    assert "suggestion: --set depth.pool.max_actors=4" in printed
    assert "1.4 MB" in printed and "note: a note" in printed


def test_what_is_not_finished_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(ROOMS, root=str(tmp_path))
    open_root(recipe.root).write(whole(recipe).model_dump_json().encode(), PLAN_NAME)
    rows = plan.compare(recipe)
    assert [(row.stage, row.hours, row.rows, row.bytes) for row in rows] == [
        ("ingest", None, None, None),
        ("depth", None, None, None),
    ]
    plan_table.show_compared(rows)
    assert "2.50" in capsys.readouterr().out
