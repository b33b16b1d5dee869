"""A connection that says nothing, or never ends saying it, is closed; one that works is not."""

from __future__ import annotations

import asyncio
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
