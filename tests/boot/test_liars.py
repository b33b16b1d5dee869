"""Whatever answers in the verifier's place, or does not: the boot waits, says what it waits for, and gets its key in the end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.attacks.hosts import Reply, own_key
from tests.attacks.test_hosts_that_answer import host_between
from tests.boot.estate import BOOT_S, Site
from tests.boot.monitor import Monitor, monitor
from tests.boot.scene import ROOT_TOOLS, Scene, played

from kagimori_protocol import messages, signature

pytestmark = [pytest.mark.boot, pytest.mark.slow]

LONGER_THAN_AN_ATTEMPT_S = 25
AWAY: Reply = (502, b"", None)
_OTHER_KEY = Ed25519PrivateKey.generate()


def unsigned(_path: str, _body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Give the verifier's own words without its signature, as a proxy does that knows better."""
    status, reply, _ = ask()
    return status, reply, None


def by_another_key(_path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Give the verifier's own words under another key."""
    status, reply, _ = ask()
    return status, reply, signature.sign(_OTHER_KEY, body, reply)


def in_its_name(_path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
    """Give the verifier's own words under another key, by the name of the verifier's."""
    status, reply, genuine = ask()
    assert genuine is not None, "the verifier has not signed"
    named, _, _ = genuine.rpartition("; sig=")
    _, _, forged = signature.sign(_OTHER_KEY, body, reply).rpartition("; sig=")
    return status, reply, f"{named}; sig={forged}"


class Host:
    """Whoever carries: honest but for what is set here, by path."""

    def __init__(self, cable: Monitor) -> None:
        """Begin honest."""
        self.lies: dict[str, Callable[[str, bytes, Callable[[], Reply]], Reply]] = {}
        self.ended = threading.Event()
        self._cable = cable

    def __call__(self, path: str, body: bytes, ask: Callable[[], Reply]) -> Reply:
        """Carry a request, or lie."""
        lie = self.lies.get(path)
        return ask() if lie is None else lie(path, body, ask)

    def slow(self, _path: str, _body: bytes, ask: Callable[[], Reply]) -> Reply:
        """Take longer than the guest waits."""
        self.ended.wait(LONGER_THAN_AN_ATTEMPT_S)
        return ask()

    def pull_the_cable(self, _path: str, _body: bytes, ask: Callable[[], Reply]) -> Reply:
        """Let the verifier decide, and the guest not hear of it."""
        reply = ask()
        self._cable.set_cable(plugged=False)
        return reply

    def away(self, _path: str, _body: bytes, _ask: Callable[[], Reply]) -> Reply:
        """Be a proxy without a verifier."""
        return AWAY


@contextlib.contextmanager
def babbling() -> Iterator[str]:
    """Serve what is no HTTP, and would clear a terminal."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(b"\x1b[2J\x00\xff garbage\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_boot_outlasts_whatever_is_no_verifier(site: Site) -> None:
    """No cable, nobody, garbage, no signature, two of another's, silence, a planted key, a cable pulled behind the evidence.

    In 2009, as far as the machine's clock knows. The reply was lost, so the same evidence gets the same answer, under one
    ledger line; and the Confirm that nobody took is sent by the booted system until somebody does.
    """
    with (
        monitor() as cable,
        site.serving() as served,
        host_between(served.url, host := Host(cable)) as url,
        babbling() as babble,
        played(
            site,
            None,
            Scene(
                booted=f"{ROOT_TOOLS}\nagent confirm",
                words=[*cable.words, "-rtc", "base=2009-01-01T00:00:00"],
            ),
        ) as machine,
    ):
        cable.set_cable(plugged=False)
        machine.wait_for(r"kagimori: network: \w+ has no carrier", BOOT_S)
        cable.set_cable(plugged=True)
        machine.wait_for(r"kagimori: network: \w+ has carrier and 10\.0\.2\.15/24", BOOT_S)
        machine.wait_for(r"home: the answer broke off", BOOT_S)
        machine.connect_verifier(babble)
        machine.wait_for(r"home: what came is not HTTP", BOOT_S)
        for lie, told in (
            (unsigned, r"home: the answer is not signed$"),
            (by_another_key, r"home: the answer is signed by a key that agent\.toml does not name"),
            (in_its_name, r"home: the answer is not signed by this verifier for this request"),
            (host.slow, r"home: no answer in time"),
        ):
            host.lies = {messages.PATH_CHALLENGE: lie}
            machine.connect_verifier(url)
            machine.wait_for(told, BOOT_S)
        host.lies = {messages.PATH_RELEASE: own_key}
        machine.wait_for(r"evidence collected", BOOT_S)
        machine.wait_for(r"no answer, sending the same evidence again", BOOT_S)
        seen = len(machine.lines)
        host.lies = {messages.PATH_RELEASE: host.pull_the_cable, messages.PATH_CONFIRM: host.away}
        machine.wait_for(r"kagimori: network: \w+ has no carrier", BOOT_S, seen)
        host.lies = {messages.PATH_CONFIRM: host.away}
        cable.set_cable(plugged=True)
        machine.wait_for(r"cryptroot: mapped", BOOT_S)
        machine.wait_for(r"the booted system sends the confirmation again", BOOT_S)
        machine.wait_for(r"root: confirm: .* The confirmation is sent again in", BOOT_S)
        assert site.events()[0] == "released"
        host.lies = {}
        machine.wait_for(r"root: confirm: home: has taken the confirmation", BOOT_S)
        machine.wait_off(BOOT_S)
        host.ended.set()
    assert machine.said(r"setting system clock to 2009-")
    assert machine.said(r"no verifier answers, try \d+ in [\d.]+ s \(\d+ s left\)")
    assert machine.said(r"guest: log kagimori: network: \w+ has no carrier"), "the booted system can read it"
    events = site.events()
    assert events[:2] == ["confirmed-opened", "released"]
    assert events.count("released") == 1
