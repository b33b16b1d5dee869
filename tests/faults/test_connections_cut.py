"""The network between VM and verifier fails at every kind of byte, in both directions: nothing is lost, nothing doubled.

What is sent are the agent's own requests over the agent's own HTTP; the proxy between stands for whatever lies between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tests.attacks.attacker import Told
from tests.faults import invariants
from tests.faults.guests import Guest
from tests.faults.proxies import WAIT_S, Cut, Manner, Network
from tests.worlds import Enrolled, Owner

from kagimori_agent.unlock import unlock
from kagimori_protocol import messages
from kagimori_protocol.errors import NetworkError
from kagimori_protocol.messages import Kind
from kagimori_simulator.amd import AmdRoot

pytestmark = pytest.mark.slow  # some hundred exchanges

MANNERS: dict[Manner, Kind] = {"close": "svsm-vtpm", "reset": "snp-direct", "silence": "svsm-vtpm"}
"""Ways in which a connection ends, and the kind of VM that meets each."""
REQUESTS = ("challenge", "release", "confirm")
SILENT_S = 2.0
"""How long the agent of these stories waits for what does not come: long enough for a busy machine to send what does."""

PLACES: dict[str, tuple[float, float, int]] = {
    "before the first byte": (0, 0, 0),
    "after one byte": (0, 0, 1),
    "within the first line": (0, 0, 9),
    "within the head": (0.5, 0, 0),
    "one byte before the head's end": (1, 0, -1),
    "at the head's end": (1, 0, 0),
    "after one byte of the body": (1, 0, 1),
    "within the body": (0.5, 0.5, 0),
    "one byte before the end": (0, 1, -1),
    "at the end": (0, 1, 0),
}
"""How much arrives, as Cut has it: heads, messages, bytes."""
SILENT_PLACES = ("before the first byte", "within the head", "at the head's end", "within the body")
"""A connection that falls silent is noticed by a clock, so fewer places are looked at."""


def cases() -> Iterator[object]:
    """Give every message of the exchange, cut at every kind of byte, in every manner."""
    for manner, kind in MANNERS.items():
        for request in REQUESTS:
            for direction in ("request", "reply"):
                for place in PLACES:
                    # A request that arrives whole and has no reply is a reply that is cut before its first byte.
                    if (manner != "silence" or place in SILENT_PLACES) and (direction, place) != (
                        "request",
                        "at the end",
                    ):
                        yield pytest.param(
                            kind,
                            request,
                            direction,
                            place,
                            manner,
                            id=f"{request}'s {direction} {place}, {manner}",
                        )


@dataclass
class Exchange:
    """A VM, its verifier and the network between them."""

    guest: Guest
    owner: Owner
    network: Network
    received: list[str] = field(default_factory=list)
    """The requests whose first try was answered, though something was cut."""

    def run(self) -> None:
        """Go through the whole exchange; whatever was not answered is asked again, with the same bytes."""
        guest = self.guest
        hello = guest.at(self.network.url).hello()
        challenge = messages.SignedChallenge(key=guest.public_key, challenge=self.ask("challenge", hello))
        evidence = messages.encode(messages.Evidence(**guest.attacker.evidence(hello, challenge)))
        told = Told(evidence, self.ask("release", evidence))
        self.ask("confirm", guest.confirmation(told))
        answers = [Told(evidence, body) for name, body in self.network.replies if name == "release"]
        opened = [guest.open(one) for one in answers]
        invariants.nothing_is_released_that_the_ledger_lacks(self.owner.directory, opened)
        invariants.nothing_is_released_twice(self.owner.directory, opened)
        invariants.opened_is_recorded_once(self.owner.directory, opened[0].session)
        assert {one.body for one in answers} == {told.body}, "the same bytes get the same answer"
        assert self.owner.events() == ["released", "confirmed-opened"]

    def ask(self, name: str, body: bytes) -> bytes:
        """Ask, and ask again where the first try was cut."""
        cut = self.network.cuts.get(name)
        if cut is not None:
            before = self.owner.events()
            patience_s = SILENT_S if cut.manner == "silence" else WAIT_S
            with contextlib.suppress(NetworkError):
                self.guest.ask(self.network.url, f"/v1/{name}", body, patience_s)
                self.received.append(name)
            assert self.network.made.wait(WAIT_S), "the network has not got so far"
            if cut.direction == "request":
                assert self.owner.events() == before, "a part of a request is none"
        return self.guest.ask(self.network.url, f"/v1/{name}", body)


@pytest.fixture
def exchange(guest: Guest, amd: AmdRoot, tmp_path: Path) -> Iterator[Exchange]:
    """Begin one."""
    with (
        Owner.opened(guest.copy(tmp_path / "verifier"), amd) as owner,
        owner.served() as url,
        Network.to(url) as network,
    ):
        yield Exchange(guest, owner, network)


@pytest.mark.parametrize(("guest", "name", "direction", "place", "manner"), list(cases()), indirect=["guest"])
def test_whatever_is_cut_is_asked_again_and_the_vm_gets_its_key_once(
    exchange: Exchange, name: str, direction: Literal["request", "reply"], place: str, manner: Manner
) -> None:
    """The first try counts only if every byte of its reply came; the second is as if there had been none before."""
    exchange.network.cuts[name] = Cut(direction, PLACES[place], manner)
    exchange.run()
    assert exchange.received == ([name] if (direction, place) == ("reply", "at the end") else [])


@pytest.mark.parametrize("guest", ["svsm-vtpm", "snp-direct"], indirect=True)
def test_a_network_that_sends_everything_three_times_gets_nobody_more_than_once(exchange: Exchange) -> None:
    """Whoever sits in it may repeat what it saw; the replies are the same, and the ledger has each line once."""
    exchange.network.repeats = 3
    exchange.run()
    assert [name for name, _ in exchange.network.replies].count("release") == 3


LOST = {
    "the challenge's request": ("challenge", Cut("request", PLACES["within the body"], "close")),
    "the challenge": ("challenge", Cut("reply", PLACES["before the first byte"], "reset")),
    "the evidence": ("release", Cut("request", PLACES["one byte before the end"], "close")),
    "the answer": ("release", Cut("reply", PLACES["before the first byte"], "close")),
    "the answer's last byte": ("release", Cut("reply", PLACES["one byte before the end"], "reset")),
    "the answer's signature": ("release", Cut("reply", PLACES["within the head"], "close")),
}


@pytest.mark.parametrize("lost", LOST)
def test_an_agent_that_loses_a_message_unlocks_all_the_same(enrolled: Enrolled, lost: str) -> None:
    """The whole agent, with its own patience: it asks again within its budget, opens the volume, caps, confirms."""
    name, cut = LOST[lost]
    with Network.to(enrolled.owner.url) as network:
        network.cuts[name] = cut
        with enrolled.booted(verifiers=[enrolled.verifier(network.url)]) as (world, config):
            unlocked = unlock(config, lambda _: None, prove=True)
            assert world.vtpm is not None
            invariants.the_boot_is_capped(world.vtpm)
    assert unlocked.confirmed
    assert not network.cuts
    invariants.nothing_is_released_that_the_ledger_lacks(enrolled.owner.directory)
    invariants.nothing_is_released_twice(enrolled.owner.directory)
    assert enrolled.owner.events() == ["released", "confirmed-opened"]


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_an_agent_whose_confirm_is_lost_has_opened_its_volumes_and_says_so(
    enrolled: Enrolled, direction: Literal["request", "reply"]
) -> None:
    """It is told once; the boot goes on. What the ledger has is what arrived."""
    said: list[str] = []
    with Network.to(enrolled.owner.url) as network:
        network.cuts["confirm"] = Cut(direction, PLACES["one byte before the end"], "close")
        with enrolled.booted(verifiers=[enrolled.verifier(network.url)]) as (_, config):
            unlocked = unlock(config, said.append, prove=True)
    assert not unlocked.confirmed
    assert "has not taken the confirmation (network.closed)" in said[-1]
    assert enrolled.owner.events() == ["released"] + ["confirmed-opened"] * (direction == "reply")
