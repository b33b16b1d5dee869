"""One HTTP request over one connection that can be hung up at any moment, by whoever waits for it.

The timeouts of sockets are for one read each, so a server that sends a byte now and then would never meet them, and
none at all holds for the resolver. So each attempt runs in a thread of its own: who waits for it keeps the deadline,
and shuts the connection down then, which ends the thread.

Import budget: requests and urllib3 only within the functions that use them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, cast

from kagimori_agent.away import away, code_of, reason_of
from kagimori_agent.lean import load_requests
from kagimori_protocol.errors import NetworkError
from kagimori_protocol.messages import MAX_BODY
from kagimori_protocol.signature import HEADER, HEADER_KEYS, write_key_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests
    import urllib3

_HEADERS: Final = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "Content-Type": "application/json",
    "User-Agent": "kagimori-agent",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A body to post; ``name`` is the verifier's, for errors. ``connect_s`` seconds for each address of the host.

    ``keys`` are those that a reply would be believed by: a verifier that is changing its keys signs by one of them.
    """

    name: str
    url: str
    body: bytes
    ca_file: Path | None
    connect_s: float
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """What came over a line, unverified."""

    status: int
    signature: str | None
    body: bytes


class Line:
    """One attempt: a thread, a connection, and ``limit_s`` seconds from now for all of it."""

    def __init__(self, limit_s: float) -> None:
        """Start counting."""
        self._until = time.monotonic() + limit_s
        self._result: SimpleQueue[Received | Exception] = SimpleQueue()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._hung_up = False

    def ask(self, request: Request) -> Received:
        """Send a request and give what came, or raise NetworkError with one of the codes ``network.*``."""
        threading.Thread(target=self._run, args=(request,), daemon=True, name=f"ask {request.url}").start()
        try:
            result = self._result.get(timeout=self.left_s())
        except Empty:
            self.hang_up()
            result = TimeoutError()
        if isinstance(result, Received):
            return result
        if isinstance(result, NetworkError):
            raise result
        code = code_of(result)
        if code is None:
            raise result
        found = reason_of(result)
        if code == "network.timeout":
            found = "not connected yet" if self._socket is None else "connected, but no whole answer"
        raise away(request.name, code, url=request.url, found=found) from result

    def left_s(self) -> float:
        """Give the seconds until the deadline, never less than 0."""
        return max(0.0, self._until - time.monotonic())

    def hold(self, connected: socket.socket) -> float:
        """Take the connection that was just made, and give the seconds that it has.

        Raises TimeoutError where nobody waits any more.
        """
        with self._lock:
            left_s = self.left_s()
            if self._hung_up or left_s == 0:
                raise TimeoutError
            connected.settimeout(left_s)
            self._socket = connected
            return left_s

    def hang_up(self) -> None:
        """End the attempt: wake its thread and whoever waits for it, now or later."""
        with self._lock:
            self._hung_up = True
            if self._socket is not None:
                # Below TLS, whose own shutdown would talk to the server first. OSError: closed already.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._result.put(TimeoutError())

    def _run(self, request: Request) -> None:
        try:
            self._result.put(_fetch(self, request))
        except Exception as error:  # noqa: BLE001 - sorted, or raised again, in the thread that waits
            self._result.put(error)
        finally:
            self._close()

    def _close(self) -> None:
        """Close the connection, also where a library stumbled over an answer and its objects still hold it."""
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):  # closed already
                    os.close(self._socket.detach())


def _fetch(line: Line, request: Request) -> Received:
    """Post and read, for however long it takes: the deadline is kept by who waits."""
    if request.ca_file is not None and not os.access(request.ca_file, os.R_OK):
        raise away(request.name, "network.tls", url=request.url, found=f"no readable file {request.ca_file}")
    limit_s = max(0.001, line.left_s())
    with (
        _session(line, tls_is_verified=request.ca_file is not None) as session,
        session.post(
            request.url,
            data=request.body,
            headers={HEADER_KEYS: write_key_ids(request.keys)},
            timeout=(min(request.connect_s, limit_s), limit_s),
            verify=False if request.ca_file is None else str(request.ca_file),
            allow_redirects=False,
            stream=True,
        ) as response,
    ):
        encoding = response.headers.get("Content-Encoding")
        if encoding is not None:
            # Never unpacked: a kilobyte may hold a gigabyte.
            raise away(
                request.name,
                "network.encoding",
                url=request.url,
                expected="no Content-Encoding, as was asked for",
                found=repr(encoding[:32]),
            )
        body = bytearray()
        while len(body) <= MAX_BODY and (
            chunk := response.raw.read(MAX_BODY + 1 - len(body), decode_content=False)
        ):
            body += chunk
        if len(body) > MAX_BODY:
            raise away(
                request.name,
                "network.too-large",
                url=request.url,
                expected=f"at most {MAX_BODY} bytes",
                found="more than that",
            )
        return Received(response.status_code, response.headers.get(HEADER), bytes(body))


def _session(line: Line, *, tls_is_verified: bool) -> requests.Session:
    """Make a session that takes nothing from its surroundings and hands each connection to ``line``."""
    load_requests()
    import requests  # noqa: PLC0415 - the import budget above
    import urllib3  # noqa: PLC0415 - the import budget above
    from requests.adapters import HTTPAdapter  # noqa: PLC0415 - the import budget above
    from urllib3.connection import HTTPConnection, HTTPSConnection  # noqa: PLC0415 - the import budget above

    if not tls_is_verified:
        # Nothing relies on TLS here: the reply's signature authenticates, and a guest's clock and CA store are the
        # host's to bend (PROTOCOL.md section 1).
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    # ``timeout`` was that of connecting until then, and would hold for sending too, which may take longer.
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.timeout = line.hold(self.sock)

    class Tls(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            self.timeout = line.hold(self.sock)

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(
            self,
            request: requests.PreparedRequest,
            verify: bool | str | None,  # noqa: FBT001 - the signature is requests'
            proxies: Mapping[str, str] | None = None,
            cert: tuple[str, str] | str | None = None,
        ) -> urllib3.HTTPConnectionPool:
            pool = cast(
                "urllib3.HTTPConnectionPool",
                super().get_connection_with_tls_context(request, verify, proxies, cert),
            )
            pool.ConnectionCls = Tls if pool.scheme == "https" else Plain
            return pool

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            """See no redirect: to not follow one, requests would still read and unpack its body, however large."""

    session = Session()
    # No proxy, netrc or CA bundle on the environment's word.
    session.trust_env = False
    session.headers.clear()
    session.headers.update(_HEADERS)
    session.mount("http://", Adapter())
    session.mount("https://", Adapter())
    return session
