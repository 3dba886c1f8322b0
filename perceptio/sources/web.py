"""Images from the web: addresses that anybody wrote, fetched without reaching into the own network.

Every host is resolved here, every one of its addresses is checked, and the connection goes to the very address that
was checked: a name that changes its address in between gains nothing. Redirects are followed one by one, each with the
same check. No proxy is used, for it would resolve names on its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from perceptio.sources.record import RowError
from schemas.sources import ListSource
from schemas.tables import Reason

REDIRECTS = 5
BUSY = (408, 425, 429)  # and 5xx: worth another try
GONE = (404, 410)
LONGEST_WAIT_S = 10.0  # before another try
NAT64 = ipaddress.ip_network("64:ff9b::/96")
INSIDE = (  # public by their number as Python 3.11 knows them, yet answered from inside a cloud or network
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("fec0::/10"),
    ipaddress.ip_network("64:ff9b:1::/48"),
)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


class _TryAgainError(Exception):
    """A failure that may pass."""


def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, by the system's resolver. Raises socket.gaierror."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Web:
    """Fetches addresses within the limits of a source. May be used by several threads."""

    def __init__(
        self,
        source: ListSource,
        *,
        wait_s: float = 0.5,
        verify: ssl.SSLContext | bool = True,
        resolve: Resolve = resolve,
    ) -> None:
        self.source, self.wait_s, self.resolve = source, wait_s, resolve
        limits = httpx.Limits(max_keepalive_connections=0)  # two hosts behind one address must not share a connection
        self.transport = httpx.HTTPTransport(verify=verify, trust_env=False, limits=limits)

    def fetch(self, url: str) -> bytes:
        """The body at an address. Raises RowError where it cannot be had, whatever the reason."""
        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(self.source.tries),
            wait=wait_random_exponential(self.wait_s, LONGEST_WAIT_S),
            reraise=True,
        )
        try:
            body: bytes = retrying(self._follow, url)
        except _TryAgainError as error:
            message = f"it cannot be fetched in {self.source.tries} tries: {error!s:.200}"
            raise RowError(Reason.UNREACHABLE, message) from error
        return body

    def _follow(self, url: str) -> bytes:
        """One try, along its redirects."""
        deadline = _Deadline(self.source.timeout_s)
        target = parsed(url)
        for _ in range(REDIRECTS + 1):
            with self._answer(target, deadline) as answer:
                if not answer.has_redirect_location:
                    return self._body(answer, deadline)
                target = parsed(answer.headers["location"], target)
        raise RowError(Reason.UNREACHABLE, f"it redirects more than {REDIRECTS} times, at last to '{target}'")

    @contextlib.contextmanager
    def _answer(self, target: httpx.URL, deadline: _Deadline) -> Iterator[httpx.Response]:
        """The head of the answer. Raises _TryAgainError for whatever goes wrong on the way, also with the body."""
        addresses = self._addresses(target)
        with deadline.kept():
            try:
                answer = self._asked(target, addresses, deadline)
                try:
                    yield answer
                finally:
                    answer.close()
            except httpx.TransportError as error:
                raise _TryAgainError(f"{type(error).__name__}: {error}{deadline.told()}") from error

    def _asked(self, target: httpx.URL, addresses: Sequence[Address], deadline: _Deadline) -> httpx.Response:
        """The answer of the first address that takes the connection."""
        for left, address in reversed(list(enumerate(reversed(addresses)))):
            request = httpx.Request(
                "GET",
                target.copy_with(host=str(address)),
                headers={
                    "Host": target.netloc.decode("ascii"),
                    "User-Agent": "perceptio",
                    "Accept": "image/*,*/*;q=0.5",
                    "Accept-Encoding": "identity",
                },
                extensions={
                    "sni_hostname": target.raw_host.decode("ascii"),  # what the certificate is checked against
                    "timeout": httpx.Timeout(deadline.left()).as_dict(),
                    "trace": deadline.trace,
                },
            )
            try:
                return self.transport.handle_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if not left:
                    raise
        raise _TryAgainError("the host has no address")

    def _addresses(self, target: httpx.URL) -> Sequence[Address]:
        """All addresses of a host, each checked."""
        host = target.raw_host.decode("ascii").strip("[]")
        try:
            port = target.port or {"http": 80, "https": 443}[target.scheme]
            addresses = [ipaddress.ip_address(found) for found in self.resolve(host, port)]
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise _TryAgainError(f"host '{host}' cannot be resolved now: {error}") from error
            raise RowError(Reason.UNREACHABLE, f"host '{host}' has no address: {error}") from error
        except ValueError as error:
            raise RowError(Reason.BAD_RECORD, f"host '{host[:100]}' is no name: {error!s:.100}") from error
        inside = [address for address in addresses if not is_public(address)]
        if inside and not self.source.allow_private_addresses:
            raise RowError(
                Reason.BAD_RECORD,
                f"host '{host}' is at {inside[0]}, which is not public: set allow_private_addresses to fetch from "
                "inside this network",
            )
        return addresses

    def _body(self, answer: httpx.Response, deadline: _Deadline) -> bytes:
        status, most = answer.status_code, self.source.max_bytes
        if status in BUSY or status >= 500:
            raise _TryAgainError(f"the server answers {status}")
        if status != 200:
            reason = Reason.MISSING_FILE if status in GONE else Reason.UNREACHABLE
            raise RowError(reason, f"the server answers {status}, expected 200")
        pieces, size = [], 0
        for piece in answer.iter_raw():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise RowError(Reason.TOO_LARGE, f"more than {most} bytes came: raise max_bytes")
        if deadline.passed():  # a body without a stated length just ends where it is cut off
            raise _TryAgainError(f"{size} bytes came{deadline.told()}")
        return b"".join(pieces)


class _Deadline:
    """The end of one try. Servers that send a byte now and then never run into a time-out, so the socket is shut."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends = time.monotonic() + seconds
        self.socket: socket.socket | None = None

    def left(self) -> float:
        return max(0.001, self.ends - time.monotonic())

    def passed(self) -> bool:
        return time.monotonic() >= self.ends

    def told(self) -> str:
        return f" within {self.seconds:g} s" if self.passed() else ""

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Takes the socket of each connection that is made; httpx calls this."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self.socket = info["return_value"].get_extra_info("socket")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Shuts the socket if the block lasts longer."""
        timer = threading.Timer(self.left(), self._shut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _shut(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # below TLS, which another thread is reading


def parsed(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """A web address, relative to another one if that is given. Raises RowError for what is none."""
    try:
        target = httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise RowError(Reason.BAD_RECORD, f"'{url[:200]}' is no web address: {error!s:.200}") from error
    if target.scheme not in ("http", "https") or not target.host:
        message = f"'{url[:200]}' has the scheme '{target.scheme}' and the host '{target.host}', expected http or https"
        raise RowError(Reason.BAD_RECORD, message)
    if target.userinfo:
        raise RowError(Reason.BAD_RECORD, f"an address at '{target.host}' holds a password, which would be stored")
    return target


def is_public(address: Address) -> bool:
    """True for an address on the public internet, also where it wraps another one."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped:
            return is_public(wrapped)
    outside = not any(address.version == net.version and address in net for net in INSIDE)
    return outside and address.is_global and not address.is_multicast
