"""A connection that says nothing, or never ends saying it, is closed; one that works is not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kagimori_verifier import serving

pytestmark = pytest.mark.slow

PATIENCE_S = 0.3
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def _slow(request: Request) -> Response:
    """Answer later than a head may take."""
    body = await request.body()
    await asyncio.sleep(3 * PATIENCE_S)
    return Response(body)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Give the address of a server with little patience."""
    monkeypatch.setattr(serving, "HEAD_S", PATIENCE_S)
    with _served() as at:
        yield at


@contextlib.contextmanager
def _served(**options: Any) -> Iterator[tuple[str, int]]:  # noqa: ANN401 - uvicorn's
    server = serving.ImpatientServer(
        uvicorn.Config(
            Starlette(routes=[Route("/", _slow, methods=["POST"])]),
            host="127.0.0.1",
            port=0,
            http=serving.ImpatientProtocol,
            log_config=None,
            lifespan="off",
            ws="none",
            **options,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(10)


def _ended_after_s(connection: socket.socket) -> float:
    """Wait until the other side closes; gives how long that took."""
    connection.settimeout(20 * PATIENCE_S)
    started = time.monotonic()
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - started


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nX-Half: a he"], ids=["nothing", "half a head"]
)
def test_a_connection_without_a_whole_request_is_closed(address: tuple[str, int], sent: bytes) -> None:
    """Idle connections would use up the files that a process may have open."""
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        assert _ended_after_s(connection) < 10 * PATIENCE_S


def test_a_head_that_comes_a_byte_at_a_time_is_not_waited_for(address: tuple[str, int]) -> None:
    """Each byte is progress, and none of it a request."""
    with socket.create_connection(address) as connection:
        started = time.monotonic()
        try:
            for byte in REQUEST[:-1]:
                connection.sendall(bytes([byte]))
                time.sleep(PATIENCE_S / 4)
        except OSError:
            pass
        assert time.monotonic() - started < PATIENCE_S / 4 * len(REQUEST) / 2


@pytest.mark.parametrize("parts", [1, 40], ids=["at once", "in parts"])
def test_a_head_without_end_is_not_kept(address: tuple[str, int], parts: int) -> None:
    """It would fill the memory of the verifier as fast as the network can."""
    padding = b"X-Padding: " + b"x" * (serving.MAX_HEAD // 40) + b"\r\n"
    endless = b"POST / HTTP/1.1\r\nHost: x\r\n" + padding * 41
    with socket.create_connection(address) as connection:
        size = len(endless) // parts + 1
        with contextlib.suppress(OSError):  # closed before all of it was sent
            for part in range(parts):
                connection.sendall(endless[part * size : (part + 1) * size])
                time.sleep(0.001)
        assert _ended_after_s(connection) < PATIENCE_S / 2


def test_a_head_as_large_as_allowed_is_answered(address: tuple[str, int]) -> None:
    """Proxies add to it."""
    head = REQUEST[:-2] + b"X-Padding: " + b"x" * (serving.MAX_HEAD - 200) + b"\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        connection.sendall(head[:8000])
        time.sleep(PATIENCE_S / 10)
        connection.sendall(head[8000:] + b"body")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_second_head_behind_a_request_is_bounded_too(address: tuple[str, int]) -> None:
    """A request that is being answered hides nothing that is sent after it."""
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        connection.sendall(REQUEST + b"body")
        padding = b"X-Padding: " + b"x" * 1000 + b"\r\n"
        started = time.monotonic()
        try:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
            while time.monotonic() - started < 20 * PATIENCE_S:
                connection.sendall(padding)
                time.sleep(0.001)
        except OSError:
            pass
        assert time.monotonic() - started < 20 * PATIENCE_S


def test_a_request_that_is_being_answered_is_left_alone(address: tuple[str, int]) -> None:
    """However long the answer takes; and the connection serves a second request."""
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        for body in (b"one.", b"two."):
            connection.sendall(REQUEST + body)
            answer = b""
            while not answer.endswith(body):
                part = connection.recv(4096)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "endless"),
    [
        (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * 1000),
        (CHUNKED + b"1\r\na\r\n0\r\nX: ", b"a" * 6000),
        (CHUNKED + b"1;", b"a" * 6000),
        (CHUNKED, b"1;a=bbbbbbbbbbbbbbbbb\r\na\r\n" * 200),
        (b"POST / HTTP/1.1\r\n", b"a: b\r\n" * 40_000 + b"\r\n"),
        (b"POST /?", b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000),
    ],
    ids=[
        "trailers",
        "a trailer",
        "a chunk's extension",
        "many of them",
        "headers at once",
        "a path at once",
        "requests",
    ],
)
def test_what_is_no_body_has_an_end(address: tuple[str, int], before: bytes, endless: bytes) -> None:
    """Nothing that a sender may go on with is kept, or read, for ever: twenty bytes of trailers took five hundred."""
    started, sent = time.monotonic(), 0
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        with contextlib.suppress(OSError):  # closed before all of it was sent
            connection.sendall(before)
            while time.monotonic() - started < 20 * PATIENCE_S:
                connection.sendall(endless)
                sent += len(endless)
                time.sleep(0.002)
    assert time.monotonic() - started < 4 * PATIENCE_S
    assert sent < 4 << 20


def test_a_body_in_chunks_with_a_trailer_is_answered(address: tuple[str, int]) -> None:
    """A proxy may cut a body as it likes."""
    body = b"".join(b"400\r\n" + b"a" * 1024 + b"\r\n" for _ in range(1024))
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        connection.sendall(CHUNKED + body + b"0\r\nX-Sum: 1\r\n\r\n")
        got = b""
        while len(got) < 1 << 20:
            part = connection.recv(1 << 16)
            assert part, got[:200]
            got += part
        assert got.startswith(b"HTTP/1.1 200")


def test_requests_that_follow_each_other_at_once_are_answered_in_their_order(
    address: tuple[str, int],
) -> None:
    """A few: HTTP allows it, though no agent does it."""
    with socket.create_connection(address) as connection:
        connection.settimeout(20 * PATIENCE_S)
        connection.sendall(REQUEST + b"one." + REQUEST + b"two.")
        got = b""
        while not got.endswith(b"two."):
            part = connection.recv(4096)
            assert part, got
            got += part
        assert got.index(b"one.") < got.index(b"two.")


def test_a_connection_too_many_is_not_kept(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for each, and a process has few; whoever was there is served on."""
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as all_of_them:
        kept = [all_of_them.enter_context(socket.create_connection(address)) for _ in range(3)]
        for one in kept:
            one.settimeout(20 * PATIENCE_S)
        kept[0].sendall(REQUEST)
        time.sleep(PATIENCE_S / 6)
        assert _ended_after_s(all_of_them.enter_context(socket.create_connection(address))) < PATIENCE_S / 2
        kept[0].sendall(b"body")
        assert kept[0].recv(4096).startswith(b"HTTP/1.1 200")


def test_one_source_does_not_take_all_connections(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one sender with a few hundred idle ones is the only one that is served."""
    monkeypatch.setattr(serving, "PER_SOURCE", 2)
    with contextlib.ExitStack() as all_of_them:
        for _ in range(2):
            all_of_them.enter_context(socket.create_connection(address))
        time.sleep(PATIENCE_S / 6)
        assert _ended_after_s(all_of_them.enter_context(socket.create_connection(address))) < PATIENCE_S / 2
        other = all_of_them.enter_context(socket.create_connection(address, source_address=("127.0.0.2", 0)))
        other.settimeout(20 * PATIENCE_S)
        other.sendall(REQUEST + b"body")
        assert other.recv(4096).startswith(b"HTTP/1.1 200")
    with socket.create_connection(address) as again:
        again.settimeout(20 * PATIENCE_S)
        again.sendall(REQUEST + b"body")
        assert again.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_handshake_that_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TLS comes before HTTP, and so does whoever only begins it; an honest one is served meanwhile."""
    monkeypatch.setattr(serving, "HEAD_S", PATIENCE_S)
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + dt.timedelta(days=1))
    pem = tmp_path / "pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    )
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with _served(ssl_certfile=pem) as at, socket.create_connection(at) as half:
        with socket.create_connection(at) as plain, trusting.wrap_socket(plain) as whole:
            whole.sendall(REQUEST + b"body")
            assert whole.recv(4096).startswith(b"HTTP/1.1 200")
        assert _ended_after_s(half) < 5 * PATIENCE_S


def test_a_connection_whose_answer_nobody_takes_is_given_up(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be closing for ever: there is something left to send, and nobody takes it."""
    lost = threading.Event()
    was_lost = serving.ImpatientProtocol.connection_lost

    def connection_lost(self: serving.ImpatientProtocol, error: Exception | None) -> None:
        was_lost(self, error)
        lost.set()

    monkeypatch.setattr(serving.ImpatientProtocol, "connection_lost", connection_lost)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(address)
        body = b"a" * (12 << 20)
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert lost.wait(30 * PATIENCE_S)
