"""A shard's batches are full, of one shape, and depend on the shard alone; every row gets its map or its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_depth_teacher_pipelines import depth_anything, images

from perceptio.data.images import ImageError, encode_depth16, encode_png
from perceptio.depth.teacher import DepthTeacher, Prepared, TeacherMap, inv_depth_from_metric
from schemas.tables import Reason
from workflows.shards import Reject
from workflows.store import OtherInputsError
from workflows.teacher_maps import MapSource, RecordedMaps, TeacherMaps, batches, mapped

KINDS = st.lists(st.sampled_from("abc"), max_size=60)


def grouped(kinds: list[str], size: int, waiting: int) -> list[list[tuple[int, str]]]:
    return list(batches(enumerate(kinds), lambda kind: kind, size, waiting))


@given(KINDS, st.integers(1, 7), st.integers(1, 30))
def test_every_item_comes_once_in_a_batch_of_its_kind(kinds: list[str], size: int, waiting: int) -> None:
    found = grouped(kinds, size, waiting)
    assert sorted(number for batch in found for number, _ in batch) == list(range(len(kinds)))
    for batch in found:
        assert len({kind for _, kind in batch}) == 1 and len(batch) <= size
        assert [number for number, _ in batch] == sorted(number for number, _ in batch)
        assert batch[-1][0] - batch[0][0] <= waiting


@given(KINDS, st.integers(1, 7), st.integers(1, 30))
def test_no_item_waits_longer_than_it_may(kinds: list[str], size: int, waiting: int) -> None:
    taken = 0

    def counted() -> object:
        nonlocal taken
        for number, kind in enumerate(kinds):
            taken = number
            yield number, kind

    for batch in batches(counted(), lambda kind: kind, size, waiting):  # type: ignore[arg-type]
        assert taken - batch[0][0] <= waiting


def test_batches_are_full_but_for_those_that_wait_too_long_and_the_last() -> None:
    assert [len(batch) for batch in grouped(["a", "b"] * 8, 4, 100)] == [4, 4, 4, 4]
    found = grouped(["b", *["a"] * 9], 3, 5)
    assert ["".join(kind for _, kind in batch) for batch in found] == ["aaa", "b", "aaa", "aaa"]
    assert [len(batch) for batch in grouped(["a"] * 7, 4, 100)] == [4, 3]


def column(pictures: list[npt.NDArray[np.uint8]]) -> pa.Table:
    rows = [{"id": f"{i:016x}", "uri": f"{i}.png", "image": encode_png(rgb)} for i, rgb in enumerate(pictures)]
    return pa.Table.from_pylist(rows, schema=pa.schema({"id": pa.string(), "uri": pa.string(), "image": pa.binary()}))


def same(found: TeacherMap) -> TeacherMap:
    return found


class Watched(DepthTeacher):
    """A teacher that remembers its batches."""

    seen: list[list[tuple[int, ...]]]

    def predict(self, batch: list[Prepared]) -> list[npt.NDArray[np.float32]]:  # type: ignore[override]
        self.seen.append([each.shape for each in batch])
        return super().predict(batch)


def test_mixed_sizes_run_in_full_batches_and_come_back_in_order(tmp_path: Path) -> None:
    teacher = Watched.from_pretrained(depth_anything(tmp_path))
    assert isinstance(teacher, Watched)
    teacher.seen = []
    pictures = images(*[(45, 70), (70, 45), (48, 48)] * 4)
    found = list(mapped(TeacherMaps(teacher, batch_size=4, threads=1), column(pictures), same))
    assert [len(set(shapes)) for shapes in teacher.seen] == [1, 1, 1]
    assert [len(shapes) for shapes in teacher.seen] == [4, 4, 4]
    for group in ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]):
        for i, want in zip(group, teacher([pictures[i] for i in group]), strict=True):
            made = found[i]
            assert isinstance(made, TeacherMap) and isinstance(want, TeacherMap)
            assert (made.inv_depth_HW == want.inv_depth_HW).all()
            assert (made.raw_min, made.raw_max) == (want.raw_min, want.raw_max)


def test_the_same_shard_gives_the_same_bits_again(tmp_path: Path) -> None:
    teacher = DepthTeacher.from_pretrained(depth_anything(tmp_path))
    table = column(images(*[(45, 70), (70, 45), (48, 48), (45, 70)] * 3))
    runs = [list(mapped(TeacherMaps(teacher, 3, 1), table, lambda m: m.inv_depth_HW.tobytes())) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0])) == 12


def test_a_row_without_a_map_is_refused_in_its_place(tmp_path: Path) -> None:
    teacher = DepthTeacher.from_pretrained(depth_anything(tmp_path))
    pictures = images((45, 70), (3, 400), (45, 70), (3, 400), (3, 400))
    found = list(mapped(TeacherMaps(teacher, 2, 1), column(pictures), same))
    assert [isinstance(each, TeacherMap) for each in found] == [True, False, True, False, False]
    refused = found[1]
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.id, refused.uri) == (Reason.TOO_SMALL, f"{1:016x}", "1.png")
    assert list(mapped(TeacherMaps(teacher, 2, 1), column([]), same)) == []


def test_recorded_depth_comes_row_by_row_or_says_what_is_missing() -> None:
    millimetres = (np.arange(12, dtype=np.uint16).reshape(3, 4) + 1) * 500
    depths = [encode_depth16(millimetres), None, encode_depth16(np.full((3, 4), 900, np.uint16))]
    names = [f"{i:016x}" for i in range(3)]
    table = pa.table({"id": names, "uri": ["a", "b", "c"], "recorded_depth": pa.array(depths, pa.binary())})
    one, two, three = mapped(RecordedMaps(), table, same)
    assert isinstance(one, TeacherMap)
    assert (one.inv_depth_HW == inv_depth_from_metric(millimetres / 1000).inv_depth_HW).all()
    assert isinstance(two, Reject) and two.reason == Reason.NO_RECORDED_DEPTH
    assert isinstance(three, Reject) and three.reason == Reason.CONSTANT_DEPTH and three.uri == "c"


def test_an_actor_with_another_teacher_than_the_drivers_is_refused(tmp_path: Path) -> None:
    source = MapSource(str(depth_anything(tmp_path)), "0" * 64, "float32", 4, 1)
    with pytest.raises(OtherInputsError, match="the driver has 0000000000000000"):
        source.open()


def test_a_damaged_image_in_the_table_stops_the_shard(tmp_path: Path) -> None:
    table = column(images((45, 70)))
    broken = table.set_column(2, "image", pa.array([table["image"][0].as_py()[:500]], pa.binary()))
    with pytest.raises(ImageError, match="cannot be decoded"):
        list(mapped(TeacherMaps(DepthTeacher.from_pretrained(depth_anything(tmp_path)), 2, 1), broken, same))
