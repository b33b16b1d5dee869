"""The host answers in the verifier's place: whatever it says, an unmodified agent takes only what its verifier signed."""

from __future__ import annotations

import contextlib
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import msgspec
import pytest
import requests
from tests.attacks.hosts import (
    Middle,
    Reply,
    own_key,
    own_key_under_its_name,
    signature_of_the_true_answer,
    unsigned,
)

from kagimori_agent.unlock import unlock
from kagimori_protocol import messages, signature
from kagimori_protocol.errors import KagimoriError, NetworkError
from kagimori_protocol.messages import Challenge

if TYPE_CHECKING:
    from tests.worlds import Enrolled

pytestmark = pytest.mark.slow  # the quick suite has three minutes

HONEST_S = 20.0
"""Budget where an answer is expected; where none is, a boot has given up after a second."""


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing of an agent that has hung up."""


@contextlib.contextmanager
def host_between(url: str, middle: Middle) -> Iterator[str]:
    """Put a host between agent and verifier; yields the URL that the agent then asks."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))

            def ask() -> Reply:
                true = requests.post(url + self.path, data=body, timeout=10)
                return true.status_code, true.content, true.headers.get(signature.HEADER)

            status, reply, signed = middle(self.path, body, ask)
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            if signed is not None:
                self.send_header(signature.HEADER, signed)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = _Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def unlock_through(
    enrolled: Enrolled, middle: Middle, budget_s: float = 1.0
) -> tuple[KagimoriError | None, list[str], bytes]:
    """Let the VM's agent unlock through a host; returns its error, what it said, and the cap PCR afterwards."""
    said: list[str] = []
    error: KagimoriError | None = None
    with (
        host_between(enrolled.owner.url, middle) as url,
        enrolled.booted(verifiers=[enrolled.verifier(url)]) as (world, config),
    ):
        limits = msgspec.structs.replace(
            config.limits, boot_budget_s=budget_s, backoff_min_s=0.2, backoff_max_s=0.2, gather_s=0.1
        )
        try:
            unlock(msgspec.structs.replace(config, limits=limits), said.append, prove=True)
        except KagimoriError as caught:
            error = caught
        assert world.vtpm is not None
        return error, said, world.vtpm.pcr(15)


def challenge_as_answer(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Answer evidence with a Denial that the verifier signed for something else."""
    if path != messages.PATH_RELEASE:
        return ask()
    denial = messages.encode(messages.Denial(version=1, session=b"", code="unknown-vm"))
    return 403, denial, "ed25519; key=0123456789abcdef; sig=" + b64encode(bytes(64)).decode()


def success_without_words(path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Say 200 and nothing, or redirect, or time out: a status is nobody's word."""
    return (200, b"", None) if path == messages.PATH_RELEASE else ask()


@pytest.mark.parametrize(
    "middle",
    [
        unsigned,
        own_key,
        own_key_under_its_name,
        signature_of_the_true_answer,
        challenge_as_answer,
        success_without_words,
    ],
    ids=lambda middle: middle.__name__,
)
def test_a_host_that_answers_in_the_verifiers_place_is_only_away(enrolled: Enrolled, middle: Middle) -> None:
    """T18: a planted disk opens with the attacker's key, so the agent must not take one from anybody.

    To the agent there is no verifier; it gives up when its budget is spent, and caps the boot on the way out.
    """
    error, said, cap = unlock_through(enrolled, middle)
    assert isinstance(error, NetworkError), error
    assert any("Trying again" in line for line in said) or error.code == "budget.spent"
    assert cap != bytes(32), "a boot that has given up is capped"
    assert set(enrolled.owner.events()) <= {"released"}


@pytest.mark.parametrize("path", [messages.PATH_CHALLENGE, messages.PATH_RELEASE])
def test_a_recorded_reply_of_an_earlier_session_is_no_answer(enrolled: Enrolled, path: str) -> None:
    """T8, T18: the host plays what the verifier signed in an earlier boot: a Challenge, an answer.

    The signature covers the request that it was for, and each boot's Hello has a key that never was before.
    """
    recorded: dict[str, Reply] = {}

    def record(path: str, _: bytes, ask: Callable[[], Reply]) -> Reply:
        recorded[path] = ask()
        return recorded[path]

    def replay(asked: str, _: bytes, ask: Callable[[], Reply]) -> Reply:
        return recorded[asked] if asked == path else ask()

    error, _, _ = unlock_through(enrolled, record, HONEST_S)
    assert error is None
    error, _, cap = unlock_through(enrolled, replay)
    assert isinstance(error, NetworkError), error
    assert cap != bytes(32)


def test_a_challenge_that_asks_for_nothing_cannot_come_from_the_host(enrolled: Enrolled) -> None:
    """T22: the host rewrites the Challenge on its way to the agent; the agent sees that nobody signed it."""
    from kagimori_protocol.tpm import NO_PCRS

    def rewrite(path: str, _: bytes, ask: Callable[[], Reply]) -> Reply:
        status, body, signed = ask()
        if path == messages.PATH_CHALLENGE:
            challenge = messages.decode(Challenge, body)
            body = messages.encode(msgspec.structs.replace(challenge, pcr_selection=NO_PCRS))
        return status, body, signed

    error, _, cap = unlock_through(enrolled, rewrite)
    assert isinstance(error, NetworkError), error
    assert cap != bytes(32)
    assert enrolled.owner.events() == []


def test_a_host_that_only_carries_learns_nothing_that_opens_the_disk(enrolled: Enrolled) -> None:
    """T17, T18: an honest run through a curious host; in all that it carried there is no key."""
    carried: list[bytes] = []

    def listen(_: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
        reply = ask()
        carried.extend((body, reply[1]))
        return reply

    error, _, _ = unlock_through(enrolled, listen, HONEST_S)
    assert error is None
    assert len(carried) == 6
    key = enrolled.unlock_key
    assert not any(
        form in part for part in carried for form in (key, b64encode(key)[:-2], key.hex().encode())
    )
