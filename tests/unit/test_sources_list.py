"""Lists of addresses: what is fetched from a server on this machine, and what no list may reach."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio.sources.address_list import ListReader
from perceptio.sources.record import Found, Refused, RowError, SourceError
from perceptio.sources.web import Web, is_public
from schemas.sources import ListSource
from schemas.tables import Reason
from tests.sources import good, jpeg, png, refusals, results, unique, write

METADATA = "http://169.254.169.254/latest/meta-data/"
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; made once, because certificates take long to load
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers by the path's first part, and notes what was asked."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        ANSWERS[self.path.split("/")[1]](self)

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def drip(handler: Handler) -> None:
    """Sends a letter of a header now and then, for ever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.ended.wait(0.05):  # type: ignore[attr-defined]
        try:
            handler.wfile.write(b"x")
        except OSError:
            return


def endless(handler: Handler, pause_s: float = 0) -> None:
    """A body that never ends and states no length."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not handler.server.ended.wait(pause_s):  # type: ignore[attr-defined]
        try:
            handler.wfile.write(b"x" * 1000)
        except OSError:
            return


def count(handler: Handler) -> int:
    return sum(path == handler.path for path, _ in handler.server.asked)  # type: ignore[attr-defined]


ANSWERS: dict[str, Answer] = {
    "room.jpg": lambda h: h.reply(200, jpeg(0)),
    "gone": lambda h: h.reply(410),
    "missing": lambda h: h.reply(404),
    "forbidden": lambda h: h.reply(403),
    "part": lambda h: h.reply(206, b"x"),
    "busy": lambda h: h.reply(503),
    "twice": lambda h: h.reply(429) if count(h) < 3 else h.reply(200, jpeg(0)),
    "short": lambda h: h.reply(200, b"abc", Content_Length=1000),
    "mended": lambda h: h.reply(200, b"abc", Content_Length=9) if count(h) < 2 else h.reply(200, jpeg(0)),
    "two-lengths": lambda h: h.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "no-http": lambda h: h.wfile.write(b"220 mail\r\n"),
    "silent": lambda h: None,
    "zipped": lambda h: h.reply(200, b"\x1f\x8b not unpacked", Content_Encoding="gzip"),
    "endless": endless,
    "slow": lambda h: endless(h, 0.05),
    "drip": drip,
    "metadata": lambda h: h.reply(302, Location=METADATA),
    "near": lambda h: h.reply(301, Location="../room.jpg"),
    "circle": lambda h: h.reply(307, Location="/circle"),
    "file": lambda h: h.reply(302, Location="file:///etc/passwd"),
    "nonsense": lambda h: h.reply(302, Location="http://[::"),
    "chunks": lambda h: h.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nffffffffffffffffffffff\r\n"
    ),
}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.ended = [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.ended.set()  # type: ignore[attr-defined]
    made.shutdown()
    made.server_close()
    thread.join()


def base(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def source(path: Path, **more: Any) -> ListSource:
    section = {"format": "list", "name": "web", "path": str(path), "tries": 2, "timeout_s": 20, **more}
    return ListSource.model_validate(section)


def web(more: dict[str, Any], **options: Any) -> Web:
    return Web(source(Path("list.txt"), **more), wait_s=0.001, **options)


def reader(folder: Path, *lines: str | bytes, name: str = "list.txt", **more: Any) -> ListReader:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return ListReader(source(write(folder / name, data), **more))


def test_local_and_web_addresses_come_in_the_lists_order(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    write(tmp_path / "a.png", png(0))
    write(tmp_path / "lists" / "b.png", png(1))
    lines = [
        "../a.png",
        "",
        f"  {base(server)}/room.jpg ",
        str(tmp_path / "a.png"),
        "b.png",
        "HTTP" + base(server)[4:] + "/near/x",
    ]
    made = reader(tmp_path / "lists", *lines, allow_private_addresses=True)
    found = good(made)
    assert [row.data for row in found] == [png(0), jpeg(0), png(0), png(1), jpeg(0)]
    assert [row.uri for row in found][:2] == [str(tmp_path / "a.png"), f"{base(server)}/room.jpg"]
    (_, headers), *_ = server.asked  # type: ignore[attr-defined]
    assert headers["Host"] == base(server).removeprefix("http://") and headers["Accept-Encoding"] == "identity"


def test_lines_of_json_carry_records(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    turn = {"kind": "vqa", "prompt": "q", "answer": "a"}
    lines = [
        json.dumps({"image": "a.png", "turns": [turn]}),
        json.dumps({"image": "./a.png", "turns": 3}),
        '{"url": 1}',
        "{",
    ]
    rows = results(reader(tmp_path, *lines, name="list.jsonl"))
    assert isinstance(rows[0], Found) and rows[0].record.turns[0].answer == "a"
    assert [row.reason for row in rows[1:] if isinstance(row, Refused)] == [Reason.BAD_RECORD] * 3
    assert len(unique([*reader(tmp_path, *lines[1:], name="list.jsonl").items()])) == 3


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b"caf\xe9.png", Reason.BAD_RECORD, "line 1: b'caf\\xe9.png' is no UTF-8"),
        ("gone.png", Reason.MISSING_FILE, "gone.png' is no file"),
        (".", Reason.MISSING_FILE, "is no file"),
        ("/dev/zero", Reason.MISSING_FILE, "'/dev/zero' is no file"),
        ("x" * 5000 + ".png", Reason.MISSING_FILE, "is no file"),
        ("x" * 9000, Reason.BAD_RECORD, "up to 8192 characters"),
        ("a\x00.png", Reason.BAD_RECORD, "expected a text"),
        ("ftp://host/a.png", Reason.BAD_RECORD, "the address is on 'ftp'"),
        ("file:///etc/passwd", Reason.BAD_RECORD, "the address is on 'file'"),
        ("simplecache::s3://b/c", Reason.BAD_RECORD, "the address is on 'simplecache::s3'"),
        ("s3://bucket", Reason.BAD_RECORD, "is no s3://bucket/key"),
        ("s3://b/../c", Reason.BAD_RECORD, "is no s3://bucket/key"),
        ("http://", Reason.BAD_RECORD, "is no web address|expected http or https"),
        ("http://[::", Reason.BAD_RECORD, "is no web address"),
        ("https://user:secret@host.example/a.png", Reason.BAD_RECORD, "holds a password"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(
    tmp_path: Path, line: str | bytes, reason: Reason, message: str
) -> None:
    ((found, text),) = refusals(reader(tmp_path, line))
    assert found == reason and any(part in text for part in message.split("|")) and "secret" not in text


def test_a_large_local_file_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    ((reason, _),) = refusals(reader(tmp_path, "a.png", max_bytes=10))
    assert reason == Reason.TOO_LARGE
    with pytest.raises(SourceError, match=r"sources.web.path '.*' is empty"):
        list(reader(tmp_path, "", " ").items())
    (tmp_path / "list.txt").unlink()
    with pytest.raises(SourceError, match=r"sources.web.path '.*list.txt' is no file"):
        list(ListReader(source(tmp_path / "list.txt")).items())


@pytest.mark.parametrize(
    ("path", "reason", "message"),
    [
        ("gone", Reason.MISSING_FILE, "answers 410"),
        ("missing", Reason.MISSING_FILE, "answers 404"),
        ("forbidden", Reason.UNREACHABLE, "answers 403"),
        ("part", Reason.UNREACHABLE, "answers 206"),
        ("busy", Reason.UNREACHABLE, "in 2 tries: the server answers 503"),
        ("twice", Reason.UNREACHABLE, "in 2 tries: the server answers 429"),
        ("short", Reason.UNREACHABLE, "in 2 tries: RemoteProtocolError"),
        ("two-lengths", Reason.UNREACHABLE, "in 2 tries"),
        ("no-http", Reason.UNREACHABLE, "in 2 tries"),
        ("silent", Reason.UNREACHABLE, "in 2 tries"),
        ("chunks", Reason.UNREACHABLE, "in 2 tries"),
        ("endless", Reason.TOO_LARGE, "more than 50000 bytes came: raise max_bytes"),
        ("circle", Reason.UNREACHABLE, "redirects more than 5 times"),
        ("file", Reason.BAD_RECORD, "has the scheme 'file'"),
        ("nonsense", Reason.BAD_RECORD, "is no web address"),
    ],
)
def test_what_a_server_does_not_give_is_refused(
    server: ThreadingHTTPServer, path: str, reason: Reason, message: str
) -> None:
    with pytest.raises(RowError) as error:
        web({"allow_private_addresses": True, "max_bytes": 50_000}).fetch(f"{base(server)}/{path}")
    assert error.value.reason == reason and message in str(error.value)


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_a_server_that_never_comes_to_an_end_is_left(server: ThreadingHTTPServer, path: str) -> None:
    with pytest.raises(RowError, match=r"in 1 tries: .*within 0.5 s") as error:
        web({"allow_private_addresses": True, "tries": 1, "timeout_s": 0.5}).fetch(f"{base(server)}/{path}")
    assert error.value.reason == Reason.UNREACHABLE


def test_what_passes_is_tried_again(server: ThreadingHTTPServer) -> None:
    patient = web({"allow_private_addresses": True, "tries": 3})
    assert patient.fetch(f"{base(server)}/twice") == jpeg(0)
    assert patient.fetch(f"{base(server)}/mended") == jpeg(0)
    assert patient.fetch(f"{base(server)}/zipped") == b"\x1f\x8b not unpacked"
    assert [path for path, _ in server.asked] == ["/twice"] * 3 + ["/mended"] * 2 + ["/zipped"]  # type: ignore[attr-defined]


def test_nothing_inside_the_network_is_asked_without_the_switch(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    port = server.server_port
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
    made = reader(tmp_path, *(f"http://{host}:{port}/room.jpg" for host in hosts))
    found = refusals(made)
    assert len(found) == len(hosts)
    assert all(reason in (Reason.BAD_RECORD, Reason.UNREACHABLE) for reason, _ in found)
    assert sum("is not public: set allow_private_addresses" in message for _, message in found) >= 5
    assert not server.asked  # type: ignore[attr-defined]


def test_a_redirect_is_checked_like_a_first_address(server: ThreadingHTTPServer) -> None:
    """A name that is public leads, by its redirect, to the cloud's metadata: that is never asked."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if host == "images.example" else [host]

    fetching = web({"allow_private_addresses": False}, resolve=resolve)
    with pytest.MonkeyPatch.context() as patch:
        public = ipaddress.ip_address("127.0.0.1")  # stands for a public one, so that a server can answer
        patch.setattr("perceptio.sources.web.is_public", lambda address: address == public or is_public(address))
        with pytest.raises(RowError, match=r"host '169.254.169.254' is at 169.254.169.254, which is not public"):
            fetching.fetch(f"http://images.example:{server.server_port}/metadata")
    assert asked == ["images.example", "169.254.169.254"]


def test_one_inner_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(RowError, match=r"is at 10.0.0.1, which is not public"):
        web({}, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"]).fetch("http://host.example/")


def test_the_connection_goes_to_the_address_that_was_checked(server: ThreadingHTTPServer) -> None:
    """The name has no address but the one that was looked up here: a second look-up would find none."""
    answers = iter([["127.0.0.1"]])
    fetching = web({"allow_private_addresses": True}, resolve=lambda host, port: next(answers))
    assert fetching.fetch(f"http://rebound.invalid:{server.server_port}/room.jpg") == jpeg(0)
    ((_, headers),) = server.asked  # type: ignore[attr-defined]
    assert headers["Host"] == f"rebound.invalid:{server.server_port}"


def test_another_address_of_the_host_is_tried(server: ThreadingHTTPServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", server.server_port))  # taken, but nobody listens
        fetching = web({"allow_private_addresses": True}, resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"])
        assert fetching.fetch(f"http://two.invalid:{server.server_port}/room.jpg") == jpeg(0)


def test_names_without_an_address_are_refused_and_failing_look_ups_repeated() -> None:
    calls: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        calls.append(host)
        raise socket.gaierror(socket.EAI_AGAIN if host == "later.example" else socket.EAI_NONAME, "no")

    for host in ("never.example", "later.example"):
        with pytest.raises(RowError) as error:
            web({}, resolve=resolve).fetch(f"http://{host}/a.png")
        assert error.value.reason == Reason.UNREACHABLE
    assert calls == ["never.example", "later.example", "later.example"]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0"),
        *("224.0.0.1", "239.1.1.1", "255.255.255.255", "192.0.0.192", "168.63.129.16", "198.18.0.1", "240.0.0.1"),
        *(
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
        ),
        *("64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1", "fec0::1", "64:ff9b:1::a00:1"),
    ],
)
def test_addresses_inside_networks_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def certificate(folder: Path, host: str) -> Path:
    """A certificate for one host, signed by itself, with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, host)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return write(folder / "host.pem", pem + made.public_bytes(serialization.Encoding.PEM))


def test_the_certificate_must_be_the_names_own(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    pem = certificate(tmp_path, "right.example")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(pem)
    server.socket = ours.wrap_socket(server.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=str(pem))
    fetching = web({"allow_private_addresses": True}, verify=trusting, resolve=lambda host, port: ["127.0.0.1"])
    assert fetching.fetch(f"https://right.example:{server.server_port}/room.jpg") == jpeg(0)
    with pytest.raises(RowError, match=r"Hostname mismatch|CERTIFICATE_VERIFY_FAILED"):
        fetching.fetch(f"https://wrong.example:{server.server_port}/room.jpg")
    slow = web({"allow_private_addresses": True, "tries": 1, "timeout_s": 0.5}, verify=trusting,
               resolve=lambda host, port: ["127.0.0.1"])  # fmt: skip
    with pytest.raises(RowError, match=r"within 0.5 s"):
        slow.fetch(f"https://right.example:{server.server_port}/drip")


def test_a_list_on_s3_names_no_file_of_this_disk(tmp_path: Path) -> None:
    made = reader(tmp_path, "a.png")

    class OnS3:
        protocol = ("s3", "s3a")

    made.place = type(made.place)(OnS3(), "bucket/lists/l.txt")
    assert made._address("b/./c.png") == "s3://bucket/lists/b/c.png"
    for path in ("/etc/passwd", "../x.png", "a/../../x.png"):
        with pytest.raises(RowError, match="outside the folder of the list on S3"):
            made._address(path)


@settings(deadline=None, max_examples=300)
@given(lines=st.binary(max_size=60) | st.text(max_size=40).map(lambda t: f"http://{t}".encode("utf-8", "ignore")))
def test_any_bytes_as_a_list_are_refused_or_not_there(tmp_path_factory: pytest.TempPathFactory, lines: bytes) -> None:
    def resolve(host: str, port: int) -> list[str]:
        host.encode("idna")
        raise socket.gaierror(socket.EAI_NONAME, "no network in this test")

    made = reader(tmp_path_factory.getbasetemp(), lines)
    made.web = Web(made.source, wait_s=0.001, resolve=resolve, verify=PLAIN)
    try:
        rows = results(made)
    except SourceError as error:
        rows = [Refused(Reason.BAD_RECORD, str(error), "")]
    assert rows and all(isinstance(row, Refused) for row in rows)
