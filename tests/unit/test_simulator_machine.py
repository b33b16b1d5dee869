"""The simulated machine: reports that verify, and firmware that refuses what real firmware refuses."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import HardwareError, UsageError
from kagimori_protocol.snp import FIELDS, REPORT_SIZE, SIGNED_SIZE, Report
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import (
    PADDED_TABLE_SIZE,
    SnpMachine,
    certificate_extent,
    pack_certificate_table,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*serial number.*")

REPORT_DATA = bytes(range(64))
SETTABLE = sorted(name for name in FIELDS if not name.startswith("signature_"))


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


def verify(report: bytes, certificate_der: bytes) -> None:
    """Check the signature by nothing but the offsets of AMD's table."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    r = int.from_bytes(report[0x2A0:0x2E8], "little")
    s = int.from_bytes(report[0x2E8:0x330], "little")
    assert not any(report[0x330:])
    key.verify(encode_dss_signature(r, s), report[:0x2A0], ec.ECDSA(hashes.SHA384()))


def certificate(machine: SnpMachine, guid: uuid.UUID) -> bytes:
    """Give one certificate from the host's table, as DER."""
    entries = {entry.guid: entry for entry in certificate_table.parse(machine.certificate_table())}
    return entries[guid].der()


@pytest.mark.parametrize("product", ["Milan", "Turin"])
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_report_of_every_version_parses_and_verifies(cache: Path, product: str, version: int) -> None:
    """The certificate from the host's own table verifies the signature; reserved parts are zero."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd", product), report_version=version)
    raw = machine.report(REPORT_DATA, 0)
    report = Report.parse(raw)
    verify(raw, certificate(machine, certificate_table.VCEK))
    assert report.report_data == REPORT_DATA
    assert (report.version, report.vmpl, report.signing_key) == (version, 0, "vcek")
    assert report.chip_id == machine.chip_id
    assert report.product_line() == (product if version > 2 or product == "Turin" else None)


def test_a_vlek_report_names_no_chip_and_chains_to_the_asvk(root: AmdRoot) -> None:
    """As on a cloud host: CHIP_ID zero, SIGNING_KEY 1, the VLEK and its issuer in the table."""
    machine = SnpMachine(root, signer="vlek", csp_id="CN=somewhere")
    raw = machine.report(REPORT_DATA, 0)
    report = Report.parse(raw)
    assert report.signing_key == "vlek"
    assert not any(report.chip_id)
    verify(raw, certificate(machine, certificate_table.VLEK))
    assert certificate(machine, certificate_table.ASK) == root.asvk_der


def test_firmware_that_does_not_sign_leaves_the_signature_empty(root: AmdRoot) -> None:
    """SIGNING_KEY 7, and there are no certificates for it."""
    machine = SnpMachine(root, signer="none")
    raw = machine.report(REPORT_DATA, 0)
    assert not any(raw[SIGNED_SIZE:])
    assert Report.parse(raw).signing_key == "none"
    assert machine.certificate_table() == b""


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_field_can_be_overridden_and_is_signed(root: AmdRoot, data: st.DataObject) -> None:
    """A lie about any field lies where AMD's table says, under a signature that verifies."""
    name = data.draw(st.sampled_from(SETTABLE))
    place = FIELDS[name]
    value = data.draw(st.binary(min_size=place.size, max_size=place.size))
    machine = SnpMachine(root, overrides={name: value})
    raw = machine.report(REPORT_DATA, 0)
    assert raw[place.offset : place.offset + place.size] == value
    assert len(raw) == REPORT_SIZE
    verify(raw, certificate(machine, certificate_table.VCEK))


@pytest.mark.parametrize(
    "overrides", [{"no_such_field": 1}, {"vmpl": 1 << 32}, {"measurement": b"short"}, {"guest_svn": -1}]
)
def test_an_override_that_fits_no_field_is_refused(root: AmdRoot, overrides: dict[str, Any]) -> None:
    """A test that means to lie must not lie about nothing."""
    with pytest.raises(UsageError):
        SnpMachine(root, overrides=overrides).report(REPORT_DATA, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"product": "Naples"},
        {"report_version": 6},
        {"signer": "me"},
        {"certificate_format": "txt"},
    ],
)
def test_a_machine_that_cannot_be_is_refused(root: AmdRoot, wrong: dict[str, Any]) -> None:
    """The choices are named."""
    with pytest.raises(UsageError, match="one of"):
        SnpMachine(root, **wrong)


@pytest.mark.parametrize(
    ("vmpck", "vmpl", "allowed"),
    [
        (0, 0, True),
        (0, 3, True),
        (2, 2, True),
        (2, 3, True),
        (2, 0, False),
        (2, 1, False),
        (0, 4, False),
        (0, -1, False),
    ],
)
def test_firmware_gives_reports_of_the_own_level_and_weaker_ones_only(
    root: AmdRoot, vmpck: int, vmpl: int, allowed: bool
) -> None:
    """A guest kernel under an SVSM can never get a report that says VMPL 0."""
    machine = SnpMachine(root, svsm=True)
    if allowed:
        assert Report.parse(machine.report(REPORT_DATA, vmpl, vmpck=vmpck)).vmpl == vmpl
        return
    with pytest.raises(HardwareError) as caught:
        machine.report(REPORT_DATA, vmpl, vmpck=vmpck)
    assert caught.value.code == "simulator.firmware-status"


@pytest.mark.parametrize("size", [0, 63, 65])
def test_firmware_takes_exactly_64_bytes_of_report_data(root: AmdRoot, size: int) -> None:
    """Nothing is padded or cut."""
    with pytest.raises(HardwareError):
        SnpMachine(root).report(bytes(size), 0)


def test_each_launch_has_a_report_id_of_its_own(root: AmdRoot) -> None:
    """REPORT_ID stays through a boot and changes with the next."""
    machine = SnpMachine(root)
    first, again = (Report.parse(machine.report(REPORT_DATA, 0)).report_id for _ in range(2))
    machine.reboot()
    assert first == again
    assert Report.parse(machine.report(REPORT_DATA, 0)).report_id != first


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["der", "pem"])
def test_a_table_reads_the_same_in_each_form(root: AmdRoot, form: str, padded: bool) -> None:
    """DER or PEM, trimmed or padded to 16 KiB: the certificates are the same."""
    machine = SnpMachine(root, certificate_format=form, pad_certificates=padded)
    table = machine.certificate_table()
    assert (len(table) == PADDED_TABLE_SIZE) is padded
    assert certificate(machine, certificate_table.ASK) == root.ask_der
    assert certificate(machine, certificate_table.ARK) == root.ark_der
    assert (b"-----BEGIN CERTIFICATE-----" in table) is (form == "pem")
    assert not any(table[certificate_extent(table) :])


def test_a_table_stores_guids_in_rfc_4122_order() -> None:
    """Unlike everywhere else in SNP; offsets and lengths are little-endian."""
    table = pack_certificate_table({certificate_table.VCEK: b"payload"})
    assert table == certificate_table.VCEK.bytes + bytes.fromhex("3000000007000000") + bytes(24) + b"payload"


def test_a_real_table_reaches_as_far_as_its_entries_say(vectors: Path) -> None:
    """Linux cuts a table at the end of the entry that reaches farthest; this one was cut by it."""
    table = (vectors / "certtable/veraison-genoa-auxblob.bin").read_bytes()
    assert certificate_extent(table) == len(table)
    assert certificate_extent(table.ljust(PADDED_TABLE_SIZE, b"\x00")) == len(table)
    assert certificate_extent(b"") == 0


def test_an_empty_table_stays_empty(root: AmdRoot) -> None:
    """A host that was given no certificates hands out nothing, padded or not."""
    assert SnpMachine(root, certificates={}, pad_certificates=True).certificate_table() == b""
