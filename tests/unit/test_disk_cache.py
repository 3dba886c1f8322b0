"""The local cache: within its limit, what is read last stays, and nothing spoilt is ever given out."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perceptio.data.disk_cache import DIGEST_BYTES, LOCK_NAME, DiskCache

KB = 1000
PUT_FOR_EVER = """
import sys
from perceptio.data.disk_cache import DiskCache
cache, number = DiskCache(sys.argv[1], int(sys.argv[2])), 0
while True:
    cache.put(f"{sys.argv[3]} {number}", bytes([number % 256]) * 700_000)
    number += 1
    print(number, flush=True)
"""


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK_NAME]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def aged(cache: DiskCache, *keys: str) -> None:
    """As if so many entries had been read in this order, an hour ago and since."""
    for number, key in enumerate(keys):
        then = time.time_ns() - (3600 - number) * 10**9
        os.utime(cache._path(key), ns=(then, then))


def test_what_is_put_is_found_by_its_key_alone(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new" / "folder", 10 * KB)
    assert cache.get("a") is None
    cache.put("a", b"bytes of a")
    cache.put("b", b"")
    assert cache.get("a") == DiskCache(cache.folder, 10 * KB).get("a") == b"bytes of a"
    assert cache.get("b") == b"" and cache.get("a ") is None
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_what_was_read_longest_ago_goes_first_and_the_limit_is_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * KB)
    for key in "abc":
        cache.put(key, key.encode() * 900)
    aged(cache, *"abc")
    assert cache.get("a") is not None
    cache.put("d", b"d" * 900)
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    cache.put("whole", b"w" * (3 * KB - DIGEST_BYTES))
    assert len(entries(tmp_path)) == 1 and held(tmp_path) == 3 * KB
    cache.put("too large", b"x" * 3 * KB)
    assert cache.get("too large") is None and cache.get("whole") is not None


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:10], lambda c: b"", lambda c: c[:-1] + b"?"])
def test_a_damaged_entry_is_not_given_out_and_goes(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, 10 * KB)
    cache.put("a", b"bytes of a")
    (path,) = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.get("a") is None
    assert f"{path} is damaged" in caplog.text and not entries(tmp_path)
    cache.put("a", b"bytes of a")
    assert cache.get("a") == b"bytes of a"


def test_processes_that_are_killed_leave_nothing_wrong_and_the_limit_holds(tmp_path: Path) -> None:
    limit = 5_000_000
    for turn in range(3):
        command = [sys.executable, "-c", PUT_FOR_EVER, str(tmp_path), str(limit)]
        both = [subprocess.Popen([*command, f"{turn} {n}"], stdout=subprocess.PIPE, text=True) for n in range(2)]
        for process in both:
            assert process.stdout is not None
            for _ in range(8):  # so that what came first is let go already
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        assert held(tmp_path) <= limit
    cache, found = DiskCache(tmp_path, limit), 0
    for turn in range(3):
        for process_number in range(2):
            for number in range(200):
                data = cache.get(f"{turn} {process_number} {number}")
                assert data is None or data == bytes([number % 256]) * 700_000
                found += data is not None
    assert found >= 5
    cache.put("after", b"x" * 4_900_000)
    assert len(entries(tmp_path)) == 1, "drafts of the killed go as all else does"


def test_threads_that_put_at_once_keep_the_limit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 50 * KB)
    seen: list[int] = []

    def work(number: int) -> None:
        cache.put(str(number), bytes([number]) * 9 * KB)
        seen.append(held_now(tmp_path))
        data = cache.get(str(number))
        assert data is None or data == bytes([number]) * 9 * KB

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    assert max(seen) <= 50 * KB and held(tmp_path) > 40 * KB


def held_now(folder: Path) -> int:
    """As `held`, while others put and delete: no entry is counted that went meanwhile."""
    total = 0
    for path in entries(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_a_disk_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path / "cache", 10 * KB)
    cache.put("a", b"bytes of a")
    for path in (cache._path("a"), cache.folder / LOCK_NAME):
        path.unlink()
    cache.folder.rmdir()
    cache.folder.write_bytes(b"a file stands where the folder was")
    with caplog.at_level(logging.WARNING):
        cache.put("b", b"bytes of b")
        assert cache.get("b") is None
    assert caplog.text.count("the store is read instead") == 1


def test_a_limit_below_one_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0 bytes, expected at least 1"):
        DiskCache(tmp_path, 0)
