"""The commit protocol on S3: a real server process, a network that fails in every way, the digests of a local disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import pyarrow as pa
import pytest
import s3fs
from conftest import recipe_of, rooms
from s3_server import BUCKET, KINDS, Faults, FaultyProxy, s3_server

from perceptio.data import store as requests
from perceptio.data.store import StoreError, filesystem, read_bytes
from schemas.manifest import Manifest
from schemas.tables import CODES, REJECTS, Reason
from workflows import doctor, store
from workflows.commits import Table
from workflows.store import Root, StageError, open_root
from workflows.verify import problems_of

ROWS, SHARDS = 4, 3
READ_SECONDS = 0.5  # of the client, below the proxy's stalls
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
    # without botocore's own retries, whose waits are long, every fault reaches ours
    config = {"read_timeout": READ_SECONDS, "retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": config})
    monkeypatch.setattr(requests, "FIRST_WAIT", 0.02)
    yield start
    s3fs.S3FileSystem.clear_instance_cache()
    for proxy in opened:
        proxy.__exit__()


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    """A root of this test's own."""
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


def rows(shard: int) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"id": f"{1000 * shard + i:016x}", "codes": [i, shard], "depth_target": b"x" * i, "reconstruction_mae": 0.5}
            for i in range(ROWS)
        ],
        schema=CODES,
    )


def rejects(shard: int) -> pa.Table:
    where = {"stage": "tokenize", "source": "rooms", "shard": shard, "row": ROWS, "id": "", "uri": "0.png"}
    row = {**where, "reason": Reason.TRUNCATED_IMAGE.value, "message": "cut off"}
    return pa.Table.from_pylist([row], schema=REJECTS)


def fill(table: Table) -> Manifest:
    """Every shard by a first attempt, every second one by another attempt that comes too late, then the manifest."""
    table.plan({"source": "aaa"})
    for shard in range(SHARDS):
        first = table.commit(shard, "first", rows(shard), rejects(shard), ROWS + 1)
        assert first.attempt == "first"
        if shard % 2:
            assert table.commit(shard, "second", rows(shard), rejects(shard), ROWS + 1) == first
    assert table.find(SHARDS) is None
    assert sorted(table.committed()) == list(range(SHARDS))
    assert all(table.read_shard(shard).equals(rows(shard)) for shard in range(SHARDS))
    return table.finish(table.committed(), attempt="first", recipe="r", code="c", inputs={"source": "aaa"})


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return fill(Table(open_root(str(tmp_path_factory.mktemp("disk"))), "codes", "rooms"))


def parts(root: Root) -> list[str]:
    return sorted(name for name in root.fs.find(root.path) if "part-" in name)


def test_s3_holds_what_a_local_disk_does(proxied: Proxied, uri: str, on_disk: Manifest) -> None:
    proxy = proxied(Faults())
    table = Table(open_root(uri), "codes", "rooms")
    made = fill(table)
    assert made.digest == on_disk.digest and made.shards == on_disk.shards
    assert problems_of(table) == [] and table.unnamed() == []
    assert proxy.requests.total() > SHARDS and proxy.injected.total() == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_leaves_the_same_table(
    proxied: Proxied, uri: str, on_disk: Manifest, kind: str, seed: int
) -> None:
    proxy = proxied(Faults(rate=0.25, seed=seed, kinds=(kind,), stall=3 * READ_SECONDS))
    table = Table(open_root(uri), "codes", "rooms")
    made = fill(table)
    assert made.digest == on_disk.digest and made.shards == on_disk.shards
    assert problems_of(table) == [] and table.unnamed() == []
    assert proxy.injected[kind] >= 3, proxy.injected
    print(kind, seed, dict(proxy.injected), "of", proxy.requests.total())


@pytest.mark.parametrize("seed", range(3))
def test_of_many_attempts_at_once_under_all_faults_exactly_one_wins(proxied: Proxied, uri: str, seed: int) -> None:
    proxy = proxied(Faults(rate=0.3, seed=seed, stall=3 * READ_SECONDS))
    root, won = open_root(uri), []
    gate = threading.Barrier(8)

    def attempt(name: str) -> None:
        gate.wait()
        table = Table(root, "codes", "rooms")
        won.append([table.commit(shard, name, rows(shard), rejects(shard), ROWS + 1).attempt for shard in range(3)])

    threads = [threading.Thread(target=attempt, args=(f"attempt{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(proxy.injected[kind] for kind in KINDS) and proxy.injected["lost_answer"], proxy.injected
    print(seed, dict(proxy.injected), "of", proxy.requests.total())
    proxy.faults = Faults()
    table = Table(root, "codes", "rooms")
    names = [commit.attempt for _, commit in sorted(table.committed().items())]
    assert len(won) == 8 and all(seen == names for seen in won)
    assert table.unnamed() == [] and len(parts(root)) == 6


@pytest.mark.parametrize("kind", ["internal_error", "slow_down", "timeout", "reset"])
def test_a_create_whose_answers_were_lost_knows_its_own_file(proxied: Proxied, uri: str, kind: str) -> None:
    lost = 0
    for seed in range(3):
        faults = Faults(rate=1, seed=seed, kinds=(kind,), most_in_a_row=2, stall=2 * READ_SECONDS, only="PUT")
        proxy = proxied(faults)
        root = open_root(uri)
        assert root.create(b"ours", f"marker-{seed}")
        assert not root.create(b"theirs", f"marker-{seed}")
        assert root.create(b"ours", f"marker-{seed}")
        assert root.read(f"marker-{seed}") == b"ours"
        assert proxy.injected[kind] == 6
        lost += proxy.injected["lost_answer"]
    assert lost >= 3


def test_botocores_own_retries_are_set_and_used(proxied: Proxied, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(fsspec.config.conf, "s3")
    monkeypatch.setattr(requests, "ATTEMPTS", 1)
    proxy = proxied(Faults(rate=1, kinds=("internal_error",), most_in_a_row=requests.REQUEST_TRIES - 1, only="PUT"))
    assert open_root(uri).create(b"ours", "marker")
    assert proxy.requests["PUT"] == requests.REQUEST_TRIES and proxy.injected["internal_error"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_is_whole_or_an_error_that_says_what_to_do(
    proxied: Proxied, uri: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    proxy = proxied(Faults())
    root, data = open_root(uri), bytes(range(256)) * 400
    root.write(data, "file")
    proxy.faults = Faults(rate=1, kinds=(kind,), most_in_a_row=5, stall=2 * READ_SECONDS, only="GET")
    assert root.read("file") == data
    fs, path = filesystem(f"{uri}/file")
    assert read_bytes(fs, path) == data
    assert proxy.injected[kind] == 10
    monkeypatch.setattr(requests, "ATTEMPTS", 2)
    proxy.faults = replace(proxy.faults, most_in_a_row=10**6)
    with pytest.raises(StageError, match=rf"reading {uri}/file: the store failed 2 times in a row.*run it again"):
        root.read("file")
    with pytest.raises(StoreError, match=rf"reading {uri}/file: the store failed 2 times in a row.*AWS_ENDPOINT_URL"):
        read_bytes(fs, path)


def test_an_object_of_many_parts_survives_lost_answers(
    proxied: Proxied, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the end of an upload may be lost: repeated, S3 no longer knows the upload."""
    monkeypatch.setattr(store, "PART_BYTES", 5 * 2**20)
    data = bytes(range(256)) * (12 * 2**20 // 256)
    lost = 0
    for seed in range(3):
        end_of_upload = f"POST /{uri[5:]}/large-{seed}?uploadId"
        proxy = proxied(
            Faults(rate=1, seed=seed, kinds=("internal_error", "reset"), most_in_a_row=2, only=end_of_upload)
        )
        root = open_root(uri)
        root.write(data, f"large-{seed}")
        assert root.read(f"large-{seed}") == data
        assert proxy.injected["internal_error"] + proxy.injected["reset"] == 2
        lost += proxy.injected["lost_answer"]
    assert lost >= 1


def test_what_is_not_there_or_not_allowed_is_not_tried_again(proxied: Proxied, uri: str) -> None:
    proxy = proxied(Faults())
    root = open_root(uri)
    assert root.read("nothing") is None and proxy.requests.total() == 1
    assert root.files("nothing") == [] and not root.exists("nothing")
    root.delete("nothing")
    with pytest.raises(StageError, match=r"writing s3://another/file: NoSuchBucket.*see that the bucket exists"):
        open_root("s3://another").write(b"", "file")


def test_wrong_keys_are_no_missing_file(proxied: Proxied, uri: str) -> None:
    """s3fs calls them a PermissionError, as if another file could be read: rows would be refused for it."""
    proxy = proxied(Faults())
    root = open_root(uri)
    root.write(b"data", "file")
    proxy.faults = Faults(rate=1, kinds=("expired_token",), most_in_a_row=10**6)
    fs, path = filesystem(f"{uri}/file")
    with pytest.raises(StoreError, match=r"ExpiredToken.*see that .*keys"):
        read_bytes(fs, path)
    proxy.faults = Faults(rate=1, kinds=("access_denied",), most_in_a_row=10**6)
    with pytest.raises(PermissionError):
        read_bytes(fs, path)
    with pytest.raises(StageError, match=rf"reading {uri}/file: refused .*right"):
        root.read("file")
    assert proxy.injected["access_denied"] == 2


def test_a_store_that_does_not_name_the_condition_still_refuses(proxied: Proxied, uri: str) -> None:
    """Some stores leave out which condition failed, of which s3fs makes an invalid argument."""
    proxy = proxied(Faults(kinds=("unnamed_condition",), rate=1, most_in_a_row=1, only="PUT"))
    root = open_root(uri)
    assert not root.create(b"theirs", "file")
    assert proxy.injected["unnamed_condition"] == 1
    assert root.create(b"ours", "file") and not root.create(b"theirs", "file")


def test_writers_that_collide_try_again(proxied: Proxied, uri: str) -> None:
    """S3 answers 409 where two conditional writes meet."""
    proxy = proxied(Faults(kinds=("conflict",), rate=1, most_in_a_row=2, only="PUT"))
    assert open_root(uri).create(b"ours", "file")
    assert proxy.injected["conflict"] == 2


def test_many_small_files_are_read_listed_and_deleted(proxied: Proxied, uri: str) -> None:
    proxy = proxied(Faults(rate=0.05, seed=1, stall=2 * READ_SECONDS))
    root = open_root(uri)
    names = [f"{i:06d}.json" for i in range(40)]
    for name in names:
        root.write(name.encode(), "markers", name)
    paths = [f"markers/{name}" for name in [*names, "none.json"]]
    assert root.read_many(paths) == {path: path[8:].encode() if path != "markers/none.json" else None for path in paths}
    assert root.files("markers") == names and root.exists(paths[0])
    root.delete_many(paths)
    assert root.files("markers") == [] and not root.exists(paths[0])
    assert proxy.injected.total() >= 3


def test_a_listing_goes_over_all_its_pages(proxied: Proxied, uri: str) -> None:
    proxied(Faults())
    root = open_root(uri)
    names = [f"{i:06d}" for i in range(1005)]  # S3 gives 1,000 at a time
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: root.write(b"", "many", name), names))
    assert root.files("many") == names


def test_a_file_that_another_wrote_after_a_listing_is_seen(proxied: Proxied, uri: str) -> None:
    proxied(Faults())
    root, other = open_root(uri), s3fs.S3FileSystem(skip_instance_cache=True)
    root.write(b"1", "folder", "first")
    assert root.files("folder") == ["first"]
    other.pipe_file(root.at("folder", "second"), b"2")
    assert root.read("folder", "second") == b"2" and root.exists("folder", "second")
    assert root.files("folder") == ["first", "second"]


def test_a_store_that_ignores_exclusive_create_is_refused_by_the_first_commit_and_by_doctor(
    proxied: Proxied, uri: str
) -> None:
    proxied(Faults())
    root = open_root(uri)
    root.require_exclusive_create("codes", "rooms")
    assert root.files("codes", "rooms") == []
    proxied(Faults(drop_if_none_match=True))
    root = open_root(uri)
    with pytest.raises(StageError, match=rf"{uri}: the store replaced a file.*If-None-Match"):
        Table(root, "codes", "rooms").plan({"source": "aaa"})
    assert root.fs.find(root.path) == []
    with pytest.raises(StageError, match="If-None-Match"):
        doctor._store(recipe_of(uri, [rooms()]))


@pytest.mark.parametrize("seed", range(3))
def test_the_probe_for_exclusive_create_is_right_under_faults(proxied: Proxied, uri: str, seed: int) -> None:
    faults = Faults(rate=0.5, seed=seed, stall=2 * READ_SECONDS)
    honest = proxied(faults)
    root = open_root(uri)
    for _ in range(50):  # each probe has a name, and with it faults, of its own
        root.require_exclusive_create("codes")
        if honest.injected.total() >= 3:
            break
    assert honest.injected.total() >= 3 and root.files("codes") == []
    proxied(replace(faults, drop_if_none_match=True))
    with pytest.raises(StageError, match="If-None-Match"):
        open_root(uri).require_exclusive_create("codes")


def test_the_probe_takes_two_writes_and_a_deletion(proxied: Proxied, uri: str) -> None:
    proxy = proxied(Faults())
    open_root(uri).require_exclusive_create()
    assert proxy.requests == {"PUT": 2, "DELETE": 1}


DAMAGE = {
    "deleted": ("is missing", lambda data: None),
    "truncated": ("was changed", lambda data: data[:-7]),
    "flipped": ("was changed", lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_damage_on_s3(proxied: Proxied, uri: str, damage: str) -> None:
    proxied(Faults())
    table = Table(open_root(uri), "codes", "rooms")
    fill(table)
    named, spoil = DAMAGE[damage]
    place = ("codes", "rooms", "part-000001-first.parquet")
    spoilt = spoil(table.root.read(*place) or b"")
    table.root.delete(*place)
    if spoilt is not None:
        table.root.write(spoilt, *place)
    assert any(named in problem for problem in problems_of(table))
