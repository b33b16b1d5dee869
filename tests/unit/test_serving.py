"""A connection that says nothing, or never ends saying it, is closed; one that works is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kagimori_verifier import serving

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
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/", _slow, methods=["POST"])]),
            host="127.0.0.1",
            port=0,
            http=serving.ImpatientProtocol,
            log_config=None,
            lifespan="off",
            ws="none",
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
