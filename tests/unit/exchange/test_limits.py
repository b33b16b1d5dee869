"""Sizes, deadlines and TLS: a server that does not play along costs a bounded time and a bounded memory."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_protocol.messages import MAX_BODY

if TYPE_CHECKING:
    from tests.unit.exchange.conftest import Loopback


@pytest.mark.parametrize(
    "status",
    ["200 OK", "307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/"],
    ids=["answer", "redirect"],
)
def test_an_endless_body_is_cut(loopback: Loopback, status: str) -> None:
    """One byte more than the largest message, and the connection is closed."""
    server = loopback.serve(loopback.endless(f"HTTP/1.1 {status}\r\n\r\n".encode()))
    assert loopback.refusal(server.url).code == "network.too-large"
    assert server.hung_up.wait(5)


def test_the_largest_body_is_read(loopback: Loopback) -> None:
    """Exactly the limit is allowed, and it is read to its end."""
    body = b'{"type":"challenge"}'.ljust(MAX_BODY)

    def behave(connection: socket.socket, _head: bytes, request: bytes) -> None:
        connection.sendall(loopback.response(body, loopback.sign(request, body)))

    assert loopback.ask(loopback.serve(behave).url).body == body


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "chunks", "headers", "continue"],
)
def test_a_slow_drip_meets_the_deadline(loopback: Loopback, head: bytes, piece: bytes) -> None:
    """The deadline is for the whole attempt, wherever the drops fall, and the connection is closed then."""
    server = loopback.serve(loopback.drip(head, piece))
    start = time.monotonic()
    error = loopback.refusal(server.url, attempt_s=0.5)
    assert time.monotonic() - start < 2
    assert error.code == "network.timeout"
    assert "connected, but no whole answer" in (error.found or "")
    assert server.hung_up.wait(3)
    assert loopback.attempts_end()


def test_a_server_that_reads_nothing_meets_the_deadline(loopback: Loopback) -> None:
    """Sending counts too: a body larger than what the kernel buffers, to a server that never reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert loopback.refusal(url, body=bytes(32 * MAX_BODY), attempt_s=0.5).code == "network.timeout"
        assert time.monotonic() - start < 2
        assert loopback.attempts_end()


@pytest.mark.parametrize("tls", [False, True])
def test_sending_may_take_longer_than_connecting(loopback: Loopback, tmp_path: Path, tls: bool) -> None:
    """An event log over a slow line must not meet the short timeout that tells a dead address."""
    context = loopback.certificate(tmp_path)[0] if tls else None
    server = loopback.serve(loopback.honest, context, pause_s=0.6)
    # More than the kernel buffers, so that sending waits for the server to read.
    body = bytes(16 * MAX_BODY)
    assert loopback.ask(server.url, body=body, attempt_s=10, connect_s=0.3).body == loopback.answer


def test_the_budget_ends_an_attempt_that_would_take_longer(loopback: Loopback) -> None:
    """The attempt's limit is what is left of the budget, and no further URL is tried then."""
    server = loopback.serve(loopback.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"))
    start = time.monotonic()
    error = loopback.refusal(server.url, server.url, attempt_s=30, budget_s=0.5)
    assert time.monotonic() - start < 2
    assert "no answer in time" in (error.found or "")
    assert len(server.bodies) == 1


def test_a_spent_budget_asks_nobody(loopback: Loopback) -> None:
    """Not even the first URL."""
    server = loopback.serve(loopback.honest)
    assert loopback.refusal(server.url, budget_s=0).code == "budget.spent"
    assert server.bodies == []


def test_a_resolver_that_hangs_meets_the_deadline(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's resolver knows no deadline; the attempt has one."""
    release = threading.Event()

    def hangs(*_arguments: object, **_named: object) -> None:
        release.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    start = time.monotonic()
    error = loopback.refusal("http://verifier.invalid:8443", attempt_s=0.3)
    assert time.monotonic() - start < 2
    assert error.code == "network.timeout"
    assert "not connected yet" in (error.found or "")
    release.set()
    assert loopback.attempts_end()


def test_a_name_that_resolves_too_late_is_not_asked(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the attempt any more, so its request is not sent."""
    server = loopback.serve(loopback.honest)
    release = threading.Event()
    resolve = socket.getaddrinfo

    def late(host: str, port: int, *rest: int) -> object:
        release.wait(10)
        return resolve(host, port, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    assert loopback.refusal(server.url, attempt_s=0.3).code == "network.timeout"
    release.set()
    assert server.hung_up.wait(3)
    assert loopback.attempts_end()
    assert server.bodies == []


def test_tls_with_the_right_ca_answers(loopback: Loopback, tmp_path: Path) -> None:
    """The configured issuer, and no other store."""
    context, ca_file = loopback.certificate(tmp_path)
    assert loopback.ask(loopback.serve(loopback.honest, context).url, ca_file=ca_file).body == loopback.answer


def test_tls_with_another_ca_is_refused(
    loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CA is configured it counts, whatever bundle the environment names."""
    context, own = loopback.certificate(tmp_path)
    _, other = loopback.certificate(tmp_path, "other")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(own))
    server = loopback.serve(loopback.honest, context)
    assert loopback.refusal(server.url, ca_file=other).code == "network.tls"
    assert server.bodies == []


def test_a_ca_file_that_cannot_be_used_is_a_tls_failure(loopback: Loopback, tmp_path: Path) -> None:
    """Absent, or no certificate at all: never a fall back to an unauthenticated connection."""
    server = loopback.serve(loopback.honest, loopback.certificate(tmp_path)[0])
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    for ca_file in (tmp_path / "absent.pem", rubbish):
        assert loopback.refusal(server.url, ca_file=ca_file).code == "network.tls"
    assert server.bodies == []


def test_tls_without_a_ca_is_answered_by_signature_alone(loopback: Loopback, tmp_path: Path) -> None:
    """A guest's clock and CA store are the host's; the signature authenticates, and no warning is printed."""
    context, _ = loopback.certificate(tmp_path)
    assert loopback.ask(loopback.serve(loopback.honest, context).url).body == loopback.answer
    unsigned = loopback.serve(loopback.says(loopback.response(loopback.answer)), context)
    assert loopback.refusal(unsigned.url).code == "network.unsigned"


def test_tls_to_a_server_without_it_is_a_tls_failure(loopback: Loopback) -> None:
    """A wrong scheme in a URL is named."""
    assert (
        loopback.refusal(loopback.serve(loopback.honest).url.replace("http:", "https:")).code == "network.tls"
    )


def test_a_tls_handshake_that_hangs_meets_the_deadline(loopback: Loopback) -> None:
    """A listener that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        error = loopback.refusal(f"https://127.0.0.1:{listener.getsockname()[1]}", attempt_s=0.4)
        assert error.code == "network.timeout"
        assert time.monotonic() - start < 2
    assert loopback.attempts_end()


def test_a_slow_drip_over_tls_meets_the_deadline(loopback: Loopback, tmp_path: Path) -> None:
    """The connection is shut below TLS, which therefore has no say in it."""
    server = loopback.serve(
        loopback.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"), loopback.certificate(tmp_path)[0]
    )
    start = time.monotonic()
    assert loopback.refusal(server.url, attempt_s=0.5).code == "network.timeout"
    assert time.monotonic() - start < 2
    assert server.hung_up.wait(3)
    assert loopback.attempts_end()
