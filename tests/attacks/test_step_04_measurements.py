"""Step 4: MEASUREMENT is a reference value, it alone fixes the kind, and the report comes from VMPL 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.attacks.attacker import denied, t0_of
from tests.attacks.lies import everything_in_software
from tests.worlds import DIRECT, SVSM

from kagimori_protocol import transcript
from kagimori_simulator import faults
from kagimori_simulator.machine import GUEST_VMPL_UNDER_SVSM
from kagimori_simulator.svsm import Svsm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attacks.attacker import Prey

GOOD_BUILD = b"\x77" * 48


def test_an_image_that_nobody_knows_is_refused(prey: Prey) -> None:
    """T11: the host launches another SVSM or firmware; all else about the VM is genuine and well."""
    faults.another_measurement(prey.machine)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.measurement")


def test_an_image_known_to_another_profile_is_unknown_to_this_one(prey: Prey) -> None:
    """T19: the owner runs another group of VMs on another build; that build is none of this VM's."""
    prey.office.enrol_profile("others", "grub", "svsm-vtpm", GOOD_BUILD)
    prey.machine.measurement = GOOD_BUILD
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.measurement")


def test_a_guest_kernel_cannot_play_svsm(prey: Prey) -> None:
    """T11: root of any guest below the right SVSM gets reports of VMPL 2 with REPORT_DATA of its own choice.

    It vouches for an EK, an AK and PCRs that are all software; everything is consistent but the level.
    """
    attacker = prey.attacker()
    told = attacker.send(everything_in_software(attacker, vmpl=GUEST_VMPL_UNDER_SVSM))
    denied(prey.office, told, "not-authentic", "report.vmpl")


@pytest.mark.parametrize("vmpl", [1, 2, 3])
def test_no_level_but_the_strongest_counts(prey: Prey, vmpl: int) -> None:
    """T11: what runs at VMPL 1 to 3 is not what MEASUREMENT tells of."""
    prey.monitor.vmpl = vmpl
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.vmpl")


def test_a_report_that_the_host_asked_for_is_the_hosts_word(prey: Prey) -> None:
    """T11: firmware makes reports for the host too; they say so in the level, and are nobody's but the host's."""
    faults.host_requested_report(prey.machine)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.vmpl")
    assert "the host asked for" in prey.office.refusals()[0].found


def test_without_an_svsm_the_guest_must_run_at_the_top_as_well(direct_prey: Prey) -> None:
    """T11: a guest image that is known as a whole may not be run below something that is not."""
    direct_prey.machine.overrides["vmpl"] = 1
    attacker = direct_prey.attacker()
    denied(direct_prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.vmpl")


@pytest.mark.parametrize("features", [["attest", "vtpm"], ["persistence", "vtpm"], ["attest"], []])
def test_an_svsm_with_more_to_say_at_the_top_is_refused(prey: Prey, features: list[str]) -> None:
    """T9, T10: a build with ``attest`` signs what the host chooses at VMPL 0, so it vouches for a software EK.

    A build with a persistent vTPM can be rolled back. The owner recorded the build's features; they decide.
    """
    prey.office.enrol_measurement("grub", "svsm-vtpm", GOOD_BUILD, features)
    prey.machine.measurement = GOOD_BUILD
    attacker = prey.attacker()
    told = attacker.send(everything_in_software(attacker, vmpl=0))
    denied(prey.office, told, "not-authentic", "measurement.svsm-features")


def test_a_plain_guests_image_with_evidence_of_an_svsm_is_still_a_plain_guest(prey: Prey) -> None:
    """T9: root of a plain guest, whose kernel chooses REPORT_DATA at VMPL 0, plays SVSM for a software TPM.

    Hello says ``svsm-vtpm``, the report ties a manifest; but the measurement says what kind it is.
    """
    prey.office.enrol_measurement("grub", "snp-direct", DIRECT)
    prey.machine.measurement = DIRECT
    attacker = prey.attacker()
    parts = everything_in_software(attacker, vmpl=0)
    denied(prey.office, attacker.send(parts), "not-authentic", "evidence.parts")
    bare = dict.fromkeys(("manifest", "quote", "pcrs", "event_log"), msgspec.UNSET)
    hello = attacker.hello(ek_public=msgspec.UNSET, ak_public=msgspec.UNSET)
    parts = attacker.evidence(hello) | bare
    denied(prey.office, attacker.send(parts), "not-authentic", "report.tie")


def test_an_svsms_image_with_a_plain_report_needs_its_tpm_all_the_same(prey: Prey) -> None:
    """T9: the host says ``snp-direct`` of a VM with an SVSM, so that no PCR is looked at.

    Each part of the TPM's evidence that is left out is named to the owner.
    """
    attacker = prey.attacker()
    honest = attacker.evidence()
    for part in ("manifest", "quote", "pcrs", "event_log"):
        told = attacker.send(honest | {part: msgspec.UNSET})
        denied(prey.office, told, "not-authentic", "evidence.parts")
        assert prey.office.refusals()[0].found == f"without {part}"
    prey.machine.svsm = False
    attacker.svsm = None
    told = attacker.send(attacker.evidence(attacker.hello(kind="snp-direct")))
    denied(prey.office, told, "not-authentic", "evidence.parts")


def test_a_plain_tie_under_an_svsms_image_is_no_tie(prey: Prey) -> None:
    """T9: the report commits to the exchange in the form of the other kind; the forms never meet."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    parts["report"] = prey.machine.report(transcript.direct_report_data(t0_of(parts)), 0)
    denied(prey.office, attacker.send(parts | attacker.quote(parts)), "not-authentic", "report.tie")


def test_the_hint_of_a_kind_decides_nothing(direct_prey: Prey) -> None:
    """T9: Hello's ``kind`` is a hint; a plain guest that claims an SVSM is judged as what its measurement is."""
    attacker = direct_prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(kind="svsm-vtpm")))
    assert attacker.keys(told)
    assert direct_prey.office.ledger()[0].body["kind"] == "snp-direct"


def test_a_tpm_beside_a_plain_guest_adds_nothing(direct_prey: Prey, tmp_path: Path) -> None:
    """T9: the host gives a plain guest a software TPM with perfect PCRs; no claim of it is even looked at."""
    from kagimori_simulator import measured_boot
    from kagimori_simulator.vtpm import Vtpm

    with Vtpm.start(tmp_path / "software") as vtpm:
        vtpm.play(measured_boot.grub())
        direct_prey.machine.measurement = SVSM
        direct_prey.vtpm = vtpm
        direct_prey.svsm = Svsm(direct_prey.machine, vtpm)
        attacker = direct_prey.attacker()
        told = attacker.send(attacker.evidence())
        direct_prey.stack.close()
    denied(direct_prey.office, told, "not-authentic", "report.measurement")


def test_two_vms_cannot_share_an_image_that_is_one_vms_own(direct_prey: Prey) -> None:
    """T4, T19: root of web2, booted from the image that web1 has too, asks for web1's key with its one grant.

    Without a TPM the measurement covers the initramfs, which names the VM; whatever two VMs share does not.
    """
    direct_prey.office.enrol_profile("twin", "direct", "snp-direct", DIRECT)
    direct_prey.office.enrol_vm("web2", "twin")
    attacker = direct_prey.attacker()
    denied(direct_prey.office, attacker.send(attacker.evidence()), "not-authentic", "measurement.one-vm")
    assert direct_prey.office.refusals()[0].found == "web1, web2"
