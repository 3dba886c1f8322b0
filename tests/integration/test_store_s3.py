"""The commit protocol on S3: a real server process, a network that fails in every way, the digests of a local disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import fsspec
import pyarrow as pa
import pytest
import s3fs
from s3_server import BUCKET, KINDS, Faults, FaultyProxy, s3_server

from perceptio.data import store as requests
from schemas.manifest import Manifest
from schemas.tables import CODES, REJECTS, Reason
from workflows.commits import Table
from workflows.store import Root, open_root
from workflows.verify import problems_of

ROWS, SHARDS = 4, 6
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
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": READ_SECONDS}})
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
    row = {"stage": "tokenize", "source": "rooms", "shard": shard, "id": "", "uri": "0.png", "message": "cut off"}
    return pa.Table.from_pylist([{**row, "reason": Reason.TRUNCATED_IMAGE.value}], schema=REJECTS)


def fill(table: Table) -> Manifest:
    """Every shard by a first attempt, every second one by another attempt that comes too late, then the manifest."""
    table.plan({"images": "aaa"})
    for shard in range(SHARDS):
        first = table.commit(shard, "first", rows(shard), rejects(shard), ROWS + 1)
        assert first.attempt == "first"
        if shard % 2:
            assert table.commit(shard, "second", rows(shard), rejects(shard), ROWS + 1) == first
    assert table.find(SHARDS) is None
    assert sorted(table.committed()) == list(range(SHARDS))
    assert all(table.read_shard(shard).equals(rows(shard)) for shard in range(SHARDS))
    return table.finish(table.committed(), attempt="first", recipe="r", code="c", inputs={"images": "aaa"})


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
    assert kind == "truncated" or proxy.injected["lost_answer"] >= 1, proxy.injected
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
    table = Table(root, "codes", "rooms")
    names = [commit.attempt for _, commit in sorted(table.committed().items())]
    assert len(won) == 8 and all(seen == names for seen in won)
    assert table.unnamed() == [] and len(parts(root)) == 6
    assert all(proxy.injected[kind] for kind in KINDS), proxy.injected
    print(seed, dict(proxy.injected), "of", proxy.requests.total())


@pytest.mark.parametrize("kind", ["internal_error", "slow_down", "timeout", "reset"])
def test_a_create_whose_answer_was_lost_knows_its_own_file(proxied: Proxied, uri: str, kind: str) -> None:
    lost = Faults(rate=1, kinds=(kind,), only="PUT", stall=3 * READ_SECONDS, most_in_a_row=20)
    seeds = range(4)
    kept = []
    for seed in seeds:
        proxy = proxied(Faults(**{**vars(lost), "seed": seed, "most_in_a_row": 2}))
        root = open_root(uri)
        assert root.create(b"ours", f"marker-{seed}")
        assert not root.create(b"theirs", f"marker-{seed}")
        kept.append(root.read(f"marker-{seed}"))
        assert proxy.injected[kind] == 4
    assert kept == [b"ours"] * len(seeds)
    assert proxied(lost).injected.total() == 0
