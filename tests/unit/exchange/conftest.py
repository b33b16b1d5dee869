"""Real servers on the loopback interface, most of which do what no verifier does."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kagimori_agent import exchange
from kagimori_agent.budget import Budget
from kagimori_agent.exchange import Endpoint, Reply
from kagimori_protocol import signature
from kagimori_protocol.errors import NetworkError
from kagimori_protocol.messages import MAX_BODY

Behaviour = Callable[[socket.socket, bytes, bytes], None]
"""What a server does with a connection, having read the request's head and body."""


class Server:
    """A server in threads that keeps what it was sent; ``behave`` answers, reading begins after ``pause_s``."""

    def __init__(self, behave: Behaviour, context: ssl.SSLContext | None, pause_s: float) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.hung_up = threading.Event()
        self._behave = behave
        self._context = context
        self._pause_s = pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        with connection, contextlib.suppress(OSError):
            if self._context:
                with self._context.wrap_socket(connection, server_side=True) as wrapped:
                    self._answer(wrapped)
            else:
                self._answer(connection)
        self.hung_up.set()

    def _answer(self, connection: socket.socket) -> None:
        time.sleep(self._pause_s)
        received = b""
        while b"\r\n\r\n" not in received:
            chunk = connection.recv(65536)
            if not chunk:
                return
            received += chunk
            if received[:1] == b"\x16":
                # A TLS handshake, answered in plain HTTP as servers do.
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                return
        head, _, start = received.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length"))
        body = bytearray(start)
        while len(body) < length:
            chunk = connection.recv(1 << 20)
            if not chunk:
                return
            body += chunk
        self.heads.append(head)
        self.bodies.append(bytes(body))
        self._behave(connection, head, bytes(body))


class Loopback:
    """A verifier's key, servers that answer with it or otherwise, and the agent's questions to them."""

    path = "/v1/challenge"
    request = b'{"type":"hello"}'
    answer = b'{"type":"challenge","version":1}'

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.public = self.key.public_key().public_bytes_raw()
        self._servers: list[Server] = []

    def serve(
        self, behave: Behaviour, context: ssl.SSLContext | None = None, *, pause_s: float = 0
    ) -> Server:
        """Start a server, which ends with the test."""
        self._servers.append(Server(behave, context, pause_s))
        return self._servers[-1]

    def close(self) -> None:
        """End all servers."""
        for server in self._servers:
            server.close()

    def response(self, body: bytes, *headers: str, status: str = "200 OK") -> bytes:
        """Write a plain HTTP response."""
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        return "\r\n".join(head).encode() + body

    def sign(self, request: bytes, body: bytes = answer, key: Ed25519PrivateKey | None = None) -> str:
        """Write the header that makes a body an answer."""
        return f"{signature.HEADER}: {signature.sign(key or self.key, request, body)}"

    def signed(
        self, request: bytes, *headers: str, key: Ed25519PrivateKey | None = None, status: str = "200 OK"
    ) -> bytes:
        """Write the response of an honest verifier."""
        return self.response(self.answer, self.sign(request, key=key), *headers, status=status)

    def honest(self, connection: socket.socket, _head: bytes, body: bytes) -> None:
        """Answer as a verifier does."""
        connection.sendall(self.signed(body))

    def slow(self, pause_s: float) -> Behaviour:
        """Answer as a verifier does, after a pause."""

        def behave(connection: socket.socket, _head: bytes, body: bytes) -> None:
            time.sleep(pause_s)
            connection.sendall(self.signed(body))

        return behave

    def says(self, what: bytes) -> Behaviour:
        """Answer with fixed bytes."""
        return lambda connection, _head, _body: connection.sendall(what)

    def drip(self, head: bytes, piece: bytes) -> Behaviour:
        """Send a little again and again, faster than any timeout for one read."""

        def behave(connection: socket.socket, _head: bytes, _body: bytes) -> None:
            connection.sendall(head)
            for _ in range(200):
                connection.sendall(piece)
                time.sleep(0.05)
            pytest.fail("10 seconds of drops were taken")

        return behave

    def endless(self, head: bytes) -> Behaviour:
        """Answer with a body that does not end, and count on being cut."""

        def behave(connection: socket.socket, _head: bytes, _body: bytes) -> None:
            connection.sendall(head)
            for _ in range(64):
                connection.sendall(bytes(MAX_BODY))
            pytest.fail("64 times the largest body was read")

        return behave

    def closed_port(self) -> str:
        """Give a URL where nobody listens."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def certificate(self, directory: Path, name: str = "server") -> tuple[ssl.SSLContext, Path]:
        """Make a self-signed certificate for 127.0.0.1: the server's context, and the file for its clients."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        now = dt.datetime.now(dt.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
        certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate_file, key_file)
        return context, certificate_file

    def ask(
        self,
        *urls: str,
        keys: tuple[bytes, ...] | None = None,
        body: bytes = request,
        attempt_s: float = 5,
        connect_s: float = 5,
        budget_s: float = 60,
        ca_file: Path | None = None,
    ) -> Reply:
        """Post to one endpoint, with patient limits unless told otherwise."""
        endpoint = Endpoint("home", urls, (self.public,) if keys is None else keys, ca_file)
        return exchange.post(
            endpoint, self.path, body, attempt_s=attempt_s, connect_s=connect_s, budget=Budget(budget_s)
        )

    def refusal(
        self,
        *urls: str,
        keys: tuple[bytes, ...] | None = None,
        body: bytes = request,
        attempt_s: float = 5,
        budget_s: float = 60,
        ca_file: Path | None = None,
    ) -> NetworkError:
        """Post to one endpoint, and give the error."""
        with pytest.raises(NetworkError) as raised:
            self.ask(*urls, keys=keys, body=body, attempt_s=attempt_s, budget_s=budget_s, ca_file=ca_file)
        return raised.value

    def attempts_end(self, most_s: float = 3) -> bool:
        """Wait for the exchange's threads to end, and tell whether they did."""
        until = time.monotonic() + most_s
        while alive := [one for one in threading.enumerate() if one.name.startswith("ask ")]:
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return not alive


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    """Give what starts servers; all of them end with the test."""
    given = Loopback()
    yield given
    given.close()
