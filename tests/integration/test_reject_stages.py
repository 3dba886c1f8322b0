"""What depth, masks and assemble refuse, row by row; and random damage to all of it: nothing raises, no row is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import recipe_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from test_rejects import JPEG, MASK, PNG, TURN, WEBP, encoded, noise

from perceptio.data.images import encode_depth16
from perceptio.depth.teacher import DepthTeacher
from perceptio.segmentation.sam2_image import Sam2ImageConfig, Sam2ImageModel
from perceptio.sources.record import Found, Item, Refused, RowError, record_of, refused
from schemas.tables import CODES, IMAGES, LISTING, REJECTS, Reason
from workflows.assemble import JoinWorker
from workflows.commits import Table
from workflows.depth import DepthWorker
from workflows.ingest import IngestWorker, image_id
from workflows.masks import MaskWorker
from workflows.shards import ShardResult, ShardWorker, Work, rejects_table
from workflows.store import Root, open_root
from workflows.teacher_maps import RECORDED, MapSource, TeacherMaps

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SLOW = settings(QUICK, max_examples=8)
BOX = {"x0": 5.0, "y0": 5.0, "x1": 30.0, "y1": 30.0}


@dataclass
class Given:
    """A reader of rows that a test gives, one an item."""

    rows: list[Found | Refused]

    def items(self) -> Iterator[Item]:
        return (Item(f"row/{number}") for number in range(len(self.rows)))

    def read(self, item: Item) -> Iterator[Found | Refused]:
        return iter([self.rows[int(item.uri.removeprefix("row/"))]])


@dataclass
class Shards:
    """Tables under a root that get one more shard with each call."""

    root: Root
    count: int = 0

    def process(self, worker: ShardWorker, over: str, rows: list[dict[str, Any]], name: str) -> ShardResult:
        """What a worker makes of these rows; they are balanced, can be stored, and are all accounted for."""
        made_from, table = Table(self.root, over, "given"), Table(self.root, name, "given")
        schema = {"listing": LISTING, "images": IMAGES}[over]
        shard, self.count = self.count, self.count + 1
        rows_T = pa.Table.from_pylist(rows, schema=schema)
        commit = made_from.commit(shard, "a", rows_T, REJECTS.empty_table(), len(rows))
        made = worker.process(Work(table, made_from, shard, {over: commit.content}))
        done = table.commit(shard, "a", made.table, rejects_table(table, shard, made.rejects), made.read)
        assert done.read == done.kept + done.rejected == len(rows)
        assert all(reject.message for reject in made.rejects)
        return made

    def ingest(self, worker: IngestWorker, rows: list[Found | Refused]) -> ShardResult:
        reader = Given(rows)
        worker.readers["given"] = reader
        listing = [
            {
                "id": item.id,
                "uri": item.uri,
                "first": 0,
                "rows": 1,
                "size": -1,
                "record": "",
                "reason": "",
                "message": "",
            }
            for item in reader.items()
        ]
        return self.process(worker, "listing", listing, "images")


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(open_root(str(tmp_path / "root")))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> IngestWorker:
    folder = tmp_path_factory.mktemp("photos")
    source = {"name": "given", "format": "folder", "path": str(folder)}
    return IngestWorker(recipe_of(folder / "root", [source]).model_dump_json())


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam2")
    config = Sam2ImageConfig(image_size=64, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    Sam2ImageModel(config).save_pretrained(folder)
    return folder


def found(data: bytes, record: str = "", depth: bytes | None = None, uri: str = "bad.png") -> Found:
    return Found(uri, data, record_of(record), depth)


def between(*bad: Found | Refused) -> list[Found | Refused]:
    """The rows between two good ones."""
    record = json.dumps({"turns": [TURN], "masks": [MASK]})
    depth = encode_depth16(np.arange(2400, dtype=np.uint16).reshape(40, 60) + 1000)
    first, last = (found(encoded(noise(n), "PNG"), record, depth, f"good{n}.png") for n in (0, 1))
    return [first, *bad, last]


def image_row(data: bytes, height: int, width: int, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(IMAGES.names) | {"id": image_id(data), "uri": "x.png", "image": data, "turns": []}
    return row | {"height": height, "width": width, "masks": [], "boxes": [], "clicks": []} | more


def picture(seed: int, height: int = 40, width: int = 60, **more: Any) -> dict[str, Any]:
    return image_row(encoded(noise(seed, height, width), "PNG"), height, width, **more)


def millimetres(values: Any) -> bytes:
    return encode_depth16(np.asarray(values, np.uint16))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (b"", "cannot be read"),
        (b"no picture", "cannot be read"),
        (millimetres(noise(0)[..., 0])[:-30], "cannot be read"),
        (encoded(noise(0)[..., 0], "PNG"), "expected 16-bit grey"),
        (millimetres(noise(0)[:20, :, 0]), "map is 20 x 60"),
        (millimetres(noise(0)[..., 0].T), "map is 60 x 40"),
    ],
)
def test_a_recorded_depth_that_is_no_map_of_the_image_is_refused(
    shards: Shards, worker: IngestWorker, depth: bytes, message: str
) -> None:
    made = shards.ingest(worker, between(found(PNG, depth=depth)))
    (reject,) = made.rejects
    assert reject.reason is Reason.BAD_RECORD and f"recorded depth: {message}"[:14] in reject.message
    assert message in reject.message and reject.row == 1 and made.table.num_rows == 2


def test_recorded_depth_that_says_nothing_is_refused_and_its_neighbours_are_kept(shards: Shards) -> None:
    slope = millimetres(np.arange(2400).reshape(40, 60) + 1000)
    depths = [slope, None, millimetres(np.full((40, 60), 700)), millimetres(np.zeros((40, 60))), slope]
    rows = [picture(seed, recorded_depth=depth) for seed, depth in enumerate(depths)]
    made = shards.process(DepthWorker(MapSource(RECORDED, RECORDED, "float32", 4, 1)), "images", rows, "depth")
    found = [(reject.row, reject.reason) for reject in made.rejects]
    assert found == [(1, Reason.NO_RECORDED_DEPTH), (2, Reason.CONSTANT_DEPTH), (3, Reason.CONSTANT_DEPTH)]
    assert made.table["id"].to_pylist() == [rows[0]["id"], rows[4]["id"]]


def taught(teacher: Path, batch_size: int) -> DepthWorker:
    digest = DepthTeacher.from_pretrained(teacher).digest
    return DepthWorker(MapSource(str(teacher), digest, "float32", batch_size, 1))


def poisoned(worker: DepthWorker, poison: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The model's answer to black images is poisoned, all others are its own."""
    black: list[torch.Tensor] = []
    assert isinstance(worker.maps, TeacherMaps)
    model = worker.maps.teacher.model
    model.register_forward_pre_hook(
        lambda _, __, inputs: black.append(inputs["pixel_values"].std((1, 2, 3)) < 0.2), with_kwargs=True
    )

    def change(_: Any, __: Any, outputs: Any) -> Any:
        outputs.predicted_depth[black[-1]] = poison(outputs.predicted_depth[black[-1]])
        return outputs

    model.register_forward_hook(change)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), Reason.NOT_FINITE_DEPTH),
        (float("inf"), Reason.NOT_FINITE_DEPTH),
        (0.0, Reason.CONSTANT_DEPTH),
        (7.5, Reason.CONSTANT_DEPTH),
    ],
)
def test_a_teacher_without_an_answer_costs_only_that_image(
    shards: Shards, teacher: Path, value: float, reason: Reason
) -> None:
    black = encoded(np.zeros((40, 60, 3), np.uint8), "PNG")
    rows = [picture(0), image_row(black, 40, 60), picture(1), picture(2)]
    worker = taught(teacher, 4)
    poisoned(worker, lambda depth: torch.full_like(depth, value))
    made = shards.process(worker, "images", rows, "depth")
    assert [(reject.row, reject.reason, reject.uri) for reject in made.rejects] == [(1, reason, "x.png")]
    assert made.table["id"].to_pylist() == [rows[n]["id"] for n in (0, 2, 3)]


def test_an_image_too_narrow_for_the_teacher_is_refused(shards: Shards, teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"keep_aspect_ratio": True}))
    rows = [picture(0), picture(1, 3, 400), picture(2)]
    made = shards.process(taught(folder, 4), "images", rows, "depth")
    assert [(reject.row, reject.reason) for reject in made.rejects] == [(1, Reason.TOO_SMALL)]
    assert made.table.num_rows == 2


def test_poor_masks_are_refused_and_recorded_ones_pass(shards: Shards, sam2: Path) -> None:
    rows = [picture(0, masks=[MASK]), picture(1, boxes=[BOX]), picture(2)]
    made = shards.process(MaskWorker(str(sam2), 1.0, 1.0, 1), "images", rows, "masks")
    (reject,) = made.rejects
    assert (reject.row, reject.reason) == (1, Reason.LOW_MASK_QUALITY) and "min_predicted_iou 1" in reject.message
    assert made.table["id"].to_pylist() == [rows[0]["id"], rows[2]["id"]]


def test_what_was_refused_on_the_way_is_refused_by_assemble(shards: Shards) -> None:
    rows = [picture(seed) for seed in range(3)]
    root, inputs = shards.root, {}
    for name, schema, made in (
        ("images", IMAGES, rows),
        ("codes", CODES, [{"id": row["id"], "codes": [1], "depth_target": b""} for row in rows[::2]]),
    ):
        table = Table(root, name, "given")
        commit = table.commit(0, "a", pa.Table.from_pylist(made, schema=schema), REJECTS.empty_table(), len(made))
        inputs[name] = commit.content
    work = Work(Table(root, "samples", "given"), Table(root, "images", "given"), 0, inputs)
    made = JoinWorker().process(work)
    (reject,) = made.rejects
    assert (reject.row, reject.reason, reject.id) == (1, Reason.UPSTREAM_REJECT, rows[1]["id"])
    assert "not in codes" in reject.message and made.read == 3 and made.table.num_rows == 2


@st.composite
def damaged(draw: DrawFn) -> bytes:
    """A real file with bytes changed, cut out and put in."""
    data = bytearray(draw(st.sampled_from([PNG, JPEG, WEBP])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 200))
        match draw(st.sampled_from(["flip", "cut", "insert", "end"])):
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(max_size=length))
            case _:
                del data[at:]
    return bytes(data)


NUMBER = st.one_of(st.integers(-10, 70), st.floats(-10, 70), st.sampled_from([float("nan"), 1e300, -0.0, 10**30]))
COUNTS = st.one_of(st.text(max_size=8), st.just(MASK["counts"]), st.integers())
RLES = st.fixed_dictionaries({"height": st.one_of(st.just(40), NUMBER), "width": st.just(60), "counts": COUNTS})
TURNS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["referring", "count", ""]), "prompt": st.text(max_size=5), "answer": st.text(max_size=5)},
    optional={"objects": st.lists(st.integers(-1, 2), max_size=2), "expression": st.text(max_size=5), "form": NUMBER},
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "turns": st.lists(TURNS, max_size=2),
        "boxes": st.lists(st.lists(NUMBER, min_size=3, max_size=5), max_size=2),
        "masks": st.lists(RLES, max_size=2),
    },
)


def check_neighbours(made: ShardResult, rows: int) -> None:
    kept = made.table["uri"].to_pylist()
    assert kept[0] == "good0.png" and kept[-1] == "good1.png" and made.read == rows


@QUICK
@given(st.lists(st.one_of(damaged(), st.binary(max_size=60)), min_size=1, max_size=3))
def test_damaged_files_are_kept_or_refused(
    tmp_path_factory: pytest.TempPathFactory, worker: IngestWorker, files: list[bytes]
) -> None:
    shards = Shards(open_root(str(tmp_path_factory.mktemp("damaged"))))
    rows = between(*(found(data) for data in files))
    check_neighbours(shards.ingest(worker, rows), len(rows))


@QUICK
@given(RECORDS)
def test_strange_records_are_kept_or_refused(
    tmp_path_factory: pytest.TempPathFactory, worker: IngestWorker, record: dict[str, Any]
) -> None:
    shards = Shards(open_root(str(tmp_path_factory.mktemp("records"))))
    try:
        bad: Found | Refused = found(PNG, json.dumps(record))
    except RowError as error:
        bad = refused(error, "bad.png")
    check_neighbours(shards.ingest(worker, between(bad)), 3)


@QUICK
@given(st.binary(max_size=200))
def test_random_recorded_depth_is_kept_or_refused(
    tmp_path_factory: pytest.TempPathFactory, worker: IngestWorker, tail: bytes
) -> None:
    shards = Shards(open_root(str(tmp_path_factory.mktemp("depths"))))
    whole = millimetres(noise(3)[..., 0])
    rows = between(found(PNG, depth=tail), found(JPEG, depth=whole[: 8 + len(tail)] + tail), found(WEBP, depth=whole))
    made = shards.ingest(worker, rows)
    check_neighbours(made, 5)
    stored = shards.process(
        DepthWorker(MapSource(RECORDED, RECORDED, "float32", 4, 1)), "images", made.table.to_pylist(), "depth"
    )
    assert stored.table["id"].to_pylist()[0] == made.table["id"].to_pylist()[0]


@SLOW
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 3)), max_size=5))
def test_images_of_any_size_get_a_map_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, sizes: list[tuple[int, int, int]]
) -> None:
    shards = Shards(open_root(str(tmp_path_factory.mktemp("sizes"))))
    odd = [picture(seed, height, width) for height, width, seed in sizes]
    rows = list({row["id"]: row for row in [picture(90), *odd, picture(91)]}.values())
    made = shards.process(taught(teacher, 3), "images", rows, "depth")
    assert {rows[0]["id"], rows[-1]["id"]} <= set(made.table["id"].to_pylist())


@SLOW
@given(st.lists(st.tuples(*[st.floats(-1, 62)] * 4), min_size=1, max_size=3))
def test_boxes_that_ingest_lets_through_get_masks(
    tmp_path_factory: pytest.TempPathFactory, worker: IngestWorker, sam2: Path, boxes: list[tuple[float, ...]]
) -> None:
    shards = Shards(open_root(str(tmp_path_factory.mktemp("boxes"))))
    corners = [(sorted(box[::2]), sorted(box[1::2])) for box in boxes]
    record = json.dumps({"boxes": [[x0, y0, x1, y1] for (x0, x1), (y0, y1) in corners]})
    made = shards.ingest(worker, between(found(PNG, json.dumps({"boxes": [[0, 0, 60.5, 40.5]]})), found(JPEG, record)))
    rows = made.table.to_pylist()
    drawn = shards.process(MaskWorker(str(sam2), 0.0, 0.0, 1), "images", rows, "masks")
    assert drawn.table.num_rows == len(rows) >= 3 and not drawn.rejects
