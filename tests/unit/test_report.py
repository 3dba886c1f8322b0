"""The page and its drawings: complete, self-contained, safe, and honest about what an interval allows to say."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceptio.data.images import encode_png
from perceptio.data.maps import pack_map
from perceptio.data.masks import masks_to_rle
from schemas.recipe import Recipe
from schemas.recipe_file import load_recipe
from schemas.tables import DEPTH, IMAGES, PREDICTIONS, REJECTS, SAMPLES
from tests.tiny import tiny_parts
from workflows import charts, pictures, report
from workflows.commits import Table
from workflows.folders import publish
from workflows.scores import NO_BASELINE
from workflows.store import Root, StageError, open_root

ROOMS = Path(report.__file__).parent / "recipes" / "rooms.yaml"
EVIL = "<script>alert(1)</script>"


def metric(value: float, low: float, high: float, *, higher: bool = True) -> dict[str, Any]:
    found = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 5, "baseline": 0.4, "against": "chance"}
    return found | {
        "difference": value - 0.4,
        "difference_low": low,
        "difference_high": high,
        "higher_is_better": higher,
    }


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [
        (0.01, 0.2, True, "better"),
        (-0.01, 0.2, True, "open"),
        (-0.2, -0.01, True, "worse"),
        (-0.2, -0.01, False, "better"),
        (0.01, 0.2, False, "worse"),
        (0.0, 0.2, True, "open"),
    ],
)
def test_better_is_said_only_where_the_interval_leaves_out_zero(
    low: float, high: float, higher: bool, verdict: str
) -> None:
    assert report.figure("yes_no_accuracy", metric(0.5, low, high, higher=higher)).verdict == verdict


def test_errors_are_numbers_and_shares_are_per_cent() -> None:
    assert report.figure("generated_depth_mae_vs_other_image", metric(0.5, -0.1, 0.1)).value == "0.500"
    assert report.figure("referring_ciou_vs_untrained", metric(0.5, -0.1, 0.1)).value == "50.0 %"


def test_a_whisker_keeps_its_order_and_its_frame() -> None:
    drawn = charts.whisker(0.5, 0.4, 0.6, 0.1)
    assert 0 < drawn.baseline < drawn.low < drawn.value < drawn.high < charts.SPAN


def test_curves_leave_out_what_a_data_set_has_no_part_of() -> None:
    chart = charts.curves("mask_bce", [1, 2, 3], [4.0, 2.0, 1.0], {"points": [None, 1.0, None]})
    assert chart.title == "mask bce"
    assert len(chart.raw.split()) == 3
    assert len(chart.apart["points"].split()) == 1
    heights = [float(point.split(",")[1]) for point in chart.raw.split()]
    assert heights == sorted(heights), "a falling loss falls on the page: y grows downward"


def test_bars_are_shares_of_the_longest() -> None:
    assert [bar.share for bar in charts.bars({"train": 200, "depth": 50})] == [100, 25]
    assert charts.bars({}) == []


def test_depth_is_brighter_where_closer() -> None:
    colours = pictures.depth_colours(np.linspace(0, 1, 6)[None]).astype(int).sum(-1)[0]
    assert (np.diff(colours) > 0).all()


def test_a_mask_tints_its_inside_and_darkens_the_rest() -> None:
    rgb_HW3, mask_HW = np.full((6, 6, 3), 100, np.uint8), np.zeros((6, 6), bool)
    mask_HW[1:5, 1:5] = True
    shown = pictures.tinted(rgb_HW3, mask_HW)
    assert shown[0, 0].tolist() == [70, 70, 70]
    assert shown[1, 1].tolist() == [255, 255, 255]
    assert shown[2, 2, 0] > shown[2, 2, 1]


def commit(root: Root, name: str, source: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = Table(root, name, source)
    made = table.commit(0, "test", pa.Table.from_pylist(rows, schema=schema), REJECTS.empty_table(), len(rows))
    table.finish({0: made}, attempt="test", recipe="test", code="test", seconds=2.5)


def rows_of(place: int) -> tuple[dict[str, Any], ...]:
    """A held-out picture's rows in images, depth, samples, and what was said about it."""
    rng = np.random.default_rng(place)
    image, key = encode_png(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)), f"id{place}"
    mask_HW = np.zeros((1, 8, 8), bool)
    mask_HW[0, :4] = True
    plain = {"form": "", "expression": "", "objects": [], "choices": []}
    turns = [
        {**plain, "kind": "referring", "prompt": f"Segment {EVIL}.", "answer": "Sure.", "objects": [0]},
        {**plain, "kind": "yes_no", "prompt": "Is it?", "answer": "Yes", "choices": ["Yes", "No"]},
    ]
    shared = {"id": key, "image": image, "width": 8, "height": 8, "turns": turns, "masks": masks_to_rle(mask_HW)}
    map_HW = rng.integers(0, 65535, (16, 16)).astype(np.uint16)
    sample = shared | {"codes": [0, 1, 2, 3], "depth_target": pack_map(map_HW)}
    depth = {"id": key, "inv_depth": pack_map(map_HW[:8, :8]), "raw_min": 0.0, "raw_max": 1.0}
    said = {"id": key, "grammar": True, "codes": [0, 1, 2, 2], "well_formed": True, "finish": "stop"}
    replies = [
        said | {"turn": 0, "text": "Sure.", "masks": masks_to_rle(mask_HW)},
        said | {"turn": 1, "text": "No", "masks": []},
    ]
    return shared | {"uri": f"room {place}", "boxes": [], "recorded_depth": None}, depth, sample, *replies


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Root]:
    """A root as a finished run leaves it, of three pictures."""
    folder = tmp_path_factory.mktemp("report")
    sources = [{"name": "heldout", "format": "folder", "path": "nowhere", "held_out": True}]
    overrides = [f"sources={json.dumps(sources)}", "train.mixture=[]"]
    recipe = load_recipe(ROOMS, overrides=overrides, root=str(folder / "root"))
    root = open_root(recipe.root)
    images, depth, samples, *said = zip(*(rows_of(place) for place in range(3)), strict=True)
    commit(root, "images", "heldout", list(images), IMAGES)
    commit(root, "depth", "heldout", list(depth), DEPTH)
    commit(root, "samples", "heldout", list(samples), SAMPLES)
    codebook = tiny_parts(folder / "parts")["codebook"]
    publish(root, codebook, "codebook", stage="codebook", attempt="a", recipe="r", code="c", seconds=7)
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row for part in said for row in part], schema=PREDICTIONS), stream)
    metrics = {
        "referring_ciou": metric(0.6, 0.1, 0.3),
        "generated_depth_mae": metric(0.3, -0.2, 0.1, higher=False),
        "closest_point_accuracy": metric(0.5, -0.1, 0.2),
        "well_formed_without_grammar": metric(0.5, 0.1, 0.2) | {"against": NO_BASELINE, "baseline": 0.123},
        "something_new": metric(0.5, -0.1, 0.2),
    }
    for parts, data in {
        ("eval", "NAME", "model.parquet"): stream.getvalue(),
        ("eval", "metrics.json"): json.dumps({"evaluation": "NAME", "metrics": metrics}).encode(),
        ("model", "perceptio.json"): json.dumps({"run": "RUN"}).encode(),
        ("runs", "RUN", "metrics.jsonl"): b"".join(map(log_line, (1, 2, 3))),
    }.items():
        root.write(data, *parts)
    return recipe, root


def log_line(step: int) -> bytes:
    terms = {"text": 3.0 / step, "token": 4.0 / step}
    by_source = {"referring": terms, "points": {"text": 1.0}}
    return json.dumps({"step": step, "loss": 7.0 / step, "terms": terms, "by_source": by_source}).encode() + b"\n"


def test_the_json_has_figures_seconds_and_versions(finished: tuple[Recipe, Root]) -> None:
    recipe, root = finished
    report.write_report(recipe, {"train": 12.5})
    found = json.loads(root.read("report.json") or b"")
    assert found["metrics"]["referring_ciou"]["value"] == 0.6
    assert found["seconds"] == {"train": 12.5}
    assert {"torch", "ray", "python", "perceptio"} <= set(found["versions"])


def test_without_a_stop_watch_the_manifests_are_asked(finished: tuple[Recipe, Root]) -> None:
    recipe, root = finished
    assert report.stage_seconds(recipe, root) == {"ingest": 2.5, "depth": 2.5, "codebook": 7.0, "assemble": 2.5}


def test_the_page_is_whole_and_loads_nothing(finished: tuple[Recipe, Root]) -> None:
    recipe, root = finished
    report.write_report(recipe)
    page = (root.read("report.html") or b"").decode()
    assert page.count("data:image/webp;base64,") == 3 * 6
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"|url\(", page)
    assert page.count('class="raw"') == 3, "the total and two terms"
    assert page.count("12.3 %") == 0, "a figure that stands alone is said to be better than nothing"
    for part in ("Something new", "IoU 100 %", "Referring segmentation, cIoU", "not told apart"):
        assert part in page
    assert page.count("1 more question about it, 0 right") == 3


def test_words_of_a_record_are_never_markup(finished: tuple[Recipe, Root]) -> None:
    recipe, root = finished
    report.write_report(recipe)
    page = (root.read("report.html") or b"").decode()
    assert "<script" not in page
    assert "Segment &lt;script&gt;" in page


def test_an_unfinished_run_is_told_what_to_do(tmp_path: Path, finished: tuple[Recipe, Root]) -> None:
    recipe = finished[0].model_copy(update={"root": str(tmp_path)})
    with pytest.raises(StageError, match="run `evaluate` first"):
        report.write_report(recipe)


def test_served_answers_are_drawn(finished: tuple[Recipe, Root]) -> None:
    root = finished[1]
    shared = rows_of(0)[0]
    png, mask = base64.b64encode(shared["image"]).decode(), shared["masks"][0]
    rle = {"size": [mask["height"], mask["width"]], "counts": mask["counts"]}
    reply = {"text": EVIL, "masks": [{"rle": rle}], "depth": None, "seconds": {"generate": 0.25, "masks": 0.25}}
    root.write(json.dumps([{"question": "Where?", "image": png, "reply": reply}]).encode(), "served.json")
    found = report.served(root)
    assert [name for name, _, _ in found[0]["pictures"]] == ["asked about", "1 mask"]
    assert found[0]["seconds"] == 0.5
    root.delete("served.json")
    assert report.served(root) == []
