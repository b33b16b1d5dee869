"""Run the ASGI application: a socket, uvicorn, and a clean end."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
from typing import TYPE_CHECKING, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.limits import source_of

if TYPE_CHECKING:
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
"""Connections at once; beyond that, 503."""
MOST_CONNECTIONS: Final = 576
"""Connections that are kept at all; fewer than the files that a process may usually have open."""
PER_SOURCE: Final = 128
"""Connections of one source: it takes several to be in everybody's way. Room for a proxy, which is one source."""
AHEAD: Final = 4
"""Requests that a connection may have sent ahead of the answers; an agent sends none."""


class ImpatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 that closes a connection whose request does not begin, or whose head does not end, in time and in size.

    httptools (llhttp, the parser of Node.js) takes a third of the time that h11 does, and bounds nothing by itself: not
    heads, not what may stand between and behind the chunks of a body, not requests that are sent ahead.
    """

    _arriving: int = 0
    """Bytes that are being parsed."""
    _around: int = 0
    """Bytes of a message that are no body. Where it began within what arrived, all of that counts, less its body."""
    _told: int = 0
    """Bytes of a message's path and headers, trailers among them, as the parser has told them."""
    _timer: asyncio.TimerHandle | None = None
    _source: str = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to watch."""
        super().connection_made(transport)
        self._source = source_of(self.client[0] if self.client else "unknown")
        of_this_source = sum(getattr(one, "_source", None) == self._source for one in self.connections)
        if len(self.connections) > MOST_CONNECTIONS or of_this_source > PER_SOURCE:
            transport.abort()
            return
        self._timer = self.loop.call_later(HEAD_S, self._look, self.cycle, True)  # noqa: FBT003 - nothing has been sent yet

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what arrived, unless too much of a message is no body by now."""
        self._arriving = len(data)
        self._around += len(data)
        super().data_received(data)
        if self._around > MAX_HEAD:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, unless a request before it waits for its answer, and would get this one."""
        cycle: RequestResponseCycle | None = self.cycle  # as in _look
        if cycle is None or cycle.response_complete:
            super().send_400_response(msg)
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Begin to count."""
        if len(self.pipeline) >= AHEAD:
            raise _TooMuchError
        self._around, self._told = self._arriving, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count it; the parser hands trailers out as headers, too."""
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Count it as what it is; who takes it has a limit for it."""
        self._around -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count no more."""
        self._around = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._told += size
        if self._told > MAX_HEAD:
            raise _TooMuchError

    def _look(self, before: object, waited: bool) -> None:  # noqa: FBT001 - whether the last look saw no request
        if self.transport.is_closing():  # what was to be sent has not been taken
            self._timer = self.loop.call_later(HEAD_S, self.transport.abort)
            return
        # uvicorn says that it is never None, and begins with None.
        cycle: RequestResponseCycle | None = self.cycle
        waits = cycle is None or cycle.response_complete
        if waits and waited and self.cycle is before:
            self.transport.close()
        self._timer = self.loop.call_later(HEAD_S, self._look, self.cycle, waits)


class _TooMuchError(Exception):
    """Stops the parser: a message has more around its body, or a connection more requests ahead, than anybody needs."""


class ImpatientServer(uvicorn.Server):
    """Gives a TLS handshake as much time as a head. The protocol hears of a connection only behind it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. uvicorn has no setting for this, and asyncio's own is a minute."""
        if self.config.is_ssl:
            loop = asyncio.get_running_loop()
            impatient = functools.partial(loop.create_server, ssl_handshake_timeout=HEAD_S)
            loop.create_server = impatient  # type: ignore[method-assign]  # of this loop, which only serves
        await super().startup(sockets)


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
    server = ImpatientServer(config)

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
