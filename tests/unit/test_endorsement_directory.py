"""Endorsements in files: imported whole or not at all, found by chip and TCB, and never trusted for lying there."""

from __future__ import annotations

import ssl
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, OperatorError
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine, pack_certificate_table
from kagimori_verifier.claims import Root
from kagimori_verifier.endorsements.directory import MAX_FILE, EndorsementDirectory
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.snp import verify_report

DATA = bytes(64)
CHIP = bytes(range(1, 65))


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def kept(tmp_path: Path) -> EndorsementDirectory:
    """Give a directory that is not there yet."""
    return EndorsementDirectory(tmp_path / "endorsements")


def files(tmp_path: Path) -> list[str]:
    """Name everything that is there, also what a glob would hide."""
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def pem(*ders: bytes) -> bytes:
    """Write PEM blocks one after another."""
    return "".join(ssl.DER_cert_to_PEM_cert(der) for der in ders).encode()


def authentic(machine: SnpMachine, kept: EndorsementDirectory, carried: bytes = b"") -> bool:
    """Verify a machine's report with what the directory finds."""
    pin = Certificate.parse(machine.root.ark_der).spki_sha256
    raw = machine.report(DATA, 0)
    roots = TrustedRoots([Root(pin, machine.root.product, "simulated")])
    return bool(verify_report(Trail(), raw, kept.find(raw, carried), roots).product)


@pytest.mark.parametrize("signer", ["vcek", "vlek"])
@pytest.mark.parametrize("form", ["der", "pem", "padded"])
def test_an_imported_table_endorses_reports_that_carry_nothing(
    root: AmdRoot, kept: EndorsementDirectory, signer: str, form: str
) -> None:
    """The host's table, saved once, serves later reports of the same key."""
    machine = SnpMachine(
        root,
        chip_id=CHIP,
        signer=signer,
        certificate_format="pem" if form == "pem" else "der",
        pad_certificates=form == "padded",
    )
    lines = kept.add(machine.certificate_table())
    assert len(lines) == 3
    assert authentic(machine, kept)


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_certificates_may_come_one_by_one_and_as_a_pem_chain(
    cache: Path, kept: EndorsementDirectory, product: str
) -> None:
    """As AMD's key service gives them: a VCEK as DER, ASK and ARK as one PEM file, a list as DER."""
    root = AmdRoot.cached(cache / "amd", product)
    machine = SnpMachine(root)
    vek = machine.vek()
    assert vek is not None
    (line,) = kept.add(vek.certificate_der)
    assert line.startswith(f"VCEK of chip {machine.chip_id.rstrip(bytes(1)).hex()[:16]}")
    assert [line.split(",")[0] for line in kept.add(pem(root.ask_der, root.ark_der))] == [
        f"CA SEV-{product}",
        f"CA ARK-{product}",
    ]
    (line,) = kept.add(root.crl())
    assert line.startswith("revocation list of ")
    assert authentic(machine, kept)
    found = kept.find(machine.report(DATA, 0), b"")
    assert list(found.revocation_lists) == [root.crl()] or len(found.revocation_lists) == 1


def test_importing_again_changes_nothing(root: AmdRoot, kept: EndorsementDirectory, tmp_path: Path) -> None:
    """One file a certificate, readable by the service's user whoever imported it, and nothing unfinished left."""
    table = SnpMachine(root, chip_id=CHIP).certificate_table()
    first = kept.add(table)
    before = files(tmp_path)
    assert kept.add(table) == first
    assert files(tmp_path) == before
    assert len(before) == 3
    assert all(name.endswith(".der") and "/." not in name for name in before)
    assert not list(tmp_path.rglob(".new-*"))
    for name in before:
        assert (tmp_path / name).stat().st_mode & 0o444 == 0o444


def test_only_the_certificates_for_this_chip_and_tcb_are_candidates(
    root: AmdRoot, kept: EndorsementDirectory
) -> None:
    """Thousands of chips in the directory cost a report nothing."""
    machine = SnpMachine(root, chip_id=CHIP)
    older = bytes.fromhex("03000000000018db")
    kept.add(pem(*(root.vcek(CHIP, tcb).certificate_der for tcb in (machine.reported_tcb, older))))
    kept.add(root.vcek(CHIP[::-1], machine.reported_tcb).certificate_der)
    kept.add(root.vlek(older).certificate_der)
    (vcek,) = kept.find(machine.report(DATA, 0), b"").certificates
    assert Certificate.parse(vcek).tcb().pack() == machine.reported_tcb


def test_what_is_carried_comes_beside_what_is_kept(root: AmdRoot, kept: EndorsementDirectory) -> None:
    """Certificates and lists from the host's table; entries that cannot be read are no candidates."""
    machine = SnpMachine(root, chip_id=CHIP)
    kept.add(pem(root.ask_der, root.ark_der))
    vek = machine.vek()
    assert vek is not None
    carried = pack_certificate_table(
        {
            certificate_table.VCEK: vek.certificate_der,
            certificate_table.CRL: root.crl(),
            certificate_table.ASK: b"-----BEGIN CERTIFICATE-----\nrubbish",
            uuid.UUID(int=7): b"what a host may add",
        }
    )
    found = kept.find(machine.report(DATA, 0), carried)
    assert (len(found.certificates), len(found.revocation_lists)) == (3, 1)
    assert authentic(machine, kept, carried)


@pytest.mark.parametrize("carried", [b"", bytes(16384), b"\x01", b"rubbish" * 100, b"\xff" * 65536])
def test_a_table_that_cannot_be_read_has_no_candidates(
    root: AmdRoot, kept: EndorsementDirectory, carried: bytes
) -> None:
    """The host made it; what is kept serves all the same."""
    machine = SnpMachine(root, chip_id=CHIP)
    kept.add(machine.certificate_table())
    assert authentic(machine, kept, carried)


@pytest.mark.parametrize("report", [b"", bytes(10), bytes(5000)])
def test_a_report_of_another_size_finds_no_chips_certificate(
    root: AmdRoot, kept: EndorsementDirectory, report: bytes
) -> None:
    """It will be refused for its layout; until then nothing stumbles."""
    kept.add(SnpMachine(root, chip_id=CHIP).certificate_table())
    names = {Certificate.parse(raw).common_name for raw in kept.find(report, b"").certificates}
    assert "SEV-VCEK" not in names


def test_nothing_kept_finds_nothing(root: AmdRoot, kept: EndorsementDirectory) -> None:
    """A directory that was never made is an empty one."""
    found = kept.find(SnpMachine(root).report(DATA, 0), b"")
    assert not found.certificates
    assert not found.revocation_lists


def _key(root: AmdRoot) -> bytes:
    return pem(root.ask_der).replace(b"CERTIFICATE", b"RSA PRIVATE KEY").replace(b"MII", b"AII", 1)


def test_a_file_with_anything_else_in_it_is_refused_and_nothing_of_it_is_kept(
    root: AmdRoot, kept: EndorsementDirectory, tmp_path: Path
) -> None:
    """All or nothing, and an operator's error with what was expected and found."""
    vcek = root.vcek(CHIP, bytes(8)).certificate_der
    cases = {
        "nothing": b"",
        "text": b"a certificate",
        "zeros": bytes(4096),
        "too large": root.ask_der + bytes(MAX_FILE),
        "a good one and a broken one": pem(root.ask_der)
        + pem(root.ark_der)[:200]
        + b"-----END CERTIFICATE-----\n",
        "a good one and no certificate": pem(root.ask_der) + _key(root),
        "an empty PEM block": b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        "a certificate cut short": vcek[:-10],
        "a table with a broken VCEK": pack_certificate_table(
            {certificate_table.ASK: root.ask_der, certificate_table.VCEK: vcek[:-1]}
        ),
    }
    for name, raw in cases.items():
        with pytest.raises(OperatorError) as caught:
            kept.add(raw)
        assert (caught.value.code, bool(caught.value.expected), bool(caught.value.found)) == (
            "endorsements.none",
            True,
            True,
        ), name
    assert files(tmp_path) == []


def test_a_hosts_own_entries_do_not_keep_a_table_from_being_imported(
    root: AmdRoot, kept: EndorsementDirectory
) -> None:
    """Entries with unknown GUIDs need be no certificates."""
    table = pack_certificate_table({uuid.UUID(int=7): b"\x01\x02", certificate_table.ASK: root.ask_der})
    assert len(kept.add(table)) == 1


def test_a_server_certificate_is_no_endorsement(vectors: Path, kept: EndorsementDirectory) -> None:
    """Somebody else's certificate, however genuine, is not AMD's."""
    for path in sorted((vectors / "gce-tpm" / "certs").glob("*.pem")):
        with pytest.raises(OperatorError):
            kept.add(path.read_bytes())


def test_real_certificates_import_and_endorse(vectors: Path, kept: EndorsementDirectory) -> None:
    """All of AMD's CAs, every VCEK and the VLEK; then every real report verifies from files alone."""
    for path in (*sorted(vectors.glob("amd-ca/*/*.der")), *sorted(vectors.glob("snp/*/v?ek*.der"))):
        assert len(kept.add(path.read_bytes())) == 1
    for path in sorted(vectors.glob("snp/*/report.bin")):
        raw = path.read_bytes()
        assert verify_report(Trail(), raw, kept.find(raw, b""), TrustedRoots()).product
    assert len(kept.add((vectors / "certtable" / "veraison-genoa-auxblob.bin").read_bytes())) == 3


def test_a_directory_that_cannot_be_written_is_the_operators_to_mend(root: AmdRoot, tmp_path: Path) -> None:
    """Named, with the path."""
    (tmp_path / "endorsements").write_text("a file in its place")
    with pytest.raises(OperatorError) as caught:
        EndorsementDirectory(tmp_path / "endorsements").add(root.ask_der)
    assert caught.value.code == "endorsements.write"
    assert str(tmp_path) in str(caught.value.expected)


def test_a_kept_file_that_cannot_be_read_is_the_operators_to_mend(
    root: AmdRoot, kept: EndorsementDirectory, tmp_path: Path
) -> None:
    """It is not taken for a missing certificate."""
    (tmp_path / "endorsements" / "ca" / "0.der").mkdir(parents=True)
    with pytest.raises(OperatorError) as caught:
        kept.find(SnpMachine(root).report(DATA, 0), b"")
    assert caught.value.code == "endorsements.read"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(raw=st.binary(max_size=200), report=st.binary(max_size=20))
def test_no_bytes_make_it_stumble(kept: EndorsementDirectory, raw: bytes, report: bytes) -> None:
    """Imported or carried: an operator's error at most, and no candidates."""
    with pytest.raises(KagimoriError):
        kept.add(raw)
    assert not kept.find(report, raw).revocation_lists


# Files that are read once


def test_a_kept_file_is_read_once(
    root: AmdRoot, kept: EndorsementDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier looks for each report; the files stay the same for months."""
    machine = SnpMachine(root, chip_id=CHIP)
    kept.add(machine.certificate_table())
    report = machine.report(DATA, 0)
    first = kept.find(report, b"")
    monkeypatch.setattr(Path, "read_bytes", None)
    assert kept.find(report, b"") == first


def test_what_the_owner_changes_while_the_verifier_runs_is_seen(
    root: AmdRoot, kept: EndorsementDirectory, tmp_path: Path
) -> None:
    """A revocation list that is imported, a file that is removed, and one that somebody edits in its place."""
    machine = SnpMachine(root, chip_id=CHIP)
    kept.add(machine.certificate_table())
    report = machine.report(DATA, 0)
    assert len(kept.find(report, b"").certificates) == 3
    assert not kept.find(report, b"").revocation_lists
    EndorsementDirectory(kept._root).add(root.crl())
    assert len(kept.find(report, b"").revocation_lists) == 1
    (vcek,) = (kept._root / "vcek").rglob("*.der")
    edited = vcek.read_bytes()[:-1] + b"\x00"
    with vcek.open("r+b") as file:
        file.write(edited)
    assert edited in kept.find(report, b"").certificates
    vcek.unlink()
    assert len(kept.find(report, b"").certificates) == 2
