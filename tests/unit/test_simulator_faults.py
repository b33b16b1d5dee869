"""Named lies: each bends what it says, and nothing that would betray it before the check that it is meant for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import UsageError
from kagimori_protocol.snp import SIGNED_SIZE, VMPL_HOST_REQUESTED, Report
from kagimori_protocol.tpm import require_ek_l1
from kagimori_simulator import faults
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.configfs import ConfigfsTsm, ReportItem
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.measured_boot import direct, grub
from kagimori_simulator.svsm import VTPM_SERVICE, Svsm
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*serial number.*")

REPORT_DATA = bytes(range(64))


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def machine(root: AmdRoot) -> SnpMachine:
    """Give a machine with a guest under an SVSM."""
    return SnpMachine(root, svsm=True)


@pytest.fixture
def vtpm(tmp_path: Path) -> Iterator[Vtpm]:
    """Give a fresh TPM."""
    with Vtpm.start(tmp_path) as started:
        yield started


def vcek_hwid(machine: SnpMachine) -> bytes:
    """Give the chip that the host's certificate names."""
    entries = {entry.guid: entry.der() for entry in certificate_table.parse(machine.certificate_table())}
    certificate = x509.load_der_x509_certificate(entries[certificate_table.VCEK])
    oid = x509.ObjectIdentifier("1.3.6.1.4.1.3704.1.4")
    return certificate.extensions.get_extension_for_oid(oid).value.public_bytes()


def verify_with_own_vcek(machine: SnpMachine, report: bytes) -> None:
    """Check the signature with the key that this chip has."""
    parsed = Report.parse(report)
    vek = machine.vek()
    assert vek is not None
    signature = encode_dss_signature(parsed.signature_r, parsed.signature_s)
    vek.private_key.public_key().verify(signature, report[:SIGNED_SIZE], ec.ECDSA(hashes.SHA384()))


@pytest.mark.parametrize(
    ("lie", "field"),
    [
        (faults.another_measurement, "measurement"),
        (faults.debug_policy, "policy"),
        (faults.migration_policy, "policy"),
        (faults.host_requested_report, "vmpl"),
        (faults.wrong_chip, "chip_id"),
        (faults.wrong_tcb, "reported_tcb"),
    ],
)
def test_a_lie_about_the_launch_changes_one_field_of_a_genuine_report(
    machine: SnpMachine, lie: Callable[[SnpMachine], None], field: str
) -> None:
    """The signature still verifies, and every other field stays."""
    honest = machine.report(REPORT_DATA, 0)
    lie(machine)
    told = machine.report(REPORT_DATA, 0)
    verify_with_own_vcek(machine, told)
    before, after = Report.parse(honest), Report.parse(told)
    differing = {
        name for name in Report.__dataclass_fields__ if getattr(before, name) != getattr(after, name)
    }
    assert differing - {"raw", "signature_r", "signature_s"} == {field}


def test_lies_compose(machine: SnpMachine) -> None:
    """One after the other."""
    faults.debug_policy(machine)
    faults.migration_policy(machine)
    faults.host_requested_report(machine)
    report = Report.parse(machine.report(REPORT_DATA, 0))
    assert {"DEBUG", "MIGRATE_MA"} <= set(report.policy_flags)
    assert report.vmpl == VMPL_HOST_REQUESTED


def test_old_firmware_has_a_certificate_that_agrees(machine: SnpMachine) -> None:
    """Only a floor on the TCB can refuse it."""
    faults.old_firmware(machine)
    report = machine.report(REPORT_DATA, 0)
    verify_with_own_vcek(machine, report)
    parsed = Report.parse(report)
    assert parsed.reported_tcb == parsed.current_tcb == parsed.committed_tcb == parsed.launch_tcb == bytes(8)


def test_an_unsigned_report_admits_it(machine: SnpMachine) -> None:
    """KEY_INFO says so and the signature is zero."""
    faults.unsigned_report(machine)
    raw = machine.report(REPORT_DATA, 0)
    assert Report.parse(raw).signing_key == "none"
    assert not any(raw[SIGNED_SIZE:])


def test_a_report_signed_by_nobody_looks_genuine(machine: SnpMachine) -> None:
    """Only the signature is wrong."""
    faults.signed_by_nobody(machine)
    raw = machine.report(REPORT_DATA, 0)
    assert Report.parse(raw).signing_key == "vcek"
    assert vcek_hwid(machine) == machine.chip_id
    with pytest.raises(InvalidSignature):
        verify_with_own_vcek(machine, raw)


@pytest.mark.parametrize("product", ["Milan", "Turin"])
def test_a_swapped_certificate_names_another_chip(cache: Path, product: str) -> None:
    """It is genuine in itself, and the rest of the table stays."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd", product))
    assert machine.chip_id.startswith(vcek_hwid(machine))
    faults.swapped_certificate(machine)
    assert not machine.chip_id.startswith(vcek_hwid(machine))
    assert [entry.name for entry in certificate_table.parse(machine.certificate_table())] == [
        "VCEK",
        "ASK",
        "ARK",
    ]


def test_a_silent_host_has_no_table(machine: SnpMachine) -> None:
    """The verifier needs another source."""
    faults.no_certificates(machine)
    assert machine.certificate_table() == b""


def test_a_revoked_intermediate_is_on_the_list_that_comes_along(machine: SnpMachine) -> None:
    """The chain itself stays whole."""
    faults.revoked_intermediate(machine)
    entries = {entry.name: entry.der() for entry in certificate_table.parse(machine.certificate_table())}
    ask = x509.load_der_x509_certificate(entries["ASK"])
    crl = x509.load_der_x509_crl(entries["CRL"])
    assert crl.get_revoked_certificate_by_serial_number(ask.serial_number) is not None


def test_a_guest_that_plays_svsm_cannot_say_vmpl_0(machine: SnpMachine, vtpm: Vtpm) -> None:
    """All else is as from an SVSM."""
    svsm = Svsm(machine, vtpm)
    faults.guest_level_report(svsm)
    report, manifest, _ = svsm.attest_single_service(REPORT_DATA, VTPM_SERVICE)
    parsed = Report.parse(report)
    assert (parsed.vmpl, parsed.report_data) == (2, hashlib.sha512(REPORT_DATA + manifest).digest())


def test_a_forged_ek_is_well_formed(machine: SnpMachine, vtpm: Vtpm, tmp_path: Path) -> None:
    """Another TPM's, or one whose private key the attacker holds."""
    svsm = Svsm(machine, vtpm)
    own = svsm.manifest
    key = faults.software_ek(svsm)
    modulus = int.from_bytes(require_ek_l1(svsm.manifest)[-256:], "big")
    assert modulus == key.public_key().public_numbers().n
    with Vtpm.start(tmp_path / "other") as other:
        faults.forged_ek(svsm, other)
        assert require_ek_l1(svsm.manifest) == other.ek_public() != own


def test_an_unlogged_extend_moves_a_pcr_and_not_the_log(vtpm: Vtpm) -> None:
    """The log still replays to what the boot computed."""
    boot = grub()
    log = vtpm.play(boot).read_bytes()
    faults.unlogged_extend(vtpm, 8)
    assert vtpm.pcr(8) != boot.pcr(8)
    assert vtpm.event_log_path.read_bytes() == log


def test_a_log_can_tell_too_much_or_too_little(vtpm: Vtpm) -> None:
    """The PCRs stay as they are."""
    boot = grub()
    log = vtpm.play(boot).read_bytes()
    faults.extra_logged_event(vtpm, boot)
    assert vtpm.event_log_path.read_bytes().startswith(log)
    assert b"never ran" in vtpm.event_log_path.read_bytes()
    faults.missing_event(vtpm, boot, 8)
    assert len(vtpm.event_log_path.read_bytes()) < len(log)
    assert b"grub_cmd: initrd" not in vtpm.event_log_path.read_bytes()
    vtpm.write_event_log(log)
    faults.truncated_log(vtpm, 5)
    assert vtpm.event_log_path.read_bytes() == log[:-5]
    assert [vtpm.pcr(pcr) for pcr in range(16)] == [boot.pcr(pcr) for pcr in range(16)]


def test_a_missing_event_must_exist(vtpm: Vtpm) -> None:
    """A PCR that nothing was measured into has nothing to hide."""
    with pytest.raises(UsageError):
        faults.missing_event(vtpm, direct(), 14)


def test_a_stale_generation_comes_after_each_report(machine: SnpMachine) -> None:
    """The blob that was read is the honest one; what follows is not."""
    tsm = ConfigfsTsm(machine)
    faults.stale_generation(tsm)
    assert tsm.after_show is not None
    item = ReportItem(tsm, inblob=REPORT_DATA)
    tsm.after_show(item, "generation")
    assert item.write_generation == 0
    tsm.after_show(item, "outblob")
    assert item.write_generation == 1
    assert item.inblob != REPORT_DATA
