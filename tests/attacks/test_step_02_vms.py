"""Step 2: the VM is known and enabled, may ask for this, and asks for its own volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, denied, judged
from tests.worlds import VM

if TYPE_CHECKING:
    from tests.attacks.attacker import Prey
    from tests.worlds import Owner

TWIN, TWINS_UUID = "web2", "99999999-2222-4333-8444-555555555555"
TWINS_KEY = b"the twin's unlock key ..........".ljust(32, b".")


def enrol_twin(office: Owner) -> None:
    """Enrol a second VM with the same image, chip and profile, and a volume of its own."""
    office.enrol_vm(TWIN, "grub")
    office.enrol_volume(TWIN, TWINS_UUID, TWINS_KEY)


def test_a_vm_that_nobody_enrolled_gets_not_even_a_challenge(prey: Prey) -> None:
    """T19: the attacker has genuine hardware and the right image, but no place in the owner's books."""
    attacker = prey.attacker()
    assert attacker.refused_challenge(attacker.hello(vm_id="web3")) == "unknown-vm"
    refusal = prey.office.refusals()[0]
    assert (refusal.path, refusal.code, refusal.vm_id) == ("challenge", "vm.enabled", "web3")


def test_a_disabled_vm_is_told_the_same_as_an_unknown_one(prey: Prey) -> None:
    """T19: who guesses names learns nothing from which of them were switched off."""
    attacker = prey.attacker()
    prey.office.change_vm(VM, enabled=False)
    assert attacker.refused_challenge(attacker.hello()) == "unknown-vm"
    assert prey.office.refusals()[0].code == "vm.enabled"


def test_a_vm_disabled_after_its_challenge_gets_nothing_for_its_evidence(prey: Prey) -> None:
    """T19: the owner pulls the plug while the attacker holds a fresh token; the plug counts, not the token."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    prey.office.change_vm(VM, enabled=False)
    denied(prey.office, attacker.send(parts), "unknown-vm", "vm.enabled")


@pytest.mark.parametrize("purpose", ["preflight", "enrol"])
def test_a_purpose_that_the_vm_was_not_given_is_refused(prey: Prey, purpose: str) -> None:
    """T19: a VM that may unlock may not therefore have new keys made for new keyslots."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose=purpose)))
    denied(prey.office, told, "not-authentic", "vm.purpose")


def test_a_vm_without_any_purpose_may_do_nothing(prey: Prey) -> None:
    """T22: an empty list means no, never "no restriction"."""
    prey.office.change_vm(VM, purposes=[])
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "vm.purpose")


@pytest.mark.parametrize(
    "volumes",
    [[TWINS_UUID], [UUID, TWINS_UUID], [UUID, UUID], []],
    ids=["another's", "its own and another's", "twice", "none"],
)
def test_only_the_vms_own_volumes_can_be_asked_for_each_once(prey: Prey, volumes: list[str]) -> None:
    """T19: a VM of the same owner, chip and image asks for its twin's volume, beside or in place of its own."""
    enrol_twin(prey.office)
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(volumes=volumes)))
    denied(prey.office, told, "not-authentic", "vm.volumes")


def test_two_vms_with_the_same_image_each_get_their_own_key(prey: Prey) -> None:
    """T19: the host starts the twin's initramfs as ``web1`` and the other way round; all else is the same.

    What belongs to a VM is its initramfs and command line: the twin's name on the first VM's boot is refused,
    and when the owner accepts this boot for the twin too, the twin's name gets the twin's key only.
    """
    from kagimori_simulator import measured_boot

    enrol_twin(prey.office)
    attacker = prey.attacker()
    as_twin = attacker.hello(vm_id=TWIN, volumes=[TWINS_UUID])
    judged(attacker, attacker.send(attacker.evidence(as_twin)), "pcr.8", "pcr.9")
    prey.office.accept_boot(TWIN, "grub", measured_boot.grub(), "grub")
    assert attacker.keys(attacker.send(attacker.evidence(as_twin))) == {TWINS_UUID: TWINS_KEY}
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}
    assert [entry.vm_id for entry in prey.office.ledger()] == [TWIN, TWIN, VM]
