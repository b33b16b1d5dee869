"""What counts as an answer, and what the error says of everything else."""

from __future__ import annotations

import gzip
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kagimori_agent.exchange import Reply
from kagimori_protocol import signature

if TYPE_CHECKING:
    from tests.unit.exchange.conftest import Loopback


def test_a_signed_answer_is_returned_with_its_key(loopback: Loopback) -> None:
    """The honest case: bytes, key, URL and status."""
    server = loopback.serve(loopback.honest)
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    reply = loopback.ask(server.url, keys=(other, loopback.public))
    assert reply == Reply(loopback.answer, loopback.public, server.url + loopback.path, 200)
    assert server.bodies == [loopback.request]


def test_a_request_says_no_more_than_it_must(loopback: Loopback) -> None:
    """No cookie, no credential, no compression, and no connection kept for later."""
    server = loopback.serve(loopback.honest)
    loopback.ask(server.url + "/")
    lines = server.heads[0].decode().split("\r\n")
    assert lines[0] == f"POST {loopback.path} HTTP/1.1"
    assert sorted(line.lower() for line in lines[1:]) == sorted(
        [
            f"host: {server.url.removeprefix('http://')}",
            "accept: application/json",
            "accept-encoding: identity",
            "connection: close",
            f"content-length: {len(loopback.request)}",
            "content-type: application/json",
            f"kagimori-keys: {signature.key_id(loopback.public)}",
            "user-agent: kagimori-agent",
        ]
    )


def test_proxies_of_the_environment_are_ignored(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable must not send the boot's request elsewhere."""
    server, proxy = loopback.serve(loopback.honest), loopback.serve(loopback.honest)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    loopback.ask(server.url)
    assert len(server.bodies) == 1
    assert proxy.bodies == []


def test_netrc_is_ignored(loopback: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A password meant for others is not sent."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password something\ndefault login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    server = loopback.serve(loopback.honest)
    loopback.ask(server.url)
    assert b"authorization" not in server.heads[0].lower()


def test_a_redirect_is_not_followed(loopback: Loopback) -> None:
    """Even to a server that would answer: agent.toml alone says where a verifier is."""
    elsewhere = loopback.serve(loopback.honest)
    server = loopback.serve(
        loopback.says(
            loopback.response(
                b"", f"Location: {elsewhere.url}{loopback.path}", status="307 Temporary Redirect"
            )
        )
    )
    error = loopback.refusal(server.url)
    assert error.code == "network.unsigned"
    assert "307" in (error.found or "")
    assert elsewhere.bodies == []


def test_a_chunked_body_is_read(loopback: Loopback) -> None:
    """A server in front of a verifier may send the same bytes in pieces."""

    def behave(connection: socket.socket, _head: bytes, request: bytes) -> None:
        connection.sendall(
            f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            f"{signature.HEADER}: {signature.sign(loopback.key, request, loopback.answer)}\r\n\r\n".encode()
        )
        for piece in (loopback.answer[:5], loopback.answer[5:], b""):
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

    assert loopback.ask(loopback.serve(behave).url).body == loopback.answer


def test_an_unsigned_200_means_away(loopback: Loopback) -> None:
    """A captive portal says 200 to everything."""
    error = loopback.refusal(loopback.serve(loopback.says(loopback.response(loopback.answer))).url)
    assert error.code == "network.unsigned"
    assert error.exit_code == 6
    assert error.todo


def test_a_signature_of_another_form_is_none(loopback: Loopback) -> None:
    """Two of them are one too many."""

    def twice(connection: socket.socket, _head: bytes, body: bytes) -> None:
        connection.sendall(loopback.signed(body, loopback.sign(body, loopback.answer)))

    assert loopback.refusal(loopback.serve(twice).url).code == "network.unsigned"


def test_a_reply_signed_for_another_request_is_refused(loopback: Loopback) -> None:
    """A recorded answer answers nothing else."""
    assert (
        loopback.refusal(loopback.serve(loopback.says(loopback.signed(b"another request"))).url).code
        == "network.bad-signature"
    )


def test_a_reply_signed_by_an_unknown_key_is_refused(loopback: Loopback) -> None:
    """A verifier is who agent.toml says it is, by its key."""
    server = loopback.serve(
        loopback.says(loopback.signed(loopback.request, key=Ed25519PrivateKey.generate()))
    )
    error = loopback.refusal(server.url)
    assert error.code == "network.unknown-key"
    assert "kagimori-verifier vm config" in (error.todo or "")
    assert signature.key_id(loopback.public) in (error.expected or "")


def test_an_endpoint_without_keys_has_no_answers(loopback: Loopback) -> None:
    """Empty means no."""
    assert loopback.refusal(loopback.serve(loopback.honest).url, keys=()).code == "network.unknown-key"


def test_a_request_says_by_which_keys_a_reply_would_be_believed(loopback: Loopback) -> None:
    """A verifier that is changing its keys then signs by one of them (ADR 8)."""
    heads: list[bytes] = []

    def listen(connection: socket.socket, head: bytes, body: bytes) -> None:
        heads.append(head)
        loopback.honest(connection, head, body)

    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    loopback.ask(loopback.serve(listen).url, keys=(loopback.public, other))
    named = f"Kagimori-Keys: {signature.key_id(loopback.public)}, {signature.key_id(other)}"
    assert named.encode() in heads[0].split(b"\r\n")


@pytest.mark.parametrize("status", ["403 Forbidden", "500 Internal Server Error", "307 Temporary Redirect"])
def test_a_signed_reply_of_any_status_is_an_answer(loopback: Loopback, status: str) -> None:
    """The signature decides, not the status: a denial is an answer."""
    reply = loopback.ask(
        loopback.serve(
            loopback.says(loopback.signed(loopback.request, "Location: http://127.0.0.1:1/", status=status))
        ).url
    )
    assert reply.body == loopback.answer
    assert reply.status == int(status[:3])


@pytest.mark.parametrize("encoding", ["gzip", "identity", "br"])
def test_an_encoded_answer_is_refused(loopback: Loopback, encoding: str) -> None:
    """Nobody asked for one, and unpacking is what a bomb waits for."""
    packed = gzip.compress(loopback.answer)
    error = loopback.refusal(
        loopback.serve(loopback.says(loopback.response(packed, f"Content-Encoding: {encoding}"))).url
    )
    assert error.code == "network.encoding"
    assert encoding in (error.found or "")


def test_a_second_url_answers_when_the_first_is_dead(loopback: Loopback) -> None:
    """One verifier may be reached on several ways."""
    server = loopback.serve(loopback.honest)
    assert loopback.ask(loopback.closed_port(), server.url).url == server.url + loopback.path


def test_an_unsigned_first_url_does_not_stand_before_the_second(loopback: Loopback) -> None:
    """What is no answer is passed over, whatever it is."""
    portal, server = (
        loopback.serve(loopback.says(loopback.response(b"<html>"))),
        loopback.serve(loopback.honest),
    )
    assert loopback.ask(portal.url, server.url).url == server.url + loopback.path


def test_the_error_after_all_urls_tells_all_of_them(loopback: Loopback) -> None:
    """With the code they have in common, or the general one."""
    dead, portal = loopback.closed_port(), loopback.serve(loopback.says(loopback.response(b""))).url
    different = loopback.refusal(dead, portal)
    assert different.code == "verifier-away"
    assert different.found == f"{dead}: connection refused; {portal}: the answer is not signed"
    assert loopback.refusal(dead, dead).code == "network.refused"


def test_a_refused_port_is_told_from_a_name_that_does_not_resolve(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are repaired in different places."""
    refused = loopback.refusal(loopback.closed_port())
    assert refused.code == "network.refused"
    assert "Connection refused" in (refused.found or "")

    def unknown(*_arguments: object, **_named: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    unresolved = loopback.refusal("http://verifier.invalid:8443")
    assert unresolved.code == "network.dns"
    assert "Name or service not known" in (unresolved.found or "")
    assert unresolved.todo != refused.todo


def test_an_address_without_a_route_is_named_so(loopback: Loopback) -> None:
    """TCP to a multicast address has none on any Linux."""
    assert loopback.refusal("http://224.0.0.1:9").code == "network.no-route"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "network.http"),
        (b"", "network.closed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "network.closed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "network.closed"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", "network.http"),
    ],
    ids=["another protocol", "nothing", "cut short", "bad chunk", "too many headers"],
)
def test_what_is_not_http_is_away(loopback: Loopback, sent: bytes, code: str) -> None:
    """Whatever listens there, it ends in a named error."""
    assert loopback.refusal(loopback.serve(loopback.says(sent)).url).code == code


@pytest.mark.parametrize(
    "url",
    ["", "verifier", "ftp://verifier", "http://", "http://[::1", "http://a..b", "http://x:port", "http://*"],
)
def test_a_url_that_makes_no_sense_is_a_named_error(loopback: Loopback, url: str) -> None:
    """No ValueError out of a library."""
    assert loopback.refusal(url).code in {"network.url", "network.dns"}


def test_an_endpoint_without_urls_is_away(loopback: Loopback) -> None:
    """Empty means no."""
    assert loopback.refusal().code == "network.url"
