"""``snp show`` and ``snp verify``: every byte of a real report counts, and so does every certificate behind it."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.desks import outside, run

from kagimori_protocol import certificate_table
from kagimori_protocol.snp import FIELDS, REPORT_SIZE, Report
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier.claims import Root
from kagimori_verifier.cli import evidence_snp
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.verify.certificate import Certificate

PAIRS = {
    "milan-v2": "milan-v2-vcek-120d77b2",
    "milan-v3": "milan-v3-vcek-05b7438a",
    "genoa-v3": "genoa-v3-vcek-4ae0e73a",
    "siena-v5": "bergamo_siena-v5-vcek-7ea4daeb",
    "turin-v5": "turin-v5-vcek-3f44a09b",
    "milan-vlek": "milan-v2-vlek-affb92f9",
}


def words(report: Path, vek: Path, ca: Path) -> tuple[str | Path, ...]:
    """Give the words that verify a report."""
    return "snp", "verify", report, "--vek", vek, "--ca", ca, "--json"


def pair(vectors: Path, name: str) -> tuple[Path, Path]:
    """Give a real report and its certificate."""
    directory = vectors / "snp" / PAIRS[name]
    (vek,) = directory.glob("v?ek.der")
    return directory / "report.bin", vek


def verify(
    vectors: Path, name: str, tmp: Path, change: Callable[[bytearray], object]
) -> tuple[str | Path, ...]:
    """Change a real report, and give the words that verify it."""
    original, vek = pair(vectors, name)
    raw = bytearray(original.read_bytes())
    change(raw)
    report = tmp / "report.bin"
    report.write_bytes(raw)
    return words(report, vek, vectors / "amd-ca")


def flip(offset: int, bit: int = 0) -> Callable[[bytearray], object]:
    """Give the change of one bit."""

    def change(raw: bytearray) -> None:
        raw[offset] ^= 1 << bit

    return change


def expected(name: str, field: str) -> set[str]:
    """Name the checks of which one must fail when a field is changed."""
    version = 2 if name == "milan-vlek" else int(name[-1])
    absent = (field.startswith("cpuid") and version < 3) or (field.endswith("mit_vector") and version < 5)
    if field == "version" or absent:
        return {"report.layout"}
    chip = {"report.signature"} if name == "milan-vlek" else {"endorsement.chip"}
    layout = {"report.signature", "report.tcb-layout"}
    return {
        "signature_algo": {"report.signature-algo"},
        "key_info": {"report.layout", "report.signing-key", "endorsement.found", "report.signature"},
        "reported_tcb": {"endorsement.tcb", "report.tcb-layout"},
        "committed_tcb": layout,
        "current_tcb": layout,
        "launch_tcb": layout,
        "cpuid_fam_id": {"endorsement.product"},
        "cpuid_mod_id": {"endorsement.product", "report.signature"},  # a product's models are a range
        "chip_id": chip,
    }.get(field, {"report.signature"})


@pytest.mark.parametrize("name", PAIRS)
def test_any_changed_field_of_a_real_report_is_refused_by_the_check_that_guards_it(
    name: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of each field; the reason says which of AMD's promises would have been broken."""
    chance = random.Random(name)
    for field, (offset, size) in FIELDS.items():
        done = run(
            capsys,
            *verify(vectors, name, tmp_path, flip(offset + chance.randrange(size), chance.randrange(8))),
        )
        assert (done.code, done.json["verified"]) == (1, False), field
        failed = {check["check"] for check in done.json["checks"] if not check["holds"]}
        assert len(failed) == 1
        assert failed <= expected(name, field), field


@pytest.mark.parametrize("name", PAIRS)
def test_a_bit_where_a_report_must_be_zero_is_refused(
    name: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be hidden between the fields, nor behind the signature's numbers."""
    covered = {at for offset, size in FIELDS.values() for at in range(offset, offset + size)}
    between = [at for at in range(REPORT_SIZE) if at not in covered]
    for offset in random.Random(name).sample(between, 12):
        done = run(capsys, *verify(vectors, name, tmp_path, flip(offset)))
        assert done.code == 1
        assert done.json["reasons"][0].startswith("report.layout: ")
        assert f"0x{offset:03x}" in done.json["reasons"][0]


def test_a_masked_chip_is_refused_and_said_to_be_one(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that hides its chip cannot show a VCEK for it, however good that is."""

    def mask(raw: bytearray) -> None:
        raw[0x1A0:0x1E0] = bytes(64)

    done = run(capsys, *verify(vectors, "milan-v3", tmp_path, mask))
    assert done.code == 1
    assert done.json["reasons"][0].startswith("endorsement.chip: ")
    assert any("masks its chip" in note for note in done.json["notes"])


def test_a_real_vlek_that_has_expired_is_authentic_and_said_to_be_expired(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is genuine and whether anybody should take it today are two questions."""
    done = run(capsys, *words(*pair(vectors, "milan-vlek"), vectors / "amd-ca"))
    assert done.code == 0
    assert done.json["valid_until"].startswith("2025-05-05")
    assert done.json["csp_id"] == "CN=cc-us-east-2.amazonaws.com"
    assert any("expired on 2025-05-05" in note for note in done.json["notes"])


def test_the_certificate_that_counts_is_the_one_that_was_named(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asks about one certificate is not answered about another that lies in the directory."""
    ca = tmp_path / "ca"
    shutil.copytree(vectors / "amd-ca" / "milan", ca)
    right, wrong = (vectors / "snp" / name for name in ("milan-v3-vcek-05b7438a", "milan-v3-vcek-14fd2b6e"))
    shutil.copy(right / "vcek.der", ca / "vcek.der")
    done = run(capsys, *words(right / "report.bin", wrong / "vcek.der", ca))
    assert done.code == 1
    assert done.json["reasons"][0].startswith("endorsement.chip: ")
    assert any("counts only as --vek" in note for note in done.json["notes"])
    for other in ("ask.der", "ark.der"):
        done = run(capsys, *words(right / "report.bin", ca / other, ca))
        assert done.json["reasons"][0].startswith("endorsement.found: ")


def test_an_intermediate_for_vleks_vouches_for_no_vcek(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ASK and ASVK hang on the same root; each is for its own kind."""
    ca = tmp_path / "ca"
    ca.mkdir()
    for name in ("ark", "asvk"):
        shutil.copy(vectors / "amd-ca" / "milan" / f"{name}.der", ca)
    done = run(capsys, *words(*pair(vectors, "milan-v3"), ca))
    assert done.code == 1
    assert done.json["reasons"][0].startswith("endorsement.chain: ")


def test_one_file_may_hold_the_whole_chain_as_kds_gives_it(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEM, the intermediate first, with a block of something else between."""
    ca = tmp_path / "ca"
    ca.mkdir()
    pem = [
        ssl.DER_cert_to_PEM_cert((vectors / f"amd-ca/milan/{name}.der").read_bytes())
        for name in ("ask", "ark")
    ]
    key = "-----BEGIN PRIVATE KEY-----\nbm90IG9uZQ==\n-----END PRIVATE KEY-----\n"
    (ca / "cert_chain").write_text(key.join(pem))
    done = run(capsys, *words(*pair(vectors, "milan-v3"), ca))
    assert done.code == 0
    assert any("cert_chain is passed over" in note for note in done.json["notes"])
    vek = tmp_path / "all.pem"
    report, certificate = pair(vectors, "milan-v3")
    vek.write_text(pem[0] + ssl.DER_cert_to_PEM_cert(certificate.read_bytes()) + pem[1])
    done = run(capsys, *words(report, vek, ca))
    assert done.code == 0
    assert any("only one SEV-VCEK counts" in note for note in done.json["notes"])


@pytest.fixture
def simulated(tmp_path: Path, cache: Path) -> Path:
    """Give a directory with a report that a simulated chip signed, its certificates, and a revocation list."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd"))
    directory = tmp_path / "simulated"
    directory.mkdir()
    (directory / "report.bin").write_bytes(machine.report(bytes(range(64)), 0))
    for entry in certificate_table.parse(machine.certificate_table()):
        (directory / f"{entry.name.lower()}.der").write_bytes(entry.der())
    (directory / "crl").write_bytes(machine.root.crl())
    return directory


def trust(monkeypatch: pytest.MonkeyPatch, simulated: Path) -> None:
    """Let the simulated root be one of the pinned ones, so that what comes after it can be tried."""
    pin = Certificate.parse((simulated / "ark.der").read_bytes()).spki_sha256
    roots = TrustedRoots([Root(pin, "Milan", "simulated")])
    monkeypatch.setattr(evidence_snp, "TrustedRoots", lambda: roots)


def test_a_revocation_list_in_the_directory_counts(
    simulated: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the root signed it: then it revokes, and until when it counts is told. In PEM, too."""
    trust(monkeypatch, simulated)
    asked = words(simulated / "report.bin", simulated / "vcek.der", simulated)
    good = run(capsys, *asked)
    assert good.code == 0
    assert good.json["revocation_list_until"]
    assert not any("revocation list" in note for note in good.json["notes"])
    serial = Certificate.parse((simulated / "ask.der").read_bytes()).fields.serial_number
    root = AmdRoot.cached(cache / "amd")
    pem = x509.load_der_x509_crl(root.crl([serial])).public_bytes(Encoding.PEM)
    (simulated / "crl").write_bytes(pem)
    bad = run(capsys, *asked)
    assert bad.code == 1
    assert bad.json["reasons"][0].startswith("endorsement.revoked: ")
    long_ago = dt.datetime(2023, 1, 1, tzinfo=dt.UTC)
    (simulated / "crl").write_bytes(root.crl(last_update=long_ago))
    stale = run(capsys, *asked)
    assert stale.code == 0
    assert any("when the next was due" in note for note in stale.json["notes"])


def test_a_revocation_list_of_somebody_else_does_not_count_and_that_is_said(
    simulated: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list that anybody could have signed neither revokes nor reassures."""
    trust(monkeypatch, simulated)
    serial = Certificate.parse((simulated / "ask.der").read_bytes()).fields.serial_number
    (simulated / "crl").write_bytes(AmdRoot.cached(cache / "amd", "Genoa").crl([serial]))
    done = run(capsys, *words(simulated / "report.bin", simulated / "vcek.der", simulated))
    assert done.code == 0
    assert any("the one that is there does not count" in note for note in done.json["notes"])


def test_a_root_that_is_not_amds_is_refused_though_all_else_holds(
    simulated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A simulated chip really signs; only whose root it is tells the difference."""
    done = run(capsys, *words(simulated / "report.bin", simulated / "vcek.der", simulated))
    assert done.code == 1
    assert done.json["reasons"][0].startswith("endorsement.root: expected an ARK of: AMD's ARK-Milan")


def test_what_does_not_belong_in_the_directory_is_passed_over(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pipes, empty and huge files, files that cannot be read, names that are no UTF-8, directories."""
    ca = tmp_path / "ca"
    shutil.copytree(vectors / "amd-ca" / "milan", ca / "deep" / "er")
    (ca / "empty").touch()
    (ca / "huge").write_bytes(bytes((1 << 20) + 1))
    (ca / "noise").write_bytes(random.Random(1).randbytes(2000))
    (ca / "half.pem").write_text("-----BEGIN CERTIFICATE-----\nMII")
    (ca / os.fsdecode(b"\xff\xfe")).write_bytes(b"\xff")
    (ca / "nowhere").symlink_to(tmp_path / "absent")
    os.mkfifo(ca / "pipe")
    done = run(capsys, *words(*pair(vectors, "milan-v3"), ca))
    assert done.code == 0
    assert sum("is passed over" in note for note in done.json["notes"]) == 7
    told = run(capsys, *words(*pair(vectors, "milan-v3"), ca)[:-1])
    assert told.code == 0
    assert told.out.endswith("It holds.\n")


@pytest.mark.parametrize("ca", ["absent", "a file", "\0", "empty", "too many"])
def test_a_directory_that_holds_nothing_gives_nothing(
    ca: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No certificates are no reason to believe."""
    (tmp_path / "a file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "too many").mkdir()
    for number in range(1001 if ca == "too many" else 0):
        (tmp_path / "too many" / str(number)).touch()
    done = run(capsys, *words(*pair(vectors, "milan-v3"), tmp_path / ca))
    assert done.json["verified"] is False
    if ca == "empty":
        assert done.code == 1
        assert done.json["reasons"][0].startswith("endorsement.root: ")
    else:
        assert (done.code, done.error) == (2, "file.count" if ca == "too many" else "file.read")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_certificate_never_verifies(
    data: st.DataObject, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit anywhere: either its issuer did not sign it, or it is none any more."""
    report, vek = pair(vectors, data.draw(st.sampled_from(sorted(PAIRS))))
    raw = bytearray(vek.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    changed = tmp_path / "vek.der"
    changed.write_bytes(raw)
    done = run(capsys, *words(report, changed, vectors / "amd-ca"))
    assert done.code in (1, 2)
    assert done.json["verified"] is False


@pytest.mark.parametrize("name", PAIRS)
def test_show_names_every_field_and_bit_for_a_person(
    name: str, vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No field is left out, whether it says anything or not."""
    report = vectors / "snp" / PAIRS[name] / "report.bin"
    told = run(capsys, "snp", "show", report).out
    parsed = Report.parse(report.read_bytes())
    for text in (
        "VMPL",
        "SMT",
        "DEBUG",
        "TSME_EN",
        "IOMMU_WRITE_SAFE",
        "REPORTED",
        "COMMITTED",
        "microcode",
        "KEY_INFO",
    ):
        assert text in told
    for value in (parsed.report_data, parsed.measurement, parsed.report_id):
        assert not any(value) or value.hex()[:64] in told
    assert ("fmc" in told) is (name == "turin-v5")
    assert ("launch_mit_vector" in told) is (parsed.version == 5)
    assert ("VLEK, a key that AMD lent" in told) is (name == "milan-vlek")
    assert not any(line != line.rstrip() for line in told.splitlines())


def test_show_names_bits_that_nobody_knows(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A newer platform may set what this release has no name for; that is shown, not hidden."""

    def newer(raw: bytearray) -> None:
        raw[0x00B] |= 0x80  # policy bit 31
        raw[0x041] |= 0x01  # platform bit 8
        raw[0x180 + 3] = 9  # a reserved part of the TCB

    verify(vectors, "milan-v3", tmp_path, newer)
    told = run(capsys, "snp", "show", tmp_path / "report.bin")
    assert told.code == 0
    assert "bit 31  unknown" in told.out
    assert "bit 8  unknown" in told.out
    assert "?" in told.out


def test_as_a_process_with_its_report_on_stdin(vectors: Path) -> None:
    """What a script runs: exit code, one object on stdout, nothing on stderr."""
    report, vek = pair(vectors, "turin-v5")
    asked = words(Path("-"), vek, vectors / "amd-ca")
    with report.open("rb") as stdin:
        done = outside(
            *asked, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, capture_output=False
        )
    assert (done.returncode, done.stderr, json.loads(done.stdout)["verified"]) == (0, "", True)
    told = outside("snp", "show", report)
    assert (told.returncode, told.stderr) == (0, "")
    assert "Turin" in told.stdout
