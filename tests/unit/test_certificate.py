"""AMD's certificates are read as they are, chain only by AMD's rules, and the serial number 0 stops nothing."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol.errors import KagimoriError, Malformed, NotAuthentic
from kagimori_protocol.snp import TcbVersion
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.roots import AMD_ROOTS, PRODUCTS, TrustedRoots
from kagimori_verifier.verify import der
from kagimori_verifier.verify.certificate import MAX_CERTIFICATE, Certificate

CHIP = bytes(range(1, 65))
MILAN_TCB = TcbVersion(fmc=None, boot_loader=4, tee=0, snp=24, microcode=219)
TURIN_TCB = TcbVersion(fmc=1, boot_loader=2, tee=3, snp=4, microcode=200)


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture(scope="module")
def vcek(root: AmdRoot) -> Certificate:
    """Give a VCEK of the simulated root."""
    return Certificate.parse(root.vcek(CHIP, MILAN_TCB.pack()).certificate_der)


# Reading


def test_a_vcek_says_chip_product_and_tcb(vcek: Certificate) -> None:
    """AMD's extensions, with the stepping cut off the product."""
    assert vcek.common_name == "SEV-VCEK"
    assert (vcek.hwid(), vcek.csp_id(), vcek.product_line()) == (CHIP, None, "Milan")
    assert vcek.tcb() == MILAN_TCB
    assert bytes.fromhex("a003020102020100") in vcek.tbs  # version 3, serial number 0


def test_a_vlek_says_provider_and_no_chip(root: AmdRoot) -> None:
    """It belongs to a cloud, not to a chip."""
    vlek = Certificate.parse(root.vlek(MILAN_TCB.pack(), "CN=a-cloud").certificate_der)
    assert (vlek.common_name, vlek.hwid(), vlek.csp_id()) == ("SEV-VLEK", None, "CN=a-cloud")


def test_a_turin_vcek_has_fmc_and_a_short_chip_id(cache: Path) -> None:
    """Struct version 1: FMC, eight bytes of HWID."""
    turin = AmdRoot.cached(cache / "amd", "Turin")
    vcek = Certificate.parse(turin.vcek(CHIP[:8] + bytes(56), TURIN_TCB.pack()).certificate_der)
    assert (vcek.hwid(), vcek.tcb(), vcek.product_line()) == (CHIP[:8], TURIN_TCB, "Turin")


def test_what_was_signed_is_kept_as_it_was(vcek: Certificate, root: AmdRoot) -> None:
    """The signed bytes are cut out of the certificate, not written anew."""
    assert vcek.tbs in vcek.raw
    assert vcek.raw.endswith(vcek.signature)
    key = Certificate.parse(root.ask_der).require_ca()
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    key.verify(vcek.signature, vcek.tbs, pss, hashes.SHA384())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw[:0], id="nothing"),
        pytest.param(lambda raw: raw[:-1], id="a byte missing"),
        pytest.param(lambda raw: raw + b"\x00", id="a byte behind"),
        pytest.param(lambda raw: raw + raw, id="two of them"),
        pytest.param(lambda raw: raw[4:], id="its inside"),
        pytest.param(lambda raw: raw + bytes(MAX_CERTIFICATE), id="too large"),
        pytest.param(
            lambda raw: raw.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x0c", 1), id="version 13"
        ),
        pytest.param(lambda raw: b"\x30\x80" + raw[4:] + b"\x00\x00", id="an indefinite length"),
    ],
)
def test_what_is_not_one_certificate_is_malformed(root: AmdRoot, change: object) -> None:
    """Named, and never a stray exception of the library (an X.509 version that there is not has one of its own)."""
    with pytest.raises(Malformed) as caught:
        Certificate.parse(change(root.ask_der))  # type: ignore[operator]  # a function of the table
    assert caught.value.code in {"certificate.layout", "certificate.der"}


def test_a_name_that_the_library_cannot_hold_is_malformed(root: AmdRoot) -> None:
    """A BIT STRING as somebody's country is a TypeError inside; here it is no certificate."""
    country = bytes.fromhex("0603550406") + b"\x13\x02US"
    assert country in root.ask_der
    with pytest.raises(Malformed):
        Certificate.parse(root.ask_der.replace(country, country.replace(b"\x13\x02US", b"\x03\x02\x00S")))


def test_amds_extensions_are_missing_where_they_are(root: AmdRoot) -> None:
    """A CA has no chip, and asking it for a TCB is an error with a name."""
    ask = Certificate.parse(root.ask_der)
    assert (ask.hwid(), ask.csp_id()) == (None, None)
    for ask_for in (ask.tcb, ask.product_line):
        with pytest.raises(Malformed) as caught:
            ask_for()
        assert caught.value.code == "certificate.layout"


# Chaining


def test_the_simulated_chains_hold(root: AmdRoot, vcek: Certificate) -> None:
    """ARK over itself, ASK and ASVK; ASK over VCEKs."""
    ark, ask, asvk = (Certificate.parse(raw) for raw in (root.ark_der, root.ask_der, root.asvk_der))
    for certificate, issuer in ((ark, ark), (ask, ark), (asvk, ark), (vcek, ask)):
        assert certificate.require_signed_by(issuer) is certificate


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_amds_own_chains_hold_and_the_pins_are_their_keys(vectors: Path, product: str) -> None:
    """The pins are the SHA-256 of the public keys in AMD's certificates, and AMD's certificates chain."""
    ark, ask, asvk = (
        Certificate.parse((vectors / "amd-ca" / product / f"{name}.der").read_bytes())
        for name in ("ark", "ask", "asvk")
    )
    for certificate in (ark, ask, asvk):
        certificate.require_signed_by(ark)
    pinned = TrustedRoots().get(ark.spki_sha256)
    assert pinned in AMD_ROOTS
    assert pinned is not None
    assert (pinned.product.lower(), pinned.label) == (product, None)
    assert TrustedRoots().get(ask.spki_sha256) is None


def test_the_fingerprints_that_were_collected_are_those_of_the_certificates(vectors: Path) -> None:
    """Each certificate's SHA-256 stands in the list that was cross-checked."""
    listed = (vectors / "amd-ca" / "FINGERPRINTS.md").read_text()
    pins = {root.spki_sha256.hex() for root in AMD_ROOTS}
    assert len(pins) == len(PRODUCTS) == 3
    assert pins <= set(re.findall(r"[0-9a-f]{64}", listed))


def refused(certificate: Certificate, issuer: Certificate) -> NotAuthentic:
    """Give the error with which a link is refused."""
    with pytest.raises(NotAuthentic) as caught:
        certificate.require_signed_by(issuer)
    assert caught.value.code == "certificate.chain"
    return caught.value


def test_a_vcek_signed_by_another_root_of_the_same_names_is_refused(cache: Path, vcek: Certificate) -> None:
    """Names are anybody's; the key decides."""
    genoa = AmdRoot.cached(cache / "amd", "Genoa")
    refused(vcek, Certificate.parse(genoa.ask_der))
    names = Certificate.parse(genoa.ask_der).fields.subject
    assert names != vcek.fields.issuer


def test_a_real_vcek_is_not_signed_by_a_simulated_ask(vectors: Path, root: AmdRoot) -> None:
    """The simulated CA has AMD's very names, and still signs nothing of AMD's."""
    real = Certificate.parse((vectors / "snp" / "milan-v3-vcek-14fd2b6e" / "vcek.der").read_bytes())
    ask = Certificate.parse(root.ask_der)
    assert real.fields.issuer == ask.fields.subject
    assert refused(real, ask).found == "one that does not verify"


def test_a_vek_signs_no_certificates(vcek: Certificate) -> None:
    """Nor does anything that is no CA of AMD's form."""
    refused(vcek, vcek)


def _made(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
    pss: padding.PSS | None = None,
    algorithm: hashes.SHA256 | hashes.SHA384 | None = None,
) -> Certificate:
    """Make a certificate that signs itself."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ARK-Milan")])
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(7)
    builder = builder.public_key(key.public_key()).not_valid_before(start)
    builder = builder.not_valid_after(start + dt.timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    made = builder.sign(key, algorithm or hashes.SHA384(), rsa_padding=pss)
    return Certificate.parse(made.public_bytes(serialization.Encoding.DER))


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


CA = x509.BasicConstraints(ca=True, path_length=None)
NO_CA = x509.BasicConstraints(ca=False, path_length=None)
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


def test_a_ca_has_amds_form_and_signs_in_amds_way(root: AmdRoot) -> None:
    """Key size, CA bit, key usage, padding, hash and salt are fixed: whatever else verifies is refused."""
    key = root.ark.key
    assert _made(key, CA, _usage(sign=True), pss=PSS).require_ca().key_size == 4096
    other_ways = {
        "no extensions": _made(key, pss=PSS),
        "no key usage": _made(key, CA, pss=PSS),
        "no CA": _made(key, NO_CA, _usage(sign=True), pss=PSS),
        "may not sign": _made(key, CA, _usage(sign=False), pss=PSS),
        "EC": _made(ec.generate_private_key(ec.SECP384R1()), CA, _usage(sign=True)),
        "RSA 2048": _made(rsa.generate_private_key(65537, 2048), CA, _usage(sign=True), pss=PSS),
        "PKCS 1 v1.5": _made(key, CA, _usage(sign=True)),
        "SHA-256": _made(
            key,
            CA,
            _usage(sign=True),
            pss=padding.PSS(padding.MGF1(hashes.SHA256()), 32),
            algorithm=hashes.SHA256(),
        ),
        "a short salt": _made(key, CA, _usage(sign=True), pss=padding.PSS(padding.MGF1(hashes.SHA384()), 32)),
    }
    for way, certificate in other_ways.items():
        assert refused(certificate, certificate).expected, way


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_a_vek_has_a_key_on_p_384(curve: ec.EllipticCurve, root: AmdRoot, vcek: Certificate) -> None:
    """Another curve or RSA cannot have signed a report."""
    assert vcek.vek_key().key_size == 384
    for other in (_made(ec.generate_private_key(curve)), Certificate.parse(root.ask_der)):
        with pytest.raises(NotAuthentic):
            other.vek_key()


# Serial number 0


@pytest.fixture
def strict_library(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `cryptography` refuse the serial number 0, as it announces; counts the refusals."""
    load, refusals = x509.load_der_x509_certificate, [0]

    def strict(data: bytes) -> x509.Certificate:
        loaded = load(data)
        if loaded.serial_number == 0:
            refusals[0] += 1
            message = "serial number must be positive"
            raise ValueError(message)
        return loaded

    monkeypatch.setattr(x509, "load_der_x509_certificate", strict)
    return refusals


def test_the_serial_number_0_may_be_refused_by_the_library(strict_library: list[int], root: AmdRoot) -> None:
    """The fields come from a renumbered copy; what is verified stays the certificate as it is."""
    raw = root.vcek(CHIP, MILAN_TCB.pack()).certificate_der
    vcek = Certificate.parse(raw)
    assert strict_library == [1]
    assert (vcek.raw, vcek.fields.serial_number) == (raw, 1)
    assert (vcek.tcb(), vcek.hwid()) == (MILAN_TCB, CHIP)
    vcek.require_signed_by(Certificate.parse(root.ask_der))


def test_real_certificates_verify_without_the_librarys_leave(
    strict_library: list[int], vectors: Path
) -> None:
    """All real VCEKs and the VLEK, through the fallback."""
    paths = sorted(vectors.glob("snp/*/v?ek*.der"))
    issuers = [Certificate.parse(path.read_bytes()) for path in sorted(vectors.glob("amd-ca/*/as*.der"))]
    for path in paths:
        vek = Certificate.parse(path.read_bytes())
        (issuer,) = (ca for ca in issuers if ca.fields.subject == vek.fields.issuer)
        vek.require_signed_by(issuer)
    assert strict_library[0] == len(paths) > 10


def test_the_fallback_forgives_the_serial_number_only(strict_library: list[int], vcek: Certificate) -> None:
    """A certificate that is broken elsewhere stays broken."""
    broken = vcek.raw.replace(b"\xa0\x03\x02\x01\x02\x02\x01\x00", b"\xa0\x03\x02\x01\x0c\x02\x01\x00", 1)
    assert broken != vcek.raw
    with pytest.raises(Malformed):
        Certificate.parse(broken)


def test_only_the_number_0_is_renumbered(root: AmdRoot, vcek: Certificate) -> None:
    """In one byte; any other number is left alone."""
    renumbered = der.with_serial_number_one(vcek.raw)
    assert renumbered is not None
    assert sum(one != other for one, other in zip(vcek.raw, renumbered, strict=True)) == 1
    assert der.with_serial_number_one(root.ask_der) is None


# DER


@pytest.mark.parametrize(
    ("value", "number"),
    [("020100", 0), ("02017f", 127), ("020200db", 219), ("02047fffffff", 0x7FFFFFFF)],
)
def test_a_small_integer_is_read(value: str, number: int) -> None:
    """Above 127 it has a zero in front."""
    assert der.small_integer(bytes.fromhex(value)) == number


@pytest.mark.parametrize(
    "value", ["", "02", "0200", "0201", "020180", "02010000", "0205000000000", "03020000", "0281", "028001"]
)
def test_what_is_no_small_integer_is_malformed(value: str) -> None:
    """Negative, too long, cut, of another type, or with something behind."""
    with pytest.raises(Malformed) as caught:
        der.small_integer(bytes.fromhex(value + "0" * (len(value) % 2)))
    assert caught.value.code == "certificate.der"


@pytest.mark.parametrize(
    "value", [b"", b"\x16", b"\x16\x01", b"\x0c\x01M", b"\x16\x01\x1b", b"\x16\x01M\x00"]
)
def test_what_is_no_printable_ia5string_is_malformed(value: bytes) -> None:
    """A product name may reach a terminal."""
    assert der.ia5_string(b"\x16\x05Milan") == "Milan"
    with pytest.raises(Malformed):
        der.ia5_string(value)


def test_the_algorithm_outside_of_what_is_signed_is_the_one_inside(vcek: Certificate) -> None:
    """Otherwise the host could change bytes of a certificate that no signature covers."""
    end = vcek.raw.index(vcek.tbs) + len(vcek.tbs)
    for at in range(end, len(vcek.raw) - len(vcek.signature)):
        changed = bytearray(vcek.raw)
        changed[at] ^= 1
        with pytest.raises(Malformed):
            Certificate.parse(bytes(changed))


@given(st.binary(max_size=60))
def test_no_bytes_make_the_der_reader_stumble(raw: bytes) -> None:
    """Only Malformed leaves it."""
    for read in (der.small_integer, der.ia5_string, der.split_certificate, der.with_serial_number_one):
        for attempt in (raw, b"\x30" + bytes([len(raw)]) + raw):
            try:
                read(attempt)
            except Malformed as error:
                assert error.code == "certificate.der"  # noqa: PT017 - not raised is as good


@settings(max_examples=200)
@given(data=st.data())
def test_no_certificate_makes_a_check_stumble(vectors: Path, data: st.DataObject) -> None:
    """Some bytes of a real certificate changed: whatever still parses answers every question or refuses by name."""
    names = ["amd-ca/milan/ark.der", "amd-ca/milan/ask.der", "snp/turin-v5-vcek-3f44a09b/vcek.der"]
    names.append("snp/milan-v2-vlek-affb92f9/vlek.der")
    raw = bytearray((vectors / data.draw(st.sampled_from(names))).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 2, 3, 4, 6, 0x0C, 0x13, 0x16, 0x30, 0x80, 0xFF]))
    ask = Certificate.parse((vectors / names[1]).read_bytes())
    try:
        changed = Certificate.parse(bytes(raw))
    except Malformed:
        return
    questions = (
        changed.require_ca,
        changed.vek_key,
        changed.product_line,
        changed.hwid,
        changed.csp_id,
        changed.tcb,
        lambda: changed.require_signed_by(ask),
        lambda: ask.require_signed_by(changed),
        lambda: (changed.common_name, changed.spki_sha256, changed.valid_from, changed.valid_until),
    )
    for question in questions:
        try:
            question()
        except KagimoriError as error:
            assert error.code in {"certificate.chain", "certificate.layout", "certificate.der"}  # noqa: PT017 - as good
