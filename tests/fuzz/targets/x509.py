"""Certificates and revocation lists in DER, with AMD's extensions. The first byte chooses what an input is read as."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress

from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import parts, tlv
from tests.fuzz.target import Target
from tests.fuzz.targets.report import KINDS, chip

from kagimori_protocol.errors import Malformed, NotAuthentic, PeerError
from kagimori_verifier.endorsements import directory
from kagimori_verifier.verify import der
from kagimori_verifier.verify.certificate import MAX_CERTIFICATE, Certificate, RevocationList

CERTIFICATE, REVOCATION_LIST, INTEGER, TEXT, IMPORT = range(5)


@functools.cache
def authorities() -> tuple[Certificate, ...]:
    """Give the CAs that may have signed an input."""
    roots = [workshop.amd_root(product) for product in ("Milan", "Turin")]
    ders = [der for root in roots for der in (root.ark_der, root.ask_der, root.asvk_der)]
    return tuple(Certificate.parse(der) for der in ders)


def run(data: bytes) -> None:
    """Read an input as what its first byte says."""
    choice, raw = workshop.head(data)
    match choice % 5:
        case 0:
            check_certificate(Certificate.parse(raw))
        case 1:
            check_revocation_list(raw)
        case 2:
            value = der.small_integer(raw)
            assert 0 <= value < 1 << 32
        case 3:
            text = der.ia5_string(raw)
            assert text.encode() == raw[-len(text) :] if text else raw[-1:] == b"\0"
            assert text.isprintable()
        case _:
            name, line = directory._place(raw)
            # The name becomes a path: nothing of the sender's may lead elsewhere.
            assert name.split("/")[0] in {"ca", "crl", "vcek", "vlek"}
            assert set(name.replace("/", "")) <= set("0123456789abcdefcarlvek-.d")
            assert ".." not in name
            assert line


def check_certificate(certificate: Certificate) -> None:
    """Everything that is asked of a certificate has an answer or is refused, and what was signed is what is there."""
    raw = certificate.raw
    assert certificate.tbs in raw
    assert raw.endswith(certificate.signature)
    assert der.split_certificate(raw) == (certificate.tbs, certificate.signature)
    assert len(certificate.spki_sha256) == 32
    assert isinstance(certificate.common_name, str)
    assert certificate.valid_from.tzinfo is not None
    assert certificate.valid_until.tzinfo is not None
    assert certificate.fields.subject.rfc4514_string() is not None
    assert certificate.fields.issuer.rfc4514_string() is not None
    asked = (
        certificate.product_line,
        certificate.hwid,
        certificate.csp_id,
        certificate.tcb,
        certificate.require_ca,
        certificate.vek_key,
    )
    for ask in asked:
        with suppress(PeerError):
            ask()
    for authority in authorities():
        with suppress(NotAuthentic):
            certificate.require_signed_by(authority)
        with suppress(NotAuthentic):
            authority.require_signed_by(certificate)


def check_revocation_list(raw: bytes) -> None:
    """A list that an ARK signed can be asked; any other is none."""
    parsed = RevocationList.parse(raw)
    found = []
    for ark in authorities():
        with suppress(NotAuthentic):
            found.append(parsed.require_signed_by(ark))
    if not found:
        raise Malformed("no revocation list of anyone here")
    for one in found:
        assert one.last_update.tzinfo is not None
        assert one.next_update is None or one.next_update.tzinfo is not None
        for serial in (0, 1, 0x10000, 1 << 150):
            assert one.revokes(serial) in {True, False}


def seeds() -> Iterator[bytes]:
    """Give every kind of certificate as a certificate and for import, revocation lists, and bare values."""
    ders = [authority.raw for authority in authorities()]
    ders += [chip(*kind).endorsements.certificates[0] for kind in KINDS]
    ders += [*workshop.recorded("amd-ca/*/*.der", "snp/*/*.der")]
    for one in ders:
        yield bytes([CERTIFICATE]) + one
        yield bytes([IMPORT]) + one
    for product in ("Milan", "Turin"):
        for revoked in ([], [0x10000, 1, 0x101]):
            crl = workshop.amd_root(product).crl(revoked)
            yield bytes([REVOCATION_LIST]) + crl
            yield bytes([IMPORT]) + crl
    for value in ("020100", "02020100", "02047fffffff"):
        yield bytes([INTEGER]) + bytes.fromhex(value)
    yield bytes([TEXT]) + b"\x16\x08Milan-B0"
    yield bytes([TEXT]) + b"\x16\x00"


def worst() -> Iterator[tuple[str, bytes]]:
    """Give certificates with as many extensions, names and revoked numbers as fit, and DER that nests."""
    vcek = chip("Milan", "vcek").endorsements.certificates[0]
    yield "as many extensions as fit", bytes([CERTIFICATE]) + tlv.with_extensions(vcek, MAX_CERTIFICATE)
    yield "as many names as fit", bytes([CERTIFICATE]) + tlv.with_names(vcek, MAX_CERTIFICATE)
    nested = tlv.nested(MAX_CERTIFICATE)
    for choice in (CERTIFICATE, REVOCATION_LIST, IMPORT):
        yield f"sequences in sequences, as {choice}", bytes([choice]) + nested
    crl = workshop.amd_root("Milan").crl(range(1, 350))
    yield "a list of many", bytes([REVOCATION_LIST]) + crl
    yield "a list of many, for import", bytes([IMPORT]) + crl


TARGET = Target(
    name="x509",
    about="certificates and revocation lists in DER, and AMD's extensions",
    bound=BOUNDS["x509"],
    refusals=(Malformed, NotAuthentic),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=parts.behind_choice(tlv.mutate),
    covers=("kagimori_verifier.verify.certificate", "kagimori_verifier.verify.der"),
)
