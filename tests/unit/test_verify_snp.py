"""A report counts if a key that AMD's root vouches for signed it; every break of that chain refuses by its name."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, NotAuthentic
from kagimori_protocol.snp import REPORT_SIZE, SIGNED_SIZE, TcbVersion
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier.appraise.endorsement import appraise_endorsement
from kagimori_verifier.appraise.policy import Policy, TcbFloor
from kagimori_verifier.claims import Root, SnpClaims
from kagimori_verifier.roots import AMD_ROOTS, TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.snp import Endorsements, verify_report

DATA = bytes(range(64))
CHIP = bytes(range(1, 65))
NOW = dt.datetime.now(dt.UTC)


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


def trusting(*roots: AmdRoot) -> TrustedRoots:
    """Trust simulated roots, as an operator would who added them."""
    pins = [(Certificate.parse(root.ark_der).spki_sha256, root.product) for root in roots]
    return TrustedRoots([Root(pin, product, "simulated") for pin, product in pins])


def endorsed(machine: SnpMachine, lists: Iterable[bytes] = ()) -> Endorsements:
    """Give what the host hands out."""
    entries = certificate_table.parse(machine.certificate_table())
    return Endorsements([entry.der() for entry in entries], list(lists))


def verify(machine: SnpMachine, lists: Iterable[bytes] = ()) -> SnpClaims:
    """Verify a machine's report with its host's certificates under its root."""
    return verify_report(Trail(), machine.report(DATA, 0), endorsed(machine, lists), trusting(machine.root))


def refused(code: str, raw: bytes, endorsements: Endorsements, roots: TrustedRoots) -> NotAuthentic:
    """Give the error with which a report is refused; the check that it names is the last on the trail."""
    trail = Trail()
    with pytest.raises(NotAuthentic) as caught:
        verify_report(trail, raw, endorsements, roots)
    assert caught.value.code == code
    assert [check.id for check in trail.failed] == [code] == [trail.checks[-1].id]
    return caught.value


# Honest reports


@pytest.mark.parametrize("signer", ["vcek", "vlek"])
@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_an_honest_report_of_every_kind_is_authentic(
    cache: Path, product: str, version: int, signer: str
) -> None:
    """All products, versions and signers; only version 2 of Turin's VLEK cannot tell its product by a chip id."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd", product), report_version=version, signer=signer)
    claims = verify(machine)
    assert (claims.product, claims.signer, claims.report.version) == (product, signer, version)
    assert claims.reported_tcb.pack() == machine.reported_tcb
    assert (claims.csp_id is None) == (signer == "vcek")
    assert claims.root.label == "simulated"
    assert "no root of AMD" in str(claims.root)
    assert claims.boot == (signer, claims.report.chip_id, claims.report.report_id)


def test_all_tcb_versions_are_read_in_the_products_order(cache: Path) -> None:
    """Turin's order is not Milan's."""
    four = [TcbVersion(fmc=number, boot_loader=2, tee=3, snp=4, microcode=5) for number in range(4)]
    names = ("reported_tcb", "committed_tcb", "current_tcb", "launch_tcb")
    packed: dict[str, Any] = dict(zip(names, (tcb.pack() for tcb in four), strict=True))
    claims = verify(SnpMachine(AmdRoot.cached(cache / "amd", "Turin"), **packed))
    assert [getattr(claims, name) for name in names] == four


def test_certificates_in_any_order_with_rubbish_between_serve(root: AmdRoot) -> None:
    """Candidates are only candidates; another chip's VCEK and another product's CA do no harm."""
    machine = SnpMachine(root, chip_id=CHIP)
    other = root.vcek(CHIP[::-1], machine.reported_tcb).certificate_der
    good = list(endorsed(machine).certificates)
    mixed = [b"", b"rubbish", other, *good[::-1], root.asvk_der, bytes(100), *good]
    assert (
        verify_report(Trail(), machine.report(DATA, 0), Endorsements(mixed), trusting(root)).product
        == "Milan"
    )


def test_a_reissued_certificate_serves_as_well(root: AmdRoot) -> None:
    """AMD's key service makes new dates over the same key at each request."""
    machine = SnpMachine(root, chip_id=CHIP)
    reissued = root.vcek(CHIP, machine.reported_tcb, not_before=dt.datetime(2025, 1, 1, tzinfo=dt.UTC))
    given = Endorsements([reissued.certificate_der, root.ask_der, root.ark_der])
    claims = verify_report(Trail(), machine.report(DATA, 0), given, trusting(root))
    assert claims.valid_until.year == 2032


# Whose word counts


def test_amds_pins_cannot_be_replaced() -> None:
    """Who adds a root under AMD's own pin changes nothing; nothing else is trusted by itself."""
    milan = AMD_ROOTS[0]
    assert TrustedRoots([Root(milan.spki_sha256, "Genoa", "mine")]).get(milan.spki_sha256) == milan
    assert TrustedRoots().get(bytes(32)) is None
    assert str(TrustedRoots()) == "AMD's ARK-Milan, AMD's ARK-Genoa, AMD's ARK-Turin"


def test_a_root_that_nobody_added_is_refused(root: AmdRoot) -> None:
    """The simulated chain is perfect but for its root, whose name is AMD's."""
    machine = SnpMachine(root)
    error = refused("endorsement.root", machine.report(DATA, 0), endorsed(machine), TrustedRoots())
    assert "ARK-Milan with key" in str(error.found)


def test_a_root_for_one_product_vouches_for_no_other(root: AmdRoot) -> None:
    """The operator said Milan or Genoa; the intermediate's name must fit."""
    pin = Certificate.parse(root.ark_der).spki_sha256
    machine = SnpMachine(root)
    roots = TrustedRoots([Root(pin, "Genoa", "simulated")])
    refused("endorsement.chain", machine.report(DATA, 0), endorsed(machine), roots)


def test_two_trusted_roots_do_not_mix(cache: Path, root: AmdRoot) -> None:
    """A Milan VCEK with Genoa's CAs is no chain."""
    genoa = AmdRoot.cached(cache / "amd", "Genoa")
    machine = SnpMachine(root)
    given = Endorsements([endorsed(machine).certificates[0], genoa.ask_der, genoa.ark_der])
    refused("endorsement.chain", machine.report(DATA, 0), given, trusting(root, genoa))


def test_an_asvk_signs_no_vcek_and_an_ask_no_vlek(root: AmdRoot) -> None:
    """The two kinds of intermediate stay apart, whatever the other one is offered."""
    for signer, issuer in (("vcek", root.asvk_der), ("vlek", root.ask_der)):
        machine = SnpMachine(root, signer=signer)
        given = Endorsements([endorsed(machine).certificates[0], issuer, root.ark_der])
        refused("endorsement.chain", machine.report(DATA, 0), given, trusting(root))


@pytest.mark.parametrize(("missing", "code"), [(0, "found"), (1, "chain"), (2, "root")])
def test_a_missing_certificate_is_told_apart(root: AmdRoot, missing: int, code: str) -> None:
    """No VCEK, no ASK, no ARK."""
    machine = SnpMachine(root)
    by_role = [
        machine.chain()[guid]
        for guid in (certificate_table.VCEK, certificate_table.ASK, certificate_table.ARK)
    ]
    del by_role[missing]
    refused(f"endorsement.{code}", machine.report(DATA, 0), Endorsements(by_role), trusting(root))


def test_no_certificates_at_all_are_refused(root: AmdRoot) -> None:
    """Empty means no."""
    refused("endorsement.found", SnpMachine(root).report(DATA, 0), Endorsements([]), trusting(root))


# The certificate against the report


LIES: dict[str, tuple[Callable[[AmdRoot], SnpMachine], str]] = {
    "a host that hides its chip": (
        lambda root: SnpMachine(root, chip_id=CHIP, overrides={"chip_id": bytes(64)}),
        "endorsement.chip",
    ),
    "a report about another chip": (
        lambda root: SnpMachine(root, chip_id=CHIP, overrides={"chip_id": CHIP[::-1]}),
        "endorsement.chip",
    ),
    "a report about firmware that the key is not for": (
        lambda root: SnpMachine(root, overrides={"reported_tcb": bytes.fromhex("04000000000019db")}),
        "endorsement.tcb",
    ),
    "a VCEK used where the report says VLEK": (
        lambda root: SnpMachine(root, overrides={"key_info": 4}),
        "endorsement.found",
    ),
    "a report that is not signed": (lambda root: SnpMachine(root, signer="none"), "report.signing-key"),
    "a signing key that AMD reserves": (
        lambda root: SnpMachine(root, overrides={"key_info": 2 << 2}),
        "report.signing-key",
    ),
    "a platform that masks its chip key": (
        lambda root: SnpMachine(root, overrides={"key_info": 2}),
        "report.signing-key",
    ),
    "another signature algorithm": (
        lambda root: SnpMachine(root, overrides={"signature_algo": 2}),
        "report.signature-algo",
    ),
    "a report of a Genoa under Milan's root": (
        lambda root: SnpMachine(root, cpuid=(0x19, 0x11, 1)),
        "endorsement.product",
    ),
    "a report of a part that nobody knows": (
        lambda root: SnpMachine(root, cpuid=(0x1A, 0x50, 0)),
        "endorsement.product",
    ),
    "a version 2 report that looks like Turin's": (
        lambda root: SnpMachine(root, report_version=2, overrides={"chip_id": CHIP[:8] + bytes(56)}),
        "endorsement.product",
    ),
    "a TCB with a reserved byte set": (
        lambda root: SnpMachine(root, overrides={"current_tcb": bytes.fromhex("04000100000018db")}),
        "report.tcb-layout",
    ),
    "an impostor who signs with a key of another chip": (
        lambda root: SnpMachine(root, chip_id=CHIP, impostor=root.vcek(CHIP[::-1], bytes(8))),
        "report.signature",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_report_that_its_certificate_does_not_fit_is_refused(root: AmdRoot, lie: str) -> None:
    """Each disagreement by its name."""
    make, code = LIES[lie]
    machine = make(root)
    given = Endorsements([*(machine.chain() or SnpMachine(root).chain()).values(), root.ark_der])
    refused(code, machine.report(DATA, 0), given, trusting(root))


@pytest.mark.parametrize(
    "raw", [b"", bytes(REPORT_SIZE), bytes(REPORT_SIZE - 1), b"\x01" * REPORT_SIZE, b"\x02" + bytes(4095)]
)
def test_what_is_no_report_is_refused_before_anything_else(raw: bytes) -> None:
    """Not even certificates are looked at."""
    refused("report.layout", raw, Endorsements([]), TrustedRoots())


@settings(max_examples=60)
@given(data=st.data())
def test_every_signed_bit_and_the_signature_count(cache: Path, data: st.DataObject) -> None:
    """Any flipped bit of the report is refused, wherever it is noticed first."""
    root = AmdRoot.cached(cache / "amd")
    machine = SnpMachine(root, chip_id=CHIP, report_version=data.draw(st.sampled_from([2, 5])))
    raw = bytearray(machine.report(DATA, 0))
    bit = data.draw(st.integers(0, 8 * SIGNED_SIZE - 1) | st.integers(0, 8 * REPORT_SIZE - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NotAuthentic):
        verify_report(Trail(), bytes(raw), endorsed(machine), trusting(root))


@pytest.mark.parametrize("value", [b"\x00" * 72, b"\xff" * 72, b"\x01" + bytes(71)])
@pytest.mark.parametrize("offset", [0x2A0, 0x2E8])
def test_a_signature_of_impossible_numbers_is_refused(root: AmdRoot, offset: int, value: bytes) -> None:
    """R or S zero, far too large, or one."""
    machine = SnpMachine(root)
    raw = bytearray(machine.report(DATA, 0))
    raw[offset : offset + 72] = value
    refused("report.signature", bytes(raw), endorsed(machine), trusting(root))


def test_a_vcek_without_amds_extensions_chains_to_nothing(root: AmdRoot) -> None:
    """Signed by the ASK, but it says neither chip nor TCB: refused as a certificate, not a crash."""
    machine = SnpMachine(root)
    vek = machine.vek()
    assert vek is not None
    marked = bytes.fromhex("060a2b060104019c78010301")  # 1.3.6.1.4.1.3704.1.3.1
    given = [raw.replace(marked, marked[:-1] + b"\x7f") for raw in endorsed(machine).certificates]
    assert given != list(endorsed(machine).certificates)
    refused("endorsement.chain", machine.report(DATA, 0), Endorsements(given), trusting(root))


OID = "1.3.6.1.4.1.3704.1."
UNTOLD = {
    "product": (OID + "2", "vcek", "endorsement.product"),
    "boot loader": (OID + "3.1", "vcek", "endorsement.tcb"),
    "microcode": (OID + "3.8", "vlek", "endorsement.tcb"),
    "chip": (OID + "4", "vcek", "endorsement.chip"),
    "provider": (OID + "5", "vlek", "endorsement.chip"),
}


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("missing", UNTOLD)
def test_what_a_certified_key_does_not_say_of_itself_fails_the_check_that_asks_for_it(
    root: AmdRoot, missing: str, broken: bool
) -> None:
    """AMD signed it, but an extension is not there, or is none: a check with a name, not an error without one."""
    oid, signer, code = UNTOLD[missing]
    machine = SnpMachine(root, signer=signer)
    vek = machine.vek()
    assert vek is not None
    said = [
        (extension.oid.dotted_string, extension.value.public_bytes())
        for extension in Certificate.parse(vek.certificate_der).fields.extensions
    ]
    told = [(name, b"\x04\x00" if name == oid else value) for name, value in said if broken or name != oid]
    assert told != said
    name, issuer = ("SEV-VCEK", root.ask) if signer == "vcek" else ("SEV-VLEK", root.asvk)
    certificate = root._issue_vek(name, issuer, vek.private_key, told, None)
    given = Endorsements([certificate, issuer.der, root.ark_der])
    refused(code, machine.report(DATA, 0), given, trusting(root))


def test_a_certificate_for_no_chip_vouches_for_no_masked_one(root: AmdRoot) -> None:
    """All zeros in both would agree, and name nothing."""
    machine = SnpMachine(root, chip_id=bytes(64))
    refused("endorsement.chip", machine.report(DATA, 0), endorsed(machine), trusting(root))


# Revocation and validity


def test_without_a_list_that_is_told_and_left_to_policy(root: AmdRoot) -> None:
    """Authentic, but nothing is known of revocation."""
    revocation = verify(SnpMachine(root)).revocation
    assert (revocation.next_update, revocation.missing) == (None, "no revocation list signed by ARK-Milan")


def test_a_list_without_the_intermediate_says_until_when(root: AmdRoot) -> None:
    """The newest of several lists counts."""
    old = root.crl(last_update=NOW - dt.timedelta(days=300))
    new = root.crl(last_update=NOW - dt.timedelta(days=1))
    claims = verify(SnpMachine(root), [new, old, b"rubbish"])
    assert claims.revocation.next_update is not None
    assert claims.revocation.next_update - NOW > dt.timedelta(days=360)


@pytest.mark.parametrize("signer", ["vcek", "vlek"])
def test_a_revoked_intermediate_is_refused(root: AmdRoot, signer: str) -> None:
    """ASK for a VCEK, ASVK for a VLEK; the other one's revocation changes nothing, nor does an older, empty list."""
    ask, asvk = root.ask.certificate.serial_number, root.asvk.certificate.serial_number
    mine, other = (ask, asvk) if signer == "vcek" else (asvk, ask)
    machine = SnpMachine(root, signer=signer)
    raw = machine.report(DATA, 0)
    empty = root.crl(last_update=NOW - dt.timedelta(days=30))
    refused("endorsement.revoked", raw, endorsed(machine, [empty, root.crl([mine])]), trusting(root))
    verify_report(Trail(), raw, endorsed(machine, [empty, root.crl([other])]), trusting(root))


def test_a_list_that_the_ark_did_not_sign_is_none(cache: Path, root: AmdRoot) -> None:
    """Another root's list, or a changed one: it neither revokes nor reassures."""
    genoa = AmdRoot.cached(cache / "amd", "Genoa")
    serial = root.ask.certificate.serial_number
    changed = bytearray(root.crl([serial]))
    changed[-1] ^= 1
    for foreign in (genoa.crl([serial]), bytes(changed), root.crl([serial]) + b"\x00", b"", root.ark_der):
        assert verify(SnpMachine(root), [foreign]).revocation.missing


@settings(max_examples=50)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # of names that no country has
def test_no_list_makes_it_stumble(cache: Path, data: st.DataObject) -> None:
    """A changed list is no list."""
    root = AmdRoot.cached(cache / "amd")
    raw = bytearray(_list(root))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert verify(_machine(root), [bytes(raw)]).revocation.missing


_MADE: dict[str, Any] = {}


def _list(root: AmdRoot) -> bytes:
    return _MADE.setdefault("list", root.crl([root.ask.certificate.serial_number]))  # type: ignore[no-any-return]  # put there as bytes


def _machine(root: AmdRoot) -> SnpMachine:
    return _MADE.setdefault("machine", SnpMachine(root))  # type: ignore[no-any-return]  # put there as a machine


def test_an_expired_vlek_is_authentic_and_refused_by_policy(root: AmdRoot) -> None:
    """The guest's report was genuine and still is; whether last year's VLEK counts today is the owner's rule."""
    machine = SnpMachine(root, signer="vlek")
    expired = root.vlek(machine.reported_tcb, machine.csp_id, not_before=NOW - dt.timedelta(days=366))
    given = Endorsements([expired.certificate_der, root.asvk_der, root.ark_der])
    claims = verify_report(Trail(), machine.report(DATA, 0), given, trusting(root))
    assert claims.valid_until < NOW
    floor = TcbFloor(boot_loader=0, tee=0, snp=0, microcode=0)
    policy = Policy(
        boot_way="grub",
        tcb_floors={"Milan": floor},
        signers=["vlek"],
        csp_ids=[machine.csp_id],
        revocation="if-present",
    )
    trail = Trail()
    appraise_endorsement(trail, claims, policy, NOW)
    assert [check.id for check in trail.failed] == ["endorsement.valid"]


# Real reports


def _amd(vectors: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(vectors.glob("amd-ca/*/*.der"))]


def test_every_real_report_is_authentic(vectors: Path) -> None:
    """Milan, Genoa, Bergamo or Siena, and Turin; VCEK and VLEK; each certificate that was collected for it."""
    signers, products = set(), set()
    for report in sorted(vectors.glob("snp/*/report.bin")):
        for vek in sorted(report.parent.glob("v?ek*.der")):
            given = Endorsements([vek.read_bytes(), *_amd(vectors)])
            claims = verify_report(Trail(), report.read_bytes(), given, TrustedRoots())
            assert claims.root in AMD_ROOTS
            signers.add(claims.signer)
            products.add(claims.product)
    assert (signers, products) == ({"vcek", "vlek"}, {"Milan", "Genoa", "Turin"})


def test_every_real_report_finds_its_own_certificate_among_all(vectors: Path) -> None:
    """With every VCEK and VLEK offered at once."""
    given = Endorsements(
        [*(path.read_bytes() for path in sorted(vectors.glob("snp/*/v?ek*.der"))), *_amd(vectors)]
    )
    for report in sorted(vectors.glob("snp/*/report.bin")):
        verify_report(Trail(), report.read_bytes(), given, TrustedRoots())


@pytest.mark.parametrize("case", ["trustee-evidence-v2", "trustee-evidence-genoa"])
def test_real_azure_reports_are_authentic(vectors: Path, case: str) -> None:
    """The report inside a paravisor's blob is one like any other."""
    directory = vectors / "azure" / case
    given = Endorsements([(directory / "vcek.der").read_bytes(), *_amd(vectors)])
    raw = (directory / "snp_report.bin").read_bytes()
    assert verify_report(Trail(), raw, given, TrustedRoots()).signer == "vcek"
    assert (directory / "hcl_report.bin").read_bytes()[0x20:][:REPORT_SIZE] == raw


def test_a_real_hosts_table_endorses_its_report(vectors: Path) -> None:
    """What configfs-tsm gave on a real Genoa machine, and nothing else."""
    table = (vectors / "certtable" / "veraison-genoa-auxblob.bin").read_bytes()
    given = Endorsements([entry.der() for entry in certificate_table.parse(table)])
    raw = (vectors / "certtable" / "veraison-genoa-outblob.bin").read_bytes()
    assert verify_report(Trail(), raw, given, TrustedRoots()).product == "Genoa"


def test_every_report_that_is_known_bad_is_refused(vectors: Path) -> None:
    """With all genuine certificates at hand."""
    given = Endorsements(
        [*(path.read_bytes() for path in sorted(vectors.glob("snp/*/v?ek*.der"))), *_amd(vectors)]
    )
    bad = sorted(vectors.glob("snp-negative/*.bin"))
    assert bad
    for path in bad:
        refused("report.signature", path.read_bytes(), given, TrustedRoots())


def test_every_certificate_that_is_known_bad_is_refused(vectors: Path) -> None:
    """A VCEK that no AMD key signed endorses no report."""
    raw = (vectors / "snp" / "milan-v2-vcek-bdb449fd" / "report.bin").read_bytes()
    bad = sorted(vectors.glob("snp-negative/*.der"))
    assert bad
    for path in bad:
        refused("endorsement.chain", raw, Endorsements([path.read_bytes(), *_amd(vectors)]), TrustedRoots())


@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_real_report_or_certificate_is_refused(vectors: Path, data: st.DataObject) -> None:
    """One bit of a real report or of the VEK that endorses it."""
    directory = data.draw(st.sampled_from(sorted(vectors.glob("snp/*"))))
    report = bytearray((directory / "report.bin").read_bytes())
    vek = bytearray(next(iter(sorted(directory.glob("v?ek.der")))).read_bytes())
    changed = data.draw(st.sampled_from([report, vek]))
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    given = Endorsements([bytes(vek), *_amd(vectors)])
    with pytest.raises(KagimoriError):
        verify_report(Trail(), bytes(report), given, TrustedRoots())
