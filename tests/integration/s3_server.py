"""A real S3 server on loopback, and a proxy in front of it that fails as a busy store and a bad network do.

The server is moto's, a process of its own. The proxy decides for each request by its seed, the request's method and
address, and how often it was seen, so that the order in which threads ask changes nothing.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

BUCKET = "runs"
KINDS = ("internal_error", "slow_down", "timeout", "truncated", "reset")
ANSWERS = {  # those that are not in KINDS are no faults of a moment, and are asked for by name
    "internal_error": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "conflict": ("409 Conflict", "ConditionalRequestConflict", "A conflicting operation occurred."),
    "unnamed_condition": ("412 Precondition Failed", "PreconditionFailed", "A pre-condition did not hold."),
    "expired_token": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "access_denied": ("403 Forbidden", "AccessDenied", "Access denied."),
}


@dataclass(frozen=True)
class Faults:
    """What a proxy does to requests: a share `rate` of them fails, but none more than `most_in_a_row` times in a row.

    A stall lasts `stall` seconds. `only` limits faults to requests whose "METHOD /path" has this text.
    """

    rate: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    most_in_a_row: int = 3
    stall: float = 3.0
    only: str = ""
    drop_if_none_match: bool = False  # the store then ignores exclusive create


class FaultyProxy:
    """An HTTP proxy for one S3 server. Use as a context; `faults` may be replaced at any time."""

    def __init__(self, upstream_port: int, faults: Faults) -> None:
        self.upstream_port, self.faults = upstream_port, faults
        self.injected: Counter[str] = Counter()  # by kind; lost_answer: those where the store had done its work
        self.requests: Counter[str] = Counter()  # by method
        self._seen: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._creating: dict[str, asyncio.Lock] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        serve = asyncio.start_server(self._client, "127.0.0.1", 0, limit=2**20)
        self._server = asyncio.run_coroutine_threadsafe(serve, self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fault(self, key: str, answer_is_cut: bool) -> tuple[str, bool] | None:
        """The kind of fault that this request meets, and whether the store does its work before it; None for none."""
        faults = self.faults
        draw = random.Random(f"{faults.seed} {key} {self._seen[key]}")
        self._seen[key] += 1
        kinds = [kind for kind in faults.kinds if kind != "truncated" or answer_is_cut]
        hit = kinds and faults.only in key and draw.random() < faults.rate
        if not hit or self._in_a_row[key] >= faults.most_in_a_row:
            self._in_a_row[key] = 0
            return None
        self._in_a_row[key] += 1
        return draw.choice(kinds), draw.random() < 0.5

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):  # the last when we close
            while await self._request(reader, writer):
                pass
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False where the connection is to be closed."""
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "100-continue" in headers.pop("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, headers)
        if self.faults.drop_if_none_match:
            headers.pop("if-none-match", None)
        self.requests[method] += 1
        fault = self._fault(f"{method} {re.sub('uploadId=[^&]*', 'uploadId', target)}", answer_is_cut=method == "GET")
        if fault is None:
            writer.write(await self._store(method, target, headers, body))
            await writer.drain()
            return True
        kind, done = fault
        done = done and kind in KINDS  # the others are true answers: the store did nothing
        answer = await self._store(method, target, headers, body) if done or kind == "truncated" else b""
        head, end, content = answer.partition(b"\r\n\r\n")
        if kind == "truncated" and len(content) < 2:
            writer.write(answer)
            await writer.drain()
            return True
        self.injected[kind] += 1
        self.injected["lost_answer"] += done and method in ("PUT", "POST", "DELETE")
        return await self._fail(writer, kind, method, half=head + end + content[: len(content) // 2])

    async def _fail(self, writer: asyncio.StreamWriter, kind: str, method: str, half: bytes) -> bool:
        if kind in ANSWERS:
            writer.write(_answer(kind, with_body=method != "HEAD"))
            await writer.drain()
            return True
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # closing then sends a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        if method == "GET":  # a time-out may come in the middle of a body
            writer.write(half)
            await writer.drain()
        await asyncio.sleep(self.faults.stall if kind == "timeout" else 0)
        return False

    async def _store(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
        """The store's answer, as it came. Exclusive creates of a file go one after another: moto's are not atomic."""
        if "if-none-match" not in headers:
            return await self._forward(method, target, headers, body)
        async with self._creating.setdefault(target, asyncio.Lock()):
            return await self._forward(method, target, headers, body)

    async def _forward(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        sent = {**headers, "connection": "close", "content-length": str(len(body))}
        sent.pop("transfer-encoding", None)
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        return _kept_alive(answer)


def _answer(kind: str, with_body: bool) -> bytes:
    status, code, message = ANSWERS[kind]
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    content = f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'.encode() if with_body else b""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body


def _kept_alive(answer: bytes) -> bytes:
    """An answer without the server's wish to close; the length of its body must stand in it."""
    head, _, content = answer.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    lines[0] = lines[0].replace(b"HTTP/1.0", b"HTTP/1.1")
    if not any(line.lower().startswith(b"content-length:") for line in lines) and b" 204 " not in lines[0]:
        lines.append(b"Content-Length: %d" % len(content))
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a running S3 server with the bucket BUCKET; it ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(process, port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _make_bucket(process: subprocess.Popen[bytes], port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                ask = f"PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                connection.sendall(ask.encode())
                answer = connection.recv(4096)
                assert b" 200 " in answer.split(b"\r\n")[0], answer
                return
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError(f"the S3 server did not start on port {port}")
