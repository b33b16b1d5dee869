"""What a bite story is made of: a scene, a lie, the checks that stop it, and the goal that it reaches without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, Attacker, Told
from tests.attacks.bite.blind import Twin, blind
from tests.worlds import Owner

from kagimori_agent.devices.vtpm import Vtpm as OpenVtpm
from kagimori_protocol.errors import KagimoriError
from kagimori_protocol.messages import Verdict
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm

Where = Literal["honest", "evil", "capped", "uki", "direct", "agent", "doors"]
"""Which VM the attacker has in its hands: its honest boot, one with the attacker's kernel, its honest boot after the
agent has capped it, one that boots a UKI, one without an SVSM, one where an agent makes the TPM's keys itself, or one whose
owner has accepted a command line that lets the host in."""


class Stopped(Exception):
    """The attack ends here; ``by`` names the checks that ended it."""

    def __init__(self, *by: str) -> None:
        super().__init__(", ".join(sorted(by)))
        self.by = frozenset(by)


@dataclass(frozen=True)
class Stand:
    """A VM's TPM that many stories share: it stays open. ``keys`` are EK and AK, made once, or None to make them each time."""

    svsm: Svsm
    vtpm: OpenVtpm
    keys: tuple[bytes, bytes] | None


@dataclass
class Scene:
    """One enrolled VM in the attacker's hands, for one story; ``kept`` is what the story's preparation leaves for it."""

    office: Owner
    machine: SnpMachine
    profile: str
    svsm: Svsm | None = None
    stand: Stand | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def attacker(self) -> Attacker:
        """Ask as the VM does, with a fresh HPKE key."""
        if self.stand is None:
            return Attacker(self.office, self.machine, None, None)
        return Attacker(self.office, self.machine, self.svsm, self.stand.vtpm, keys=self.stand.keys)

    @property
    def monitor(self) -> Svsm:
        assert self.svsm is not None
        return self.svsm


@dataclass(frozen=True)
class Story:
    """One lie. Blind to all of ``checks`` its goal is reached; blind to all but one, that one stops it.

    ``attack`` returns when the goal is reached and raises ``Stopped`` when it is not. ``prepare`` is done once, by a
    verifier that sees. ``twins`` take the place of TWINS where a name guards more than one door.
    """

    told: str
    checks: tuple[str, ...]
    attack: Callable[[Scene], None]
    where: Where = "honest"
    prepare: Callable[[Scene], None] = lambda _: None
    twins: Mapping[str, Twin] = field(default_factory=dict)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Take an error of the product's for the check that it names."""
    try:
        yield
    except KagimoriError as error:
        raise Stopped(error.code) from error


def loot(attacker: Attacker, told: Told) -> dict[str, bytes]:
    """Give the keys in an answer, or say what stopped them: a denial, a verdict, or that the answer does not open."""
    if told.denial is not None:
        raise Stopped(attacker.office.refusals()[0].code)
    with named():
        payload = attacker.open(told)
    if isinstance(payload, Verdict):
        raise Stopped(*(check.id for check in payload.checks if not check.ok))
    return {volume.uuid: volume.unlock_key for volume in payload.volumes}


def sent(attacker: Attacker, parts: dict[str, Any]) -> Told:
    """Send evidence to a verifier that may fail as a whole."""
    with named():
        return attacker.send(parts)


def steal(attacker: Attacker, parts: dict[str, Any]) -> None:
    """Send evidence; the goal is to hold the VM's unlock key."""
    assert loot(attacker, sent(attacker, parts)) == {UUID: UNLOCK_KEY}


def ask_as_the_vm_does(scene: Scene) -> None:
    """Tell no lie in the protocol: the lie lies below, in the machine or in the owner's books."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence())


def hold(story: Story, scene: Scene, twins: Mapping[str, Twin]) -> None:
    """Hold a story to its words: each of its checks alone stops the attack, and without any of them it gets through."""
    known = dict(twins) | dict(story.twins)
    story.prepare(scene)
    for last in story.checks:
        with blind(set(story.checks) - {last}, known):
            assert stopped(story, scene) == {last}
    if len(story.checks) > 1:
        assert stopped(story, scene) <= set(story.checks)
    with blind(story.checks, known):
        story.attack(scene)


def stopped(story: Story, scene: Scene) -> frozenset[str]:
    """Play an attack that must fail; gives the checks that ended it."""
    try:
        story.attack(scene)
    except Stopped as ended:
        return ended.by
    pytest.fail(f"nothing stops this: {story.told}")
