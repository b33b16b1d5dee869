"""Step 5: REPORT_DATA is this exchange's, and the manifest is exactly the EK that Hello named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import denied, t0_of

from kagimori_protocol import transcript
from kagimori_protocol.tpm import EK_TEMPLATE_L1
from kagimori_simulator import faults, measured_boot, pe
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attacks.attacker import Prey


def test_a_report_of_an_earlier_exchange_is_refused(prey: Prey) -> None:
    """T8: the host keeps a good report and plays it again under a fresh challenge, with a fresh quote over it."""
    attacker = prey.attacker()
    earlier = attacker.evidence()
    parts = attacker.evidence()
    parts["report"] = earlier["report"]
    denied(prey.office, attacker.send(parts | attacker.quote(parts)), "not-authentic", "report.tie")


def test_a_plain_guests_old_report_is_refused_as_well(direct_prey: Prey) -> None:
    """T8: the same without a TPM, where the report is all there is."""
    attacker = direct_prey.attacker()
    earlier = attacker.evidence()
    parts = attacker.evidence() | {"report": earlier["report"]}
    denied(direct_prey.office, attacker.send(parts), "not-authentic", "report.tie")


def test_a_report_for_another_key_is_refused(direct_prey: Prey) -> None:
    """T7: the attacker relays the VM's own report into a session of its own, whose answer it could open."""
    vm, thief = direct_prey.attacker(), direct_prey.attacker()
    theirs = vm.evidence()
    parts = thief.evidence() | {"report": theirs["report"]}
    denied(direct_prey.office, thief.send(parts), "not-authentic", "report.tie")


def test_a_manifest_swapped_behind_the_svsms_back_breaks_the_tie(prey: Prey) -> None:
    """T9: the SVSM vouched for its own TPM; the attacker puts a software EK in its place, in Hello too."""
    attacker = prey.attacker()
    genuine = prey.monitor.manifest
    faults.software_ek(prey.monitor)
    forged, prey.monitor.manifest = prey.monitor.manifest, genuine
    parts = attacker.evidence(attacker.hello(ek_public=forged)) | {"manifest": forged}
    denied(prey.office, attacker.send(parts | attacker.quote(parts)), "not-authentic", "report.tie")


def test_a_manifest_of_another_tpm_is_not_the_one_that_hello_named(prey: Prey, tmp_path: Path) -> None:
    """T9: two VMs below one SVSM; the attacker shows one VM's manifest with the other's TPM."""
    with Vtpm.start(tmp_path / "other") as other:
        faults.forged_ek(prey.monitor, other)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "manifest.hello")


def test_a_list_of_services_is_no_manifest_of_the_vtpm(prey: Prey) -> None:
    """T9: SVSM_ATTEST_SERVICES ties any list of manifests by the same hash, so a list must not pass for one EK."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    nonce = transcript.svsm_nonce(t0_of(parts))
    parts["report"], parts["manifest"], parts["certificates"] = prey.monitor.attest_services(nonce)
    denied(prey.office, attacker.send(parts | attacker.quote(parts)), "not-authentic", "manifest.ek")


@pytest.mark.parametrize(
    "lie", ["a byte after it", "a byte less", "another template", "the template itself", "twice"]
)
def test_a_manifest_is_one_ek_of_the_template_and_nothing_else(prey: Prey, lie: str) -> None:
    """T9, T22: whatever else an SVSM may vouch for, what follows is built on one EK that cannot sign."""
    genuine = prey.monitor.manifest
    prey.monitor.manifest = {
        "a byte after it": genuine + b"\x00",
        "a byte less": genuine[:-1],
        "another template": genuine[:7] + b"\xf2" + genuine[8:],
        "the template itself": EK_TEMPLATE_L1,
        "twice": genuine * 2,
    }[lie]
    attacker = prey.attacker()
    hello = attacker.hello(ek_public=prey.monitor.manifest)
    denied(prey.office, attacker.send(attacker.evidence(hello)), "not-authentic", "manifest.ek")


def test_a_clone_with_a_bad_boot_cannot_borrow_a_good_quote(prey: Prey, tmp_path: Path) -> None:
    """T9: the host copies the seeds of the vTPM, so that EK and manifest are the same, and boots its own kernel.

    The clone gets an SVSM's report for the thief's key; the quote is the good VM's, made for the VM's own session.
    """
    faults.clone_vtpm(prey.tpm.socket_path.parent / "state", tmp_path / "seeds")
    good = prey.attacker()
    lent = good.evidence()
    evil_boot = measured_boot.grub(kernel=pe.image({".text": b"an attacker's kernel"}))
    with Vtpm.start(tmp_path / "clone", state=tmp_path / "seeds") as clone:
        assert clone.ek_public() == prey.monitor.manifest
        clone.play(evil_boot)
        prey.vtpm = clone
        thief = prey.attacker()
        parts = thief.evidence(thief.hello(ak_public=good._keys[1]))
        parts |= {name: lent[name] for name in ("quote", "pcrs", "event_log")}
        told = thief.send(parts)
        prey.stack.close()
    denied(prey.office, told, "not-authentic", "quote.qualifying-data")
