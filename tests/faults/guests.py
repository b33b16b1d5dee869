"""A VM of each kind, driven by hand as its agent would drive it, and the verifier's directory that knows it.

All copies of one directory share their keys: evidence that answers one copy's challenge answers every copy's. So a VM
is made once, and each story has a database of its own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.attacker import UNLOCK_KEY, UUID, Attacker, Prey, Told, closing
from tests.worlds import CHIP_ID, DIRECT, SVSM, Owner, enrol_direct_vm, enrol_grub_vm

from kagimori_agent import exchange
from kagimori_agent.budget import Budget
from kagimori_protocol import messages
from kagimori_protocol.messages import Evidence, Kind
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

KINDS: tuple[Kind, ...] = ("svsm-vtpm", "snp-direct")
ENROL = {"svsm-vtpm": enrol_grub_vm, "snp-direct": enrol_direct_vm}
ATTEMPT_S = 30.0
"""An honest answer comes at once; on a busy machine, later."""


@dataclass(frozen=True)
class Opened:
    """An answer that could be opened."""

    session: str
    evidence_sha256: bytes
    keys: dict[str, bytes]


@dataclass
class Guest:
    """One VM, its verifier's directory as it was before anything happened, and the means to ask."""

    kind: Kind
    template: Path
    public_key: bytes
    attacker: Attacker

    def copy(self, directory: Path) -> Path:
        """Give a verifier of its own to one story."""
        return Path(shutil.copytree(self.template, directory))

    def ask(self, url: str, path: str, body: bytes, attempt_s: float = ATTEMPT_S) -> bytes:
        """Ask as the agent does: raises NetworkError unless a signed answer comes."""
        endpoint = exchange.Endpoint("home", (url,), (self.public_key,))
        return exchange.post(
            endpoint, path, body, attempt_s=attempt_s, connect_s=attempt_s, budget=Budget(attempt_s)
        ).body

    def at(self, url: str) -> Attacker:
        """Give the means to drive the whole exchange with one verifier."""
        self.attacker._post = lambda path, body: self.ask(url, path, body)
        return self.attacker

    def evidence(self, url: str) -> bytes:
        """Draw a challenge and collect the evidence that answers it."""
        return messages.encode(Evidence(**self.at(url).evidence()))

    def release(self, url: str, evidence: bytes, attempt_s: float = ATTEMPT_S) -> Told:
        """Send evidence."""
        return Told(evidence, self.ask(url, messages.PATH_RELEASE, evidence, attempt_s))

    def open(self, told: Told) -> Opened:
        """Open an answer, which must hold the key."""
        keys = self.attacker.keys(told)
        assert keys == {UUID: UNLOCK_KEY}
        return Opened(told.session, hashlib.sha256(told.request).digest(), keys)

    def confirmation(self, told: Told) -> bytes:
        """Make the Confirm of an answer."""
        return self.attacker.confirm(told, self.attacker.open(told))

    def confirm(self, url: str, body: bytes) -> None:
        """Send a Confirm, which must be written down."""
        reply = messages.decode_confirm_reply(self.ask(url, messages.PATH_CONFIRM, body))
        assert getattr(reply, "outcome", reply) == "opened"


@contextmanager
def running(kind: Kind, directory: Path, new_verifier: Path, root: AmdRoot) -> Iterator[Guest]:
    """Enrol a VM and boot it."""
    template = Path(shutil.copytree(new_verifier, directory / "verifier"))
    with Owner.opened(template, root) as owner:
        ENROL[kind](owner, UUID, UNLOCK_KEY)
    svsm = kind == "svsm-vtpm"
    machine = SnpMachine(
        root, chip_id=CHIP_ID, svsm=svsm, measurement=SVSM if svsm else DIRECT, report_version=3
    )
    with Owner.opened(Path(shutil.copytree(template, directory / "asked")), root) as owner:
        if not svsm:
            yield Guest(kind, template, owner.public_key, Attacker(owner, machine, None, None))
            return
        with Vtpm.start(directory / "securityfs") as vtpm:
            vtpm.play(measured_boot.grub())
            with closing(Prey(owner, machine, Svsm(machine, vtpm), vtpm)) as prey:
                yield Guest(kind, template, owner.public_key, prey.attacker())
