"""Whatever a host puts on the wire in place of an answer: an answer of the verifier's, or a NetworkError with a code."""

from __future__ import annotations

import contextlib
import gc
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagimori_agent.console import explain
from kagimori_agent.exchange import Reply
from kagimori_protocol.errors import NetworkError

if TYPE_CHECKING:
    from tests.unit.exchange.conftest import Loopback

patient = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Spoken:
    """What the server says next; a fixture serves it, so that one server does for all examples."""

    what = b""
    sign = False


@pytest.fixture
def spoken(loopback: Loopback) -> tuple[Spoken, str]:
    """Give what to set, and the server's URL."""
    said = Spoken()

    def behave(connection: socket.socket, _head: bytes, body: bytes) -> None:
        what = said.what
        if said.sign:
            what = what.replace(b"\0SIGNED\0", loopback.sign(body).encode())
        with contextlib.suppress(OSError):
            connection.sendall(what)

    return said, loopback.serve(behave).url


OF_AN_ANSWER = {
    f"network.{code}"
    for code in ("http", "closed", "timeout", "encoding", "too-large", "unsigned", "bad-signature")
}
HEADS = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 500 \r\n", b"HTTP/1.1 302 Found\r\n", b"HTTP/9 x\r\n"]
)
LINES = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 5, 6",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Content-Encoding: gzip",
        b"Location: http://127.0.0.1:1/",
        b"Connection: upgrade",
        b"Kagimori-Signature: ed25519; key=0; sig=0",
        b"Kagimori-Signature: \xff\x80",
        b"\0SIGNED\0",
        b"Set-Cookie: a=b",
        b": nothing",
        b" folded",
        b"no colon",
        b"x" * 70_000 + b": y",
    ]
)
BODIES = st.sampled_from(
    [
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"fffffffff\r\nx",
        b"zz\r\n",
        b'{"type":"denial"}',
        b"-1\r\n\r\n",
    ]
)


@patient
@given(
    what=st.binary(max_size=200)
    | st.builds(
        lambda head, lines, end, body, rest: (
            head + b"".join(line + b"\r\n" for line in lines) + end + body + rest
        ),
        HEADS,
        st.lists(LINES, max_size=4),
        st.sampled_from([b"\r\n", b"\n", b""]),
        BODIES,
        st.binary(max_size=20),
    )
)
def test_any_bytes_on_the_wire_are_an_answer_or_a_network_error(
    loopback: Loopback, spoken: tuple[Spoken, str], capsys: pytest.CaptureFixture[str], what: bytes
) -> None:
    """Status lines, headers and chunks are parsed by others' code: none of its errors gets past ours."""
    said, url = spoken
    said.what, said.sign = what, False
    with pytest.raises(NetworkError) as caught:
        loopback.ask(url)
    # The server is there: what is told must not send anybody to look for it elsewhere.
    assert caught.value.code in OF_AN_ANSWER
    assert caught.value.found
    assert len(str(caught.value)) < 3000
    explain(caught.value)
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


@patient
@given(
    before=st.lists(LINES.filter(lambda line: line.startswith(b"Set-")), max_size=1),
    body=st.binary(max_size=60),
    signed=st.booleans(),
)
def test_only_the_body_that_was_signed_is_an_answer(
    loopback: Loopback, spoken: tuple[Spoken, str], before: list[bytes], body: bytes, signed: bool
) -> None:
    """A genuine signature around another body is none, and a genuine body without its signature neither."""
    said, url = spoken
    sent = loopback.answer if signed else body
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(sent), *before, b"\0SIGNED\0", b"", b""]
    said.what, said.sign = b"\r\n".join(head) + sent, True
    if signed or body == loopback.answer:
        assert isinstance(loopback.ask(url), Reply)
        return
    with pytest.raises(NetworkError) as caught:
        loopback.ask(url)
    assert caught.value.code == "network.bad-signature"


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "500 x"])
def test_an_answer_that_the_library_chokes_on_leaves_no_connection_open(
    loopback: Loopback, spoken: tuple[Spoken, str], status: str
) -> None:
    """Two lengths in one header: its parser gives up with the connection in its hands, and a boot asks for hours."""
    said, url = spoken
    said.what = f"HTTP/1.1 {status}\r\nContent-Length: 5, 6\r\n\r\nhello".encode()
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(NetworkError) as caught:
                loopback.ask(url)
            assert caught.value.code == "network.http"
        after = len(list(Path("/proc/self/fd").iterdir()))
    finally:
        gc.enable()
    assert after - before < 5
