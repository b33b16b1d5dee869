"""Step 9: the evidence is authentic and says what the owner does not want; all reasons are told, to the VM alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, judged
from tests.attacks.lies import ALL_TCBS, DEMANDS, UNWANTED_MACHINES, another_chip, could_go_back
from tests.worlds import VM

from kagimori_agent.cap import CAP_DATA
from kagimori_protocol.errors import HardwareError, NotAuthentic
from kagimori_simulator import faults, measured_boot, pe
from kagimori_simulator.measured_boot import GrubLoader, SecureBoot, Shim
from kagimori_verifier.appraise.policy import TcbFloor

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attacks.attacker import Prey

    from kagimori_simulator.event_log import MeasuredBoot


@pytest.mark.parametrize("machine", UNWANTED_MACHINES)
def test_a_machine_that_the_owner_does_not_want_gets_a_verdict_instead_of_a_key(
    prey: Prey, machine: str
) -> None:
    """T7, T12, T14: the host runs the right image in the wrong way; the report is genuine and says so."""
    bend, checks = UNWANTED_MACHINES[machine]
    bend(prey.machine)
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), *checks)


@pytest.mark.parametrize(("demand", "check"), DEMANDS.values(), ids=DEMANDS)
def test_what_a_report_does_not_say_is_not_assumed(prey: Prey, demand: dict[str, object], check: str) -> None:
    """T12: an owner demands a protection; a report of an older version, or a host without it, is silent about it."""
    prey.office.change_policy("grub", **demand)
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), check)


def test_a_product_that_the_owner_has_given_no_floor_is_not_wanted(prey: Prey) -> None:
    """T13: the owner trusts Genoa only; a genuine Milan chip at its best TCB is still a Milan chip."""
    genoa = TcbFloor(boot_loader=10, tee=0, snp=23, microcode=84)
    prey.office.change_policy("grub", tcb_floors={"Genoa": genoa})
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "product.allowed", *ALL_TCBS)


def test_an_empty_list_of_chips_means_none(prey: Prey) -> None:
    """T22: the owner has not named a chip yet; that is no permission for all of them."""
    prey.office.change_vm(VM, chips=[])
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "chip.allowed")


BOOTS: dict[str, tuple[MeasuredBoot, tuple[str, ...]]] = {
    "another kernel": (
        measured_boot.grub(kernel=pe.image({".text": b"an attacker's kernel"})),
        ("pcr.4", "pcr.9"),
    ),
    "another initramfs": (measured_boot.grub(initramfs=b"an attacker's initramfs"), ("pcr.9",)),
    "a shell on the command line": (
        measured_boot.grub(cmdline="root=/dev/vda rd.break=pre-mount console=ttyS0"),
        ("pcr.8", "pcr.9", "cmdline.doors"),
    ),
    "a GRUB that was talked to": (
        measured_boot.grub(loader=GrubLoader(commands=("set root=(cd0)",))),
        ("pcr.8",),
    ),
    "another GRUB": (
        measured_boot.grub(loader=GrubLoader(image=pe.image({".text": b"an old grub"}))),
        ("pcr.4",),
    ),
    "Secure Boot off": (measured_boot.grub(secure_boot=SecureBoot(enabled=False)), ("pcr.4", "pcr.7")),
    "other keys in shim": (measured_boot.grub(shim=Shim(mok_list=b"an attacker's key")), ("pcr.14",)),
    "other ACPI tables": (
        measured_boot.grub(firmware=measured_boot.Firmware(acpi_tables=(b"DSDT with code", b"FACP"))),
        ("pcr.1",),
    ),
}


@pytest.mark.parametrize("boot", BOOTS)
def test_a_boot_that_the_owner_has_not_accepted_gets_a_verdict_with_its_pcrs(
    prey: Prey, boot: str, tmp_path: Path
) -> None:
    """T5, T16, T22: the host boots something else below the right SVSM; the TPM saw it, and the log explains it."""
    from kagimori_simulator.svsm import Svsm
    from kagimori_simulator.vtpm import Vtpm

    played, checks = BOOTS[boot]
    with Vtpm.start(tmp_path / "again") as vtpm:
        vtpm.play(played)
        prey.vtpm, prey.svsm = vtpm, Svsm(prey.machine, vtpm)
        attacker = prey.attacker()
        judged(attacker, attacker.send(attacker.evidence()), *checks)
        prey.stack.close()


def test_a_capped_boot_gets_no_key(prey: Prey) -> None:
    """T4: root of the running system has the right image, TPM and SVSM, and asks as the agent did."""
    prey.tpm.extend(15, b"\x0c" * 32)
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "cap.off")


def test_what_the_agent_extends_is_not_accepted_as_a_first_state(prey: Prey) -> None:
    """T4: capping is one extend by a value that everyone knows; no value but zero is "off"."""
    import hashlib

    prey.tpm.extend(15, hashlib.sha256(CAP_DATA).digest())
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "cap.off")


def test_a_capped_boot_may_ask_for_its_verdict_and_gets_nothing_else(prey: Prey) -> None:
    """T4: a dry-run from the running system is judged as if uncapped, and holds no key."""
    prey.tpm.extend(15, b"\x0c" * 32)
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
    verdict = attacker.verdict(told)
    assert verdict.allowed
    assert {check.id: check.found for check in verdict.checks}["cap.off"].endswith("capped")
    assert prey.office.events(told.session) == ["judged"]


def test_all_reasons_are_told_together(prey: Prey) -> None:
    """T22: an owner who repairs one thing at a time learns the next reason only at the next boot."""
    faults.debug_policy(prey.machine)
    faults.migration_policy(prey.machine)
    could_go_back(prey.machine)
    another_chip(prey.machine)
    prey.tpm.extend(15, b"\x0c" * 32)
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    judged(attacker, told, "policy.allowed", "tcb.committed", "chip.allowed", "cap.off")


def test_the_reasons_reach_the_vm_and_nobody_else(prey: Prey) -> None:
    """T19: the host repeats the VM's evidence to learn what the owner's policy is; what it reads is sealed."""
    faults.debug_policy(prey.machine)
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    for reason in (b"DEBUG", b"policy.allowed", b"verdict"):
        assert reason not in told.body
    eavesdropper = prey.attacker()
    with pytest.raises(NotAuthentic):
        eavesdropper.open(told)
    with pytest.raises(HardwareError):
        eavesdropper.open(told, key=attacker.key)


def test_a_state_without_reference_values_is_refused_pcr_by_pcr(prey: Prey) -> None:
    """T22: the owner has accepted nothing yet, and nothing that is empty passes."""
    from sqlalchemy import delete

    from kagimori_verifier.store import schema

    with prey.office.verifier.store.write() as txn:
        txn.execute(delete(schema.boot_state))
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    judged(attacker, told, *(f"pcr.{index}" for index in (0, 1, 2, 3, 4, 5, 7, 8, 9, 14)))


def test_certificates_that_are_not_valid_today_do_not_count(prey: Prey) -> None:
    """T23: the verifier's own clock decides, whatever the guest's says; in ten years these certificates are old."""
    prey.office.move_clock(10 * 366 * 86_400)
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    judged(attacker, told, "endorsement.valid", "endorsement.revocation")
    prey.office.move_clock(-10 * 366 * 86_400)
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}
