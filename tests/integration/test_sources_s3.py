"""Every format on S3, behind a network that fails in every way: the same rows in the same order as on a local disk."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from pydantic import TypeAdapter
from s3_server import BUCKET, KINDS, Faults, FaultyProxy, s3_server

from perceptio.data import store
from perceptio.sources.files import place_of, walk
from perceptio.sources.open import reader_of
from perceptio.sources.record import Found, Refused, SourceError
from schemas.sources import FileSource, RoomsSource, Source
from schemas.tables import Reason
from tests.sources import encoded, file_name, instances, jpeg, png, references, results, room, write, write_json

READ_SECONDS = 0.5  # of the client, below the proxy's stalls
ROOMS = (0, 1, 2)
TURN = {"kind": "vqa", "prompt": "q", "answer": "a"}
Proxied = Callable[[Faults], FaultyProxy]


@pytest.fixture(scope="module")
def local_ray() -> str:
    """No Ray: what is tested here needs none."""
    return ""


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxied(server_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    """A function that puts a proxy before the server and into the environment."""
    opened: list[FaultyProxy] = []

    def start(faults: Faults) -> FaultyProxy:
        proxy = FaultyProxy(server_port, faults).__enter__()
        opened.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # they keep the address that they were made with
        return proxy

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    config = {"read_timeout": READ_SECONDS, "retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    monkeypatch.setattr(store, "FIRST_WAIT", 0.02)
    yield start
    s3fs.S3FileSystem.clear_instance_cache()
    for proxy in opened:
        proxy.__exit__()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for index in ROOMS:
            for name, data in ((f"{index}.png", png(index)), (f"{index}.txt", b"a room")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def lay_out(folder: Path) -> None:
    """Every format once, from the same rooms, with a file or two missing."""
    for index in ROOMS:
        write(folder / "train2014" / file_name(index), jpeg(index))
        write(folder / "rgbd" / "images" / f"{index}.jpg", jpeg(index))
        depth_HW = np.rint(room(index).depth_HW * 5000).astype(np.uint16)
        write(folder / "rgbd" / "depth" / f"{index}.png", encoded(depth_HW, "PNG"))
    write(folder / "rgbd" / "images" / "lonely.jpg", jpeg(0))
    for name, index in (("b/2.png", 2), ("b-a.png", 1), ("a b#ü.png", 0), ("b.png", 2)):
        write(folder / "plain" / name, png(index))
    lines = [{"image": "b/2.png", "turns": [TURN]}, {"image": "gone.png"}]
    write(folder / "plain" / "records.jsonl", "\n".join(map(json.dumps, lines)).encode())
    write(folder / "refcoco" / "refs(unc).p", pickle.dumps(references(ROOMS), 2))
    write_json(folder / "refcoco" / "instances.json", instances(ROOMS))
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    names = [file_name(index) for index in ROOMS] + ["gone.jpg"]
    write_json(folder / "llava.json", [{"id": name, "image": name, "conversations": talk} for name in names])
    write(folder / "shards" / "s-0.tar", tar())
    write(folder / "shards" / "s-1.tar", tar()[:-5000])
    (folder / "hub").mkdir()
    images = pa.array([{"bytes": png(i), "path": None} for i in ROOMS] * 3)
    pq.write_table(pa.table({"image": images}), folder / "hub" / "a.parquet", row_group_size=4)
    write(folder / "list" / "list.txt", b"../plain/b.png\n../plain/gone.png\n")
    write(folder / "list" / "beside.png", png(0))


def sources(root: str) -> list[FileSource]:
    sections: list[dict[str, Any]] = [
        {"format": "folder", "path": f"{root}/plain"},
        {"format": "refcoco", "path": f"{root}/refcoco", "images": f"{root}/train2014"}
        | {"splits_by": "unc", "split": "train"},
        {
            "format": "coco",
            "path": f"{root}/refcoco/instances.json",
            "images": f"{root}/train2014",
            "turns": "category",
        },
        {"format": "llava", "path": f"{root}/llava.json", "images": f"{root}/train2014"},
        {"format": "parquet", "path": f"{root}/hub", "columns": {"image": "image"}, "rows_per_item": 3},
        {"format": "rgbd", "path": f"{root}/rgbd", "depth_scale": 5000},
        {"format": "webdataset", "path": f"{root}/shards"},
        {"format": "webdataset", "path": f"{root}/shards/s-{{0..2}}.tar"},
    ]
    adapter: TypeAdapter[Any] = TypeAdapter(Source)
    made = [adapter.validate_python({"name": "any", **section}) for section in sections]
    assert not any(isinstance(source, RoomsSource) for source in made)
    return made


def comparable(rows: list[Found | Refused], root: str) -> list[Any]:
    """What must be the same wherever the files lie."""
    return [
        (row.uri.removeprefix(root), row.data, row.record, row.recorded_depth)
        if isinstance(row, Found)
        else (row.uri.removeprefix(root), row.reason, row.message.replace(root, ""))
        for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sources")
    lay_out(made)
    return made


@pytest.fixture
def uploaded(folder: Path, proxied: Proxied) -> str:
    proxied(Faults())
    fs, path = store.filesystem(f"s3://{BUCKET}/sources")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder)}", file.read_bytes())
    return f"s3://{BUCKET}/sources"


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_every_format_gives_the_rows_of_a_local_disk(
    folder: Path, uploaded: str, proxied: Proxied, rate: float
) -> None:
    proxy = proxied(Faults(rate=rate, seed=3, stall=2 * READ_SECONDS))
    for here, there in zip(sources(str(folder)), sources(uploaded), strict=True):
        expected = comparable(results(reader_of(here)), str(folder))
        assert any(len(row) == 4 for row in expected)
        assert comparable(results(reader_of(there)), uploaded) == expected, here.format
    assert bool(rate) == bool(proxy.injected["truncated"]) == (sum(proxy.injected[kind] for kind in KINDS) > 10)


def test_files_are_listed_page_by_page_in_the_order_of_a_local_disk(
    folder: Path, uploaded: str, proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied(Faults())
    place = place_of(uploaded, "path")
    call, pages = place.fs.call_s3, []

    def small_pages(*arguments: Any, **more: Any) -> Any:
        pages.append(more)
        return call(*arguments, MaxKeys=4, **more)

    monkeypatch.setattr(place.fs, "call_s3", small_pages)
    assert list(walk(place)) == list(walk(place_of(str(folder), "path")))
    assert len(pages) > 4


def test_a_list_on_s3_names_files_beside_it_and_other_buckets(uploaded: str, proxied: Proxied) -> None:
    proxied(Faults())
    lines = ["beside.png", "/etc/hostname", "../plain/b.png", f"{uploaded}/plain/b.png", "s3://no-such-bucket/a.png"]
    fs, path = store.filesystem(f"{uploaded}/list/other.txt")
    fs.pipe_file(path, "\n".join(lines).encode())
    source = {"format": "list", "name": "list", "path": f"{uploaded}/list/other.txt"}
    rows = results(reader_of(TypeAdapter(Source).validate_python(source)))
    assert [row.data if isinstance(row, Found) else row.reason for row in rows] == [
        png(0), Reason.BAD_RECORD, Reason.BAD_RECORD, png(2), Reason.MISSING_FILE
    ]  # fmt: skip


def test_a_folder_that_is_not_there_is_named(proxied: Proxied) -> None:
    proxied(Faults())
    *without_pattern, _ = sources(f"s3://{BUCKET}/nothing")  # a pattern's shards are looked for when they are read
    for source in without_pattern:
        with pytest.raises(SourceError, match=r"sources.any.*s3://runs/nothing"):
            next(reader_of(source).items())
