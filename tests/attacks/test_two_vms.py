"""A host with a second genuine VM in a bad state: two TPMs below two SVSMs of the same build, on the owner's own chip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.attacks import lies
from tests.attacks.attacker import Prey, SoftwareAk, closing, denied, judged, recoded
from tests.attacks.software import SoftwareTpm
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_PUBLIC, TPMT_PUBLIC

from kagimori_agent.cap import CAP_DATA
from kagimori_protocol.errors import HardwareError
from kagimori_protocol.messages import Hello
from kagimori_simulator import measured_boot, pe
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker


@pytest.fixture
def rogue(prey: Prey, tmp_path: Path) -> Iterator[Prey]:
    """Give a VM like the owner's on the same chip, with the attacker's kernel; its TPM and its SVSM are genuine."""
    good = prey.machine
    machine = SnpMachine(
        good.root, chip_id=good.chip_id, svsm=True, measurement=good.measurement, report_version=3
    )
    machine._veks = good._veks
    with Vtpm.start(tmp_path / "rogue") as vtpm:
        vtpm.play(measured_boot.grub(kernel=pe.image({".text": b"an attacker's kernel"})))
        with closing(Prey(prey.office, machine, Svsm(machine, vtpm), vtpm)) as running:
            yield running


def quoting(attacker: Attacker, parts: dict[str, object]) -> dict[str, object]:
    """Let a TPM quote for evidence that is another VM's, and give the log beside it."""
    return attacker.quote(parts) | {"event_log": attacker.tpm.event_log()}


def test_the_rogue_vm_alone_gets_a_verdict(rogue: Prey) -> None:
    """T9: its evidence is honest, so it is told what is wrong with it, and the owner reads the same."""
    attacker = rogue.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "pcr.4", "pcr.9")


def test_a_quote_that_the_good_vm_made_for_itself_fits_no_report_of_the_rogue(
    prey: Prey, rogue: Prey
) -> None:
    """T9: SVSM's report and EK are the rogue's, AK, quote and log the good VM's, from its own exchange."""
    good, bad = prey.attacker(), rogue.attacker()
    lent = good.evidence()
    parts = bad.evidence(bad.hello(ak_public=good.public_areas[1]))
    parts |= {name: lent[name] for name in ("quote", "pcrs", "event_log")}
    denied(prey.office, bad.send(parts), "not-authentic", "quote.qualifying-data")


def test_the_good_vms_tpm_can_quote_for_the_rogue_only_once_it_is_capped(prey: Prey, rogue: Prey) -> None:
    """T4, T9: root of the booted VM lends its TPM to the rogue's exchange; its quotes show the cap by then.

    And the answer's credential is for the rogue's EK, in whose TPM there is no such AK.
    """
    good, bad = prey.attacker(), rogue.attacker()
    good.tpm.measure(15, CAP_DATA)
    parts = bad.evidence(bad.hello(ak_public=good.public_areas[1]))
    told = bad.send(parts | quoting(good, parts))
    with pytest.raises(HardwareError):
        bad.open(told)
    (line,) = prey.office.ledger(told.session)
    assert line.event == "refused"
    assert [check["id"] for check in line.body["checks"] if not check["ok"]] == ["cap.off"]


def test_the_rogues_tpm_cannot_stand_behind_the_good_vms_report(prey: Prey, rogue: Prey) -> None:
    """T9: the good SVSM's report and manifest, with the rogue's AK and quote; S goes to the good VM's EK, or nowhere.

    The rogue's TPM is in a bad state, so the attacker has it quote nothing and signs perfect values with a file.
    """
    good = prey.attacker()
    ak = SoftwareAk()
    parts = lies.with_software_ak(good, ak)
    told = good.send(parts)
    bad = rogue.attacker()
    bad.key = good.key
    with pytest.raises(HardwareError):
        bad.open(told)
    assert prey.office.events(told.session) == ["released"], "and nobody will ever confirm it"


def test_an_ak_of_which_the_tpm_has_only_the_public_part_opens_nothing(prey: Prey) -> None:
    """T9: the attacker loads the public part of its software AK into the genuine TPM: an object of the right name.

    TPM2_ActivateCredential wants that object's authorisation (0x12F), and without a private part it has none.
    """
    attacker = prey.attacker()
    ak = SoftwareAk()
    told = attacker.send(lies.with_software_ak(attacker, ak))
    device = attacker.tpm
    own = device._ak
    area, _ = TPMT_PUBLIC.unmarshal(ak.public)
    device._ak = device._esapi.load_external(TPM2B_PUBLIC(publicArea=area), hierarchy=ESYS_TR.OWNER)
    with pytest.raises(HardwareError) as caught:
        attacker.open(told)
    assert caught.value.code == "tpm.no-authorisation"
    assert "0x0000012f" in (caught.value.found or "").lower()
    device._esapi.flush_context(device._ak)
    device._ak = own
    assert prey.office.events(told.session) == ["released"]


@pytest.mark.parametrize("attributes", [0xA0, 0xB0, 0xF2, 0xA2])
def test_an_ek_whose_template_the_attacker_chose_is_none(prey: Prey, attributes: int) -> None:
    """T9: a vTPM would let its guest choose the EK's template, and the SVSM vouches for what it finds there.

    Without fixedTPM and fixedParent the key may come from a file; with userWithAuth its user needs no policy. The
    attacker holds the private half and would open the credential itself.
    """
    attacker = prey.attacker()
    soft = SoftwareTpm()
    attacker.activate = soft.activate
    prey.monitor.manifest = soft.ek_public[:7] + bytes([attributes]) + soft.ek_public[8:]
    parts = lies.software_evidence(attacker, soft, prey.monitor.manifest)
    denied(prey.office, attacker.send(parts), "not-authentic", "manifest.ek")
    assert "ek.template" in prey.office.refusals()[0].found


def test_evidence_of_one_vm_names_no_other(prey: Prey) -> None:
    """T7, T19: the host relays web1's evidence as web2's, whose image, chip and profile are the same."""
    prey.office.enrol_vm("web2", "grub")
    prey.office.enrol_volume("web2", "99999999-2222-4333-8444-555555555555", bytes(range(32)))
    attacker = prey.attacker()
    parts = attacker.evidence()
    as_other = recoded(parts["hello"], Hello, vm_id="web2", volumes=["99999999-2222-4333-8444-555555555555"])
    denied(prey.office, attacker.send(parts | {"hello": as_other}), "not-authentic", "session.hello")
    challenge = attacker.challenge(as_other)
    parts |= {"hello": as_other, "challenges": [challenge]}
    denied(prey.office, attacker.send(parts), "not-authentic", "report.tie")
