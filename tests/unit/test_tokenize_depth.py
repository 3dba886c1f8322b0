"""Codes made straight from images are those of stored maps to the last bit, and so are the rejects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_depth_teacher_pipelines import depth_anything, images

from perceptio.data.images import encode_depth16, encode_png
from perceptio.data.maps import unpack_map
from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.teacher import TeacherCard
from schemas.manifest import Manifest
from schemas.tables import IMAGES, REJECTS
from workflows.codebook_sample import sample, sampled_shards
from workflows.commits import Table
from workflows.depth import DepthWorker
from workflows.folders import publish
from workflows.shards import ShardResult, Work, rejects_table
from workflows.store import OtherInputsError, Root, open_root
from workflows.teacher_maps import CONVENTION, MapSource
from workflows.tokenize_depth import CodecWorker, ImageCodecWorker, require_kin

SIZES = [(45, 70), (70, 45), (3, 400), (48, 48)] * 4  # the third has no map


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """The workers set torch's threads for their process; this one goes on."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return depth_anything(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A root with a shard of images, recorded depth with most of them, and a random codebook."""
    root = open_root(str(tmp_path_factory.mktemp("root")))
    millimetres = [np.random.default_rng(i).integers(500, 9000, (40, 30)).astype(np.uint16) for i in range(16)]
    rows = [
        {
            "id": f"{i:016x}", "uri": f"{i}.png", "image": encode_png(rgb), "width": rgb.shape[1],
            "height": rgb.shape[0], "turns": [], "masks": [], "boxes": [],
            "recorded_depth": None if i % 5 == 0 else encode_depth16(millimetres[i]),
        }
        for i, rgb in enumerate(images(*SIZES))
    ]  # fmt: skip
    put(Table(root, "images", "photos"), {}, ShardResult(IMAGES.empty_table().from_pylist(rows, schema=IMAGES), 16))
    torch.manual_seed(0)
    codebook = DepthCodebook(CodebookConfig(image_size=32, codes=8, dim=8, channels=(8, 8, 8), residual_blocks=1))
    with torch.no_grad():
        codebook(torch.rand(16, 32, 32))  # k-means sets the codes
    folder = tmp_path_factory.mktemp("codebook")
    codebook.save_pretrained(folder)
    publish(root, folder, "codebook", stage="codebook", attempt="a", recipe="r", code="c")
    return root


def put(table: Table, inputs: dict[str, str], made: ShardResult) -> Manifest:
    """A table of one shard."""
    rejects = rejects_table(table, 0, made.rejects) if made.rejects else REJECTS.empty_table()
    commit = table.commit(0, "a", made.table, rejects, made.read, inputs=inputs)
    return table.finish({0: commit}, attempt="a", recipe="r", code="c")


def both_ways(root: Root, source: MapSource) -> tuple[ShardResult, ShardResult, ShardResult]:
    """What `depth` makes, what `tokenize` makes of that, and what it makes straight from the images."""
    images, depth = Table(root, "images", "photos"), Table(root, "depth", "photos")
    content = {"images": images.require().shards[0].content}
    maps = DepthWorker(source).process(Work(depth, images, 0, content))
    depth.root.fs.rm(root.at("depth"), recursive=True) if depth.root.fs.exists(root.at("depth")) else None
    made = put(depth, content, maps)
    codes = Table(root, "codes", "photos")
    stored = CodecWorker(root.uri, 3, 1).process(Work(codes, depth, 0, {"depth": made.shards[0].content}))
    fused = ImageCodecWorker(root.uri, 3, 1, source).process(Work(codes, images, 0, content))
    return maps, stored, fused


def test_codes_from_images_are_those_of_stored_maps_bit_for_bit(root: Root, teacher: Path) -> None:
    source = MapSource(str(teacher), TeacherCard.read(teacher).digest, "float32", 4, 1)
    maps, stored, fused = both_ways(root, source)
    assert (stored.read, fused.read) == (12, 16)
    assert fused.table.equals(stored.table) and fused.table.num_rows == 12
    assert len({tuple(codes) for codes in fused.table["codes"].to_pylist()}) > 1
    assert fused.rejects == maps.rejects
    assert [reject.row for reject in fused.rejects] == [2, 6, 10, 14]
    assert unpack_map(fused.table["depth_target"][0].as_py()).shape == (32, 32)


def test_recorded_depth_goes_the_same_two_ways(root: Root) -> None:
    maps, stored, fused = both_ways(root, MapSource("recorded", "recorded", "float32", 4, 1))
    assert fused.table.equals(stored.table) and fused.table.num_rows == 12
    assert fused.rejects == maps.rejects
    assert {reject.reason.value for reject in fused.rejects} == {"no_recorded_depth"}


def test_a_codebook_for_another_teacher_or_convention_is_refused() -> None:
    made = Manifest(
        stage="codebook", attempt="a", recipe="r", code="c", digest="d",
        inputs={"teacher": "one"}, extra={"convention": CONVENTION},
    )  # fmt: skip
    require_kin(made, "depth/photos", {"teacher": "one", "convention": CONVENTION})
    with pytest.raises(OtherInputsError, match="made for teacher 'one', but depth/photos has 'two'"):
        require_kin(made, "depth/photos", {"teacher": "two", "convention": CONVENTION})
    with pytest.raises(OtherInputsError, match=r"made for convention 'inv_depth.*but the recipe's depth has 'metres'"):
        require_kin(made, "the recipe's depth", {"teacher": "one", "convention": "metres"})


def counted(source: str, shards: int, rows: int) -> Manifest:
    """A manifest of shards that lost some rows on the way, the last one all of them."""
    kept = [rows - number % 3 for number in range(shards - 1)] + [0]
    commits = [
        {"shard": number, "attempt": "a", "read": n, "kept": n, "rejected": 0, "reasons": {}, "content": f"{number}",
         "data": None, "rejects": None}
        for number, n in enumerate(kept)
    ]  # fmt: skip
    fields = {"stage": "ingest", "source": source, "attempt": "a", "recipe": "r", "code": "c", "digest": "d"}
    return Manifest.model_validate(fields | {"read": sum(kept), "kept": sum(kept), "shards": commits})


@pytest.mark.parametrize("rows", [1, 95, 300, 10_000])
def test_the_shards_with_maps_are_all_that_the_codebook_samples(rows: int) -> None:
    images = {name: counted(name, 12, 20) for name in ("one", "two")}
    chosen = sampled_shards(images, rows, seed=3, rejects=0.1)
    depth = {name: images[name].model_copy(update={"shards": some(images[name], chosen[name])}) for name in images}
    assert sample(depth, rows, seed=3) == sample(images, rows, seed=3)
    assert rows != 95 or sum(map(len, chosen.values())) == 6  # of 18 to 20 rows, and a tenth may be refused


def some(manifest: Manifest, shards: set[int]) -> tuple[object, ...]:
    return tuple(commit for commit in manifest.shards if commit.shard in shards)


def test_shards_that_are_added_later_leave_the_order_of_the_others_as_it_was() -> None:
    before = {name: counted(name, 12, 20) for name in ("one", "two")}
    after = {name: counted(name, 20, 20) for name in ("one", "two", "three")}
    order = [(part.source, part.shard) for part in sample(before, 10_000, seed=3)]
    grown = [(part.source, part.shard) for part in sample(after, 10_000, seed=3)]
    assert [part for part in grown if part in order] == order and len(grown) > len(order) == 22
    assert order != [(part.source, part.shard) for part in sample(before, 10_000, seed=4)]
