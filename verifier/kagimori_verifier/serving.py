"""Run the ASGI application: a socket, uvicorn, and a clean end."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Final

import uvicorn

from kagimori_protocol.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_verifier.app import Verifier

KEEP_ALIVE_S: Final = 5
GRACE_S: Final = 10
BACKLOG: Final = 256


def serve(verifier: Verifier, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished. ``listening`` gets the URL once it is bound.

    Raises OperatorError if the address cannot be bound or the TLS files cannot be read.
    """
    settings = verifier.settings
    bound = _bind(settings.host, settings.port)
    tls = settings.tls
    config = uvicorn.Config(
        verifier.application(),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=None if tls is None else settings.path(tls.certificate),
        ssl_keyfile=None if tls is None else str(settings.path(tls.key)),
    )
    try:
        config.load()
    except OSError as error:
        raise OperatorError(
            "The TLS certificate or key cannot be used.",
            code="serve.tls",
            expected="PEM files named by [tls] in verifier.toml",
            found=str(error.strerror or error),
        ) from error
    host, port = bound.getsockname()[:2]
    listening(f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}")
    # uvicorn ends cleanly on these signals, then raises them again for whoever had them before: nobody minds here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ended)
    uvicorn.Server(config).run(sockets=[bound])


def _ended(_number: int, _frame: object) -> None:
    """The server has ended already."""


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        raise OperatorError(
            f"{host}:{port} cannot be listened on.",
            code="serve.bind",
            expected="a free address of this machine",
            found=str(error.strerror or error),
            todo="Correct listen in verifier.toml, or stop what uses the port.",
        ) from error
    return bound
