"""A network that fails on purpose: a TCP proxy that cuts, resets or falls silent at a chosen byte of either direction."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit

Manner = Literal["close", "reset", "silence"]
BUFFER = 1 << 16
WAIT_S = 30.0
END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Cut:
    """Pass a part of a message on, and then no more.

    ``place`` counts what is passed on in heads, in whole messages and in bytes: (1, 0, -1) is one byte less than the head.
    ``manner`` is what both ends notice.
    """

    direction: Literal["request", "reply"]
    place: tuple[float, float, int]
    manner: Manner

    def part(self, direction: str, message: bytes) -> bytes:
        """Give what of a message of some direction is passed on."""
        if direction != self.direction:
            return message
        sizes = (message.index(END_OF_HEAD) + len(END_OF_HEAD), len(message), 1)
        return message[: int(sum(size * count for size, count in zip(sizes, self.place, strict=True)))]


@dataclass
class Network:
    """Passes connections on to a server. ``cuts`` are made once each, by the last part of a request's path."""

    url: str
    target: tuple[str, int]
    cuts: dict[str, Cut] = field(default_factory=dict)
    repeats: int = 1
    """How often the server gets each request; its client gets the first reply."""
    replies: list[tuple[str, bytes]] = field(default_factory=list)
    """What the server replied to what, whether or not its client got it."""
    made: threading.Event = field(default_factory=threading.Event)
    """Set when a cut has been made."""
    _end: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextlib.contextmanager
    def to(cls, url: str) -> Iterator[Self]:
        """Put a network in front of a server."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            network = cls(f"http://127.0.0.1:{port}", (parts.hostname, parts.port))
            thread = threading.Thread(target=network._accept, args=(listener,), daemon=True)
            thread.start()
            try:
                yield network
            finally:
                network._end.set()
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                thread.join(WAIT_S)

    def _accept(self, listener: socket.socket) -> None:
        """Serve one connection after the other: an agent has one at a time."""
        while True:
            client, _ = listener.accept()
            if self._end.is_set():
                client.close()
                return
            with client:
                client.settimeout(WAIT_S)
                self._carry(client)

    def _carry(self, client: socket.socket) -> None:
        request = _whole(client)
        name = request.split(b" ", 2)[1].rpartition(b"/")[2].decode() if b" " in request else ""
        cut = self.cuts.pop(name, None)
        with socket.create_connection(self.target, WAIT_S) as server:
            passed = request if cut is None else cut.part("request", request)
            server.sendall(passed)
            if passed == request:
                reply = self._replied(name, server)
                for _ in range(self.repeats - 1):
                    with socket.create_connection(self.target, WAIT_S) as again:
                        again.sendall(request)
                        self._replied(name, again)
                with contextlib.suppress(OSError):  # nobody waits any more
                    client.sendall(reply if cut is None else cut.part("reply", reply))
            if cut is not None:
                self.made.set()
            if cut is not None and cut.manner == "silence":
                with contextlib.suppress(OSError):
                    client.recv(BUFFER)  # until the agent hangs up
            elif cut is not None and cut.manner == "reset":
                for one in (client, server):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _replied(self, name: str, server: socket.socket) -> bytes:
        reply = _whole(server)
        self.replies.append((name, reply.partition(END_OF_HEAD)[2]))
        return reply


def _whole(end: socket.socket) -> bytes:
    """Read one HTTP message with its Content-Length."""
    message = b""
    while True:
        if END_OF_HEAD in message:
            head, _, body = message.partition(END_OF_HEAD)
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            if len(body) >= length:
                return message
        part = end.recv(BUFFER)
        if not part:
            return message
        message += part
