"""Run the ASGI application: a socket, uvicorn, and a clean end."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kagimori_protocol.errors import OperatorError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from kagimori_verifier.app import Verifier

KEEP_ALIVE_S: Final = 5
HEAD_S: Final = 10
"""How often a connection is looked at, in seconds: one that has no request begun between two looks is closed. uvicorn
itself would wait for ever."""
GRACE_S: Final = 10
BACKLOG: Final = 256
MAX_HEAD: Final = 16 << 10
"""Largest head of a request, in bytes."""
CONNECTIONS: Final = 512
"""Connections at once; beyond that, 503. Fewer than the files that a process may usually have open."""


class ImpatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 that closes a connection whose request does not begin, or whose head does not end, in time and in size.

    httptools (llhttp, the parser of Node.js) takes a third of the time that h11 does, and bounds no head by itself.
    """

    _head: int | None = None
    """Bytes that arrived since a head began which has not ended yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to watch."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_S, self._look, self.cycle, True)  # noqa: FBT003 - nothing has been sent yet

    def data_received(self, data: bytes) -> None:
        """Take what arrived, unless a head has grown too large by it; where it began within ``data``, all of that counts."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.close()

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Count no more."""
        self._head = None
        super().on_headers_complete()

    def _look(self, before: object, waited: bool) -> None:  # noqa: FBT001 - whether the last look saw no request
        if self.transport.is_closing():
            return
        # uvicorn says that it is never None, and begins with None.
        cycle: RequestResponseCycle | None = self.cycle
        waits = cycle is None or cycle.response_complete
        if waits and waited and self.cycle is before:
            self.transport.close()
        else:
            self.loop.call_later(HEAD_S, self._look, self.cycle, waits)


def serve(verifier: Verifier, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished. ``listening`` gets the URL once it is bound.

    Raises OperatorError if the address cannot be bound or the TLS files cannot be read.
    """
    settings = verifier.settings
    bound = _bind(settings.host, settings.port)
    tls = settings.tls
    config = uvicorn.Config(
        verifier.application(),
        http=ImpatientProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=CONNECTIONS,
        backlog=BACKLOG,
        ssl_certfile=None if tls is None else settings.path(tls.certificate),
        ssl_keyfile=None if tls is None else str(settings.path(tls.key)),
    )
    try:
        config.load()
    except OSError as error:
        bound.close()
        raise OperatorError(
            "The TLS certificate or key cannot be used.",
            code="serve.tls",
            expected="PEM files named by [tls] in verifier.toml",
            found=str(error.strerror or error),
        ) from error
    server = uvicorn.Server(config)

    def end(_number: int, _frame: object) -> None:
        server.should_exit = True

    # Before uvicorn's own handlers are there, and after: it raises signals again for whoever had them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    host, port = bound.getsockname()[:2]
    listening(f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=[bound])


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none, such as "a..b"
        raise OperatorError(
            f"{host}:{port} cannot be listened on.",
            code="serve.bind",
            expected="a free address of this machine",
            found=getattr(error, "strerror", None) or str(error),
            todo="Correct listen in verifier.toml, or stop what uses the port.",
        ) from error
    return bound
