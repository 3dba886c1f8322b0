"""The page about one stage: what it counts is what stands, what it shows is escaped, and what was refused is seen."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_this_process, recipe_of
from PIL import Image
from typer.testing import CliRunner

from perceptio.depth.teacher import DepthTeacher
from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from schemas.recipe import Recipe
from schemas.tables import Reason
from workflows import assemble, depth, forget, ingest, masks, stage_report, tokenize_depth
from workflows.cli import app
from workflows.commits import Table
from workflows.store import StageError, open_root

GOOD, SIDE, TOKENS = 7, 64, 16  # photographs; pixels; codes of a map (conftest's codebook: 32 px, stride 8)
EVIL = "<img src=x onerror=alert(1)>"
STAGES: dict[str, Callable[[Recipe], Any]] = {
    "ingest": ingest.run,
    "depth": depth.run,
    "masks": masks.run,
    "tokenize": tokenize_depth.run,
    "assemble": assemble.run,
}


def photograph(seed: int, side: int = SIDE) -> bytes:
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    waves = [np.sin(6 * ((seed + 1) * x + channel * y) + seed) for channel in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1))).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[str]:
    """No Ray: what is tested here is what stands in the tables."""
    with in_this_process():
        yield ""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Path, put_codebook: Callable[..., None]) -> Recipe:
    """A root on which every stage ran, of good pictures and of one for each of several reasons to refuse."""
    place = tmp_path_factory.mktemp("pages")
    photos = place / "photos"
    photos.mkdir()
    files = {f"{i}.png": photograph(i) for i in range(GOOD)}
    files |= {f"{EVIL}.png": photograph(20)[:200], "tiny.png": photograph(21, 8), "words.png": EVIL.encode()}
    files |= {"again.png": photograph(0), "wrong.png": photograph(22), "flat.png": photograph(23)}
    for name, data in files.items():
        (photos / name).write_bytes(data)
    box = [8.0, 8.0, 40.0, 40.0]
    turn = {"kind": "referring", "prompt": f"Segment {EVIL}.", "answer": "Sure.", "expression": EVIL, "objects": [0]}
    records = [{"image": f"{i}.png", "boxes": [box], "turns": [turn]} for i in range(GOOD)]
    records.append({"image": "wrong.png", "boxes": [[0, 0, 999, 999]]})
    (photos / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    torch.manual_seed(0)
    small = Sam2ImageConfig(image_size=128, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    Sam2ImageModel(small).save_pretrained(place / "sam2")
    settings = {"depth__teacher": teacher, "masks__teacher": place / "sam2", "masks__pool__max_actors": 1}
    settings |= {"masks__min_predicted_iou": 0, "masks__min_stability": 0}
    source = {"name": "photos", "format": "folder", "path": str(photos)}
    mixture = [{"source": "photos", "weight": 1, "segmentation": True, "depth": True}]
    recipe = recipe_of(place / "root", [source], **{**settings, "train__mixture": json.dumps(mixture)})
    put_codebook(recipe, DepthTeacher.from_pretrained(teacher).digest)
    for run in STAGES.values():
        run(recipe)
    return recipe


def page_of(recipe: Recipe, stage: str) -> str:
    return Path(stage_report.run(recipe, stage)).read_text(encoding="utf-8")


def bars(page: str, title: str) -> list[int]:
    """The counts of a histogram, as the pointer is told them."""
    chart = page.partition(f"<h3>{title}</h3>")[2].partition("</svg>")[0]
    return [int(found.replace(",", "")) for found in re.findall(r"<title>[^<]*: ([\d,]+)</title>", chart)]


def rows_kept(recipe: Recipe, table: str) -> int:
    return Table(open_root(recipe.root), table, "photos").require().kept


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_is_whole_loads_nothing_and_holds_no_foreign_markup(made: Recipe, stage: str) -> None:
    page = page_of(made, stage)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"|url\(|<script", page)
    assert EVIL not in page
    assert "data:image/webp;base64," in page


def test_every_reason_is_told_with_its_count_and_seen_where_there_is_something_to_see(made: Recipe) -> None:
    page = page_of(made, "ingest")
    reasons = Table(open_root(made.root), "images", "photos").require()
    counts = {reason: n for commit in reasons.shards for reason, n in commit.reasons.items()}
    assert set(counts) == {
        Reason.TRUNCATED_IMAGE, Reason.TOO_SMALL, Reason.NOT_AN_IMAGE, Reason.DUPLICATE_ID, Reason.MASK_OUTSIDE_IMAGE
    }  # fmt: skip
    for reason, count in counts.items():
        assert re.search(rf"<h3>{reason} <span class=\"soft\">{count}</span></h3>", page)
    refused = page.partition("<h2>Refused rows</h2>")[2]
    seen = re.findall(r"<li>(<img|<span class=\"blank\").*?</li>", refused, re.DOTALL)
    assert seen.count("<img") == 3, "tiny, the double and the one with the wrong box can be drawn"
    assert seen.count('<span class="blank"') == 2
    assert "cannot be drawn: truncated image" in refused and "cannot be drawn: not an image" in refused
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in refused


def test_histograms_count_every_row_that_they_say(made: Recipe) -> None:
    kept = rows_kept(made, "images")
    assert kept == GOOD + 1
    assert sum(bars(page_of(made, "ingest"), "longer side, pixels")) == kept
    assert bars(page_of(made, "ingest"), "questions an image") == [1, GOOD]
    assert f"{kept} of the {kept} kept rows" in page_of(made, "ingest")
    tokens = page_of(made, "tokenize")
    assert sum(bars(tokens, "uses of each code")) == TOKENS * rows_kept(made, "codes")
    assert sum(bars(tokens, "reconstruction MAE in inverse depth")) == rows_kept(made, "codes")
    assert sum(bars(page_of(made, "depth"), "inverse depth of pixels: 0 far, 1 close")) == SIDE**2 * kept
    assert sum(bars(page_of(made, "masks"), "predicted IoU of drawn masks")) == GOOD
    assert bars(page_of(made, "assemble"), "objects with a mask in a sample") == [1, GOOD]


def test_best_reconstructions_are_better_than_the_worst(made: Recipe) -> None:
    page = page_of(made, "tokenize")

    def errors(group: str) -> list[float]:
        part = page.partition(f"<h2>{group} reconstructions</h2>")[2].partition("</section>")[0]
        return [float(found) for found in re.findall(r"MAE ([\d.]+)", part)]

    table = Table(open_root(made.root), "codes", "photos")
    true = sorted(e for s in table.committed() for e in table.read_shard(s)["reconstruction_mae"].to_pylist())
    best, worst = errors("Best"), errors("Worst")
    assert len(best) == len(worst) == 2
    assert sorted(best) == pytest.approx(true[:2], abs=1e-4) and sorted(worst) == pytest.approx(true[-2:], abs=1e-4)


def test_the_command_says_where_the_page_is(made: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(made.model_dump_json(), encoding="utf-8")
    done = CliRunner().invoke(app, ["report", "depth", "--recipe", str(path)])
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip().splitlines()[-1]).is_file()
    assert CliRunner().invoke(app, ["report", "train", "--recipe", str(path)]).exit_code == 2


def test_a_stage_that_has_not_run_is_named(tmp_path: Path, made: Recipe) -> None:
    recipe = made.model_copy(update={"root": str(tmp_path)})
    with pytest.raises(StageError, match="run `depth` first"):
        stage_report.run(recipe, "depth")


def test_a_source_that_is_gone_is_told_and_the_page_still_made(made: Recipe) -> None:
    photos = Path(made.sources[0].path)  # type: ignore[union-attr]
    hidden = photos.rename(photos.with_name("hidden"))
    try:
        refused = page_of(made, "ingest").partition("<h2>Refused rows</h2>")[2]
    finally:
        hidden.rename(photos)
    assert "<img" not in refused and "there is nothing to draw: missing file" in refused


def test_forgetting_takes_the_pages_too_for_they_may_show_it(made: Recipe) -> None:
    pages = [Path(stage_report.run(made, stage)) for stage in ("ingest", "depth")]
    table = Table(open_root(made.root), "images", "photos")
    gone = table.ids_of(next(commit for commit in table.committed().values() if commit.kept))[0]
    forget.run(made, [gone])
    assert not any(page.exists() for page in pages)
    assert gone not in page_of(made, "depth")
