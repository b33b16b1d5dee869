"""What the booted system sends again is what the boot has kept, and it stops when the verifier has said anything signed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests.unit.exchange.conftest import Loopback

from kagimori_agent.confirm import keep, resend
from kagimori_agent.exchange import Endpoint
from kagimori_protocol import messages
from kagimori_protocol.errors import KagimoriError, PeerError, Refused, UsageError

BODY = b'{"type":"confirm"}'
RECEIPT = messages.encode(messages.Receipt(version=1, session=b"token", outcome="opened"))
DENIAL = messages.encode(messages.Denial(version=1, session=b"token", code="unknown-session"))


class _Loopback(Loopback):
    def behave(self, connection: socket.socket, _head: bytes, body: bytes) -> None:
        """Sign an answer, from the third request on."""
        if len(self._servers[0].bodies) < 3:
            connection.sendall(self.response(b"", status="503 Service Unavailable"))
        else:
            connection.sendall(self.response(self.answer, self.sign(body, self.answer)))


@pytest.fixture
def loopback() -> _Loopback:
    """Give a verifier that is ill twice."""
    return _Loopback()


def _told(loopback: _Loopback, path: Path, answer: bytes) -> tuple[str | KagimoriError | None, list[str]]:
    loopback.answer = answer
    server = loopback.serve(loopback.behave)
    assert keep(Endpoint("home", (server.url,), (loopback.public,)), BODY, path)
    said: list[str] = []
    try:
        return resend(said.append, path, sleep=lambda _: None), said
    except KagimoriError as error:
        return error, said
    finally:
        loopback.close()
        assert server.bodies == [BODY] * 3


def test_a_confirm_is_sent_until_it_is_taken(loopback: _Loopback, tmp_path: Path) -> None:
    """What is not signed is nobody's word, so the same bytes go again."""
    name, said = _told(loopback, tmp_path / "confirm", RECEIPT)
    assert name == "home"
    assert len(said) == 2
    assert all("sent again in" in line for line in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "kind"), [(DENIAL, Refused), (Loopback.answer, PeerError)])
def test_a_signed_no_is_final(
    loopback: _Loopback, tmp_path: Path, answer: bytes, kind: type[KagimoriError]
) -> None:
    """Asked for ever, it would stay one."""
    error, _ = _told(loopback, tmp_path / "confirm", answer)
    assert isinstance(error, kind)
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_place_nothing_is_kept(tmp_path: Path) -> None:
    """Outside of a boot nobody would ever send it."""
    endpoint = Endpoint("home", ("http://verifier",), (bytes(32),))
    assert not keep(endpoint, BODY, tmp_path / "gone/confirm")
    assert resend(lambda _: None, tmp_path / "gone/confirm") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 5000, b'{"name":1}', bytes(70_000)])
def test_what_was_not_kept_by_us_is_not_sent(tmp_path: Path, content: bytes) -> None:
    """And is told as what it is."""
    path = tmp_path / "confirm"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resend(lambda _: None, path)
    assert caught.value.code == "confirm.kept"


def test_a_directory_in_its_place_is_told(tmp_path: Path) -> None:
    """No traceback, whatever lies there."""
    with pytest.raises(UsageError) as caught:
        resend(lambda _: None, tmp_path)
    assert caught.value.code == "confirm.kept"
