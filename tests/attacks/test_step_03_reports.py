"""Step 3: the report is AMD's word: chain, revocation, TCB, chip, signature."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest
from tests.attacks import lies
from tests.attacks.attacker import denied, judged

from kagimori_protocol import certificate_table
from kagimori_protocol.snp import FIELDS, REPORT_SIZE
from kagimori_simulator import faults

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.attacks.attacker import Prey


@pytest.mark.parametrize("lie", lies.UNPROVEN_REPORTS)
def test_a_report_that_amd_does_not_vouch_for_is_refused(prey: Prey, lie: str) -> None:
    """T7, T12, T15: the host makes up a report, or shows certificates that do not belong to it."""
    bend, check = lies.UNPROVEN_REPORTS[lie]
    bend(prey.machine)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", check)


@pytest.mark.parametrize("also", ["alone", "beside the true root"])
def test_a_chain_to_another_root_proves_nothing(prey: Prey, also: str) -> None:
    """T7: the attacker builds AMD's whole hierarchy anew: names, extensions, everything but AMD's keys.

    It may hand out the true ARK beside its own, since the verifier has that one in its cache anyway.
    """
    lies.chain_to_another_root(prey.machine, beside_the_true=also != "alone")
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.chain")


def test_without_any_trusted_root_the_verifier_names_the_stranger(prey: Prey) -> None:
    """T7: the operator never told this verifier of the simulated root; its certificates are but bytes.

    The owner sees which key was offered, to compare with what AMD publishes.
    """
    from sqlalchemy import delete

    from kagimori_verifier.store import schema

    with prey.office.verifier.store.write() as txn:
        txn.execute(delete(schema.root))
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.root")
    assert "ARK-Milan with key" in prey.office.refusals()[0].found


def test_a_providers_key_cannot_vouch_for_a_chip(prey: Prey) -> None:
    """T7: ASVK signs what providers load into their chips; one that is stolen must not make VCEKs.

    The certificate is a VCEK to the last extension, but the intermediate behind it is the one for VLEKs.
    """
    lies.vcek_by(prey.machine, providers=True)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.chain")


def test_a_vcek_cannot_sign_as_a_vlek(prey: Prey) -> None:
    """T7: KEY_INFO says which key signed; a report that says the other finds no certificate of that name."""
    prey.machine.overrides["key_info"] = 1 << 2
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.found")


def test_a_vlek_where_policy_wants_the_chip_itself_is_a_refusal_with_reasons(prey: Prey) -> None:
    """T13: a provider's key vouches for every chip of the provider, so it says nothing of this one."""
    prey.machine.signer = "vlek"
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    judged(attacker, told, "signer.allowed", "signer.provider", "chip.allowed")


def test_a_report_that_speaks_of_another_product_than_its_root_is_refused(prey: Prey) -> None:
    """T13: the keys of one product line leak; what they sign must not pass for a report of a newer one."""
    lies.another_product(prey.machine)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.product")


def test_a_report_signed_in_another_way_is_refused(prey: Prey) -> None:
    """T22: SIGNATURE_ALGO says how the report is signed; only the one way that is verified may be said."""
    prey.machine.overrides["signature_algo"] = 2
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.signature-algo")


@pytest.mark.parametrize("tcb", ["current_tcb", "committed_tcb", "launch_tcb"])
def test_a_tcb_that_cannot_be_read_is_not_compared(prey: Prey, tcb: str) -> None:
    """T12: bytes that no product uses could hide a version that sorts above every floor."""
    prey.machine.overrides[tcb] = b"\xff" * 8
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "report.tcb-layout")


def test_a_masked_chip_is_no_chip(prey: Prey) -> None:
    """T7: the host masks CHIP_ID, so that zeros stand where the owner's list of chips looks."""
    prey.machine.overrides["chip_id"] = bytes(64)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.chip")


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": lambda report: report[:-1],
    "one byte long": lambda report: report + b"\x00",
    "empty": lambda report: report[:0],
    "version 1": lambda report: b"\x01" + report[1:],
    "version 99": lambda report: b"\x63" + report[1:],
    "reserved bytes used": lambda report: report[: REPORT_SIZE - 1] + b"\x01",
}


@pytest.mark.parametrize("cut", CUTS)
def test_bytes_that_are_no_report_are_not_half_understood(prey: Prey, cut: str) -> None:
    """T22: whatever a parser would have to guess, it refuses; nothing is padded or cut to fit."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    parts["report"] = CUTS[cut](parts["report"])
    denied(prey.office, attacker.send(parts), "not-authentic", "report.layout")


def test_a_field_changed_after_signing_breaks_the_signature(prey: Prey) -> None:
    """T11: the host edits a genuine report: a debug policy less, a VMPL better, a measurement that is known."""
    faults.another_measurement(prey.machine)
    attacker = prey.attacker()
    parts = attacker.evidence()
    at, size = FIELDS["measurement"]
    known = bytes(byte ^ 0xFF for byte in parts["report"][at : at + size])
    parts["report"] = parts["report"][:at] + known + parts["report"][at + size :]
    denied(prey.office, attacker.send(parts), "not-authentic", "report.signature")


def test_without_a_revocation_list_nothing_is_released(prey: Prey) -> None:
    """T15: the host hands out every certificate and "forgets" the list that revokes one of them."""
    lies.remove_lists(prey.office)
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "endorsement.revocation")
    prey.office.change_policy("grub", revocation="if-present")
    told = attacker.send(attacker.evidence())
    assert attacker.keys(told), "the owner may choose to live without one"


def test_a_revocation_list_that_is_past_its_time_is_as_good_as_none(prey: Prey) -> None:
    """T15: the host plays an old list, from before AMD revoked anything; even "if-present" wants a current one."""
    lies.remove_lists(prey.office)
    old = prey.office.root.crl(last_update=dt.datetime.now(dt.UTC) - dt.timedelta(days=800))
    prey.machine.certificates = prey.machine.chain() | {certificate_table.CRL: old}
    prey.office.change_policy("grub", revocation="if-present")
    attacker = prey.attacker()
    judged(attacker, attacker.send(attacker.evidence()), "endorsement.revocation")


def test_an_old_list_from_the_host_does_not_hide_the_newer_one(prey: Prey) -> None:
    """T15: the cache knows of the revocation; the host carries an older list that does not."""
    from kagimori_verifier.endorsements.directory import EndorsementDirectory

    root = prey.office.root
    serials = [root.ask.certificate.serial_number]
    lies.remove_lists(prey.office)
    EndorsementDirectory(prey.office.directory / "endorsements").add(root.crl(serials))
    old = root.crl(last_update=dt.datetime.now(dt.UTC) - dt.timedelta(days=30))
    prey.machine.certificates = prey.machine.chain() | {certificate_table.CRL: old}
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "endorsement.revoked")
