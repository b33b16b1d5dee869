"""TPM structures: TPMT_PUBLIC, TPMT_SIGNATURE, TPML_PCR_SELECTION, TPMS_ATTEST, and whole quotes made of them.

The first byte chooses what an input is read as. A quote is signed by a key of our own where the input says so, so that
chance gets past the signature.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator
from contextlib import suppress

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import parts, sized
from tests.fuzz.target import Target
from tests.fuzz.targets.report import chip

from kagimori_protocol import tpm, transcript
from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_protocol.messages import PcrValue, Quote
from kagimori_protocol.snp import FIELDS, Report
from kagimori_verifier.examine import quote as examine
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import vtpm

PUBLIC, SIGNATURE, SELECTION, ATTEST, MANIFEST, AK, QUOTE, RSA_QUOTE, ECC_QUOTE, AK_FILE, FILES = range(11)
CHOICES = 11

QUALIFYING = hashlib.sha256(b"this exchange").digest()
WANTED = tpm.pcr_selection([0, 7, 15])
VALUES = [PcrValue(index=index, digest=bytes([index]) * 32) for index in (0, 7, 15)]
EK = tpm.EK_TEMPLATE_L1[:-256] + b"\x80" + bytes(254) + b"\x01"
T0 = bytes(64)


@functools.cache
def rsa_key() -> rsa.RSAPrivateKey:
    """Make the RSA key that signs quotes."""
    return rsa.generate_private_key(65537, 2048)


@functools.cache
def ecc_key() -> ec.EllipticCurvePrivateKey:
    """Give the ECC key that signs quotes."""
    return ec.derive_private_key(0xA11CE, ec.SECP256R1())


@functools.cache
def ak(kind: int) -> bytes:
    """Write the TPMT_PUBLIC of a key, with every attribute that an AK needs."""
    attributes = int(tpm.AK_REQUIRED) | 0x40
    if kind == RSA_QUOTE:
        head = struct.pack(">HHIHHHHHI", 1, 0xB, attributes, 0, 0x10, 0x14, 0xB, 2048, 0)
        return head + sized.field(rsa_key().public_key().public_numbers().n.to_bytes(256, "big"))
    numbers = ecc_key().public_key().public_numbers()
    head = struct.pack(">HHIHHHHHH", 0x23, 0xB, attributes, 0, 0x10, 0x18, 0xB, 3, 0x10)
    return head + b"".join(sized.field(part.to_bytes(32, "big")) for part in (numbers.x, numbers.y))


def sign(kind: int, message: bytes) -> bytes:
    """Sign as a TPM would; gives a TPMT_SIGNATURE."""
    if kind == RSA_QUOTE:
        signature = rsa_key().sign(message, padding.PKCS1v15(), hashes.SHA256())
        return struct.pack(">HH", 0x14, 0xB) + sized.field(signature)
    r, s = decode_dss_signature(ecc_key().sign(message, ec.ECDSA(hashes.SHA256())))
    return struct.pack(">HH", 0x18, 0xB) + b"".join(sized.field(part.to_bytes(32, "big")) for part in (r, s))


def attest(extra: bytes = QUALIFYING, selection: bytes = WANTED) -> bytes:
    """Write a TPMS_ATTEST of type quote over the values (TPM 2.0 part 2, section 10.12)."""
    digest = hashlib.sha256(b"".join(value.digest for value in VALUES)).digest()
    signer = sized.field(b"\x00\x0b" + bytes(32))
    clock = struct.pack(">QIIBQ", 1000, 1, 0, 1, 7)
    return b"\xffTCG\x80\x18" + signer + sized.field(extra) + clock + selection + sized.field(digest)


def run(data: bytes) -> None:
    """Read an input as what its first byte says."""
    choice, raw = workshop.head(data)
    match choice % CHOICES:
        case 0:
            assert bytes(tpm.parse_public(raw).marshal()) == raw
            with suppress(Malformed):
                assert len(tpm.object_name(raw)) == 34
        case 1:
            check_signature(raw)
        case 2:
            chosen = tpm.selected_pcrs(raw)
            assert tpm.pcr_selection(chosen) == raw
            assert all(0 <= index < tpm.PCR_COUNT for index in chosen)
        case 3:
            check_attest(raw)
        case 4:
            check_manifest(raw)
        case 5:
            assert vtpm.verify_ak(Trail(), raw)[:2] == b"\0\x0b"
        case 6:
            public, signature, quoted = workshop.cut(raw, 3)
            name = vtpm.verify_ak(Trail(), public)
            check_quote(public, name, quoted, signature)
        case 9:
            check_ak_file(raw)
        case 10:
            check_files(*workshop.cut(raw, 3))
        case kind:
            public = ak(kind)
            check_quote(public, vtpm.verify_ak(Trail(), public), raw, sign(kind, raw))


def check_signature(raw: bytes) -> None:
    """A signature of anything is one, and no key of ours made it."""
    signature = tpm.parse_signature(raw)
    assert bytes(signature.marshal()) == raw
    for kind in (RSA_QUOTE, ECC_QUOTE):
        try:
            vtpm.signature_holds(tpm.parse_public(ak(kind)), signature, b"nothing that was signed")
        except (InvalidSignature, ValueError):
            continue
        raise AssertionError("a signature over nothing holds")


def check_attest(raw: bytes) -> None:
    """What is read of a quote lies in its bytes."""
    read = tpm.Attest.parse(raw)
    for part in (read.extra_data, read.pcr_select, read.pcr_digest):
        assert part in raw
    assert read.clock_ms.to_bytes(8, "big") in raw


def check_manifest(raw: bytes) -> None:
    """Only an EK of the one template is one, even where an SVSM signed for it."""
    nonce = transcript.svsm_nonce(T0)
    own = chip("Milan", "vcek").own
    offset, size = FIELDS["report_data"]
    data = transcript.svsm_report_data(nonce, raw)
    report = Report.parse(parts.spliced(own, offset, offset + size, data))
    assert vtpm.verify_manifest(Trail(), report, T0, raw, raw) == raw
    assert raw.startswith(tpm.EK_TEMPLATE_L1[:-256])
    name = tpm.object_name(raw)
    assert len(name) == 34
    id_object, encrypted = tpm.make_credential(raw, name, bytes(32))
    assert max(len(id_object), len(encrypted)) <= 512  # what messages.Credential has room for


def check_ak_file(raw: bytes) -> None:
    """An AK in any form that people keep them in has a kind, and attributes only where the form carries them."""
    read = examine.parse_ak(raw)
    assert str(read).startswith(("RSA ", "ECC "))
    assert read.form
    assert (read.attributes is None) == (read.public is None)


def check_files(key: bytes, signature: bytes, quoted: bytes) -> None:
    """What a command says of a quote is said without an error, and holds only for what our key signed."""
    trail = Trail()
    read = examine.parse_ak(key)
    found = examine.verify(
        trail, attest=quoted, signature=signature, ak=read, qualifying_data=QUALIFYING, pcrs=None
    )
    assert all(isinstance(reason, str) for reason in examine.refusals(found, read))
    assert examine.told(found.banks)
    if trail.failed:
        raise Malformed("a quote that does not hold", code=trail.failed[0].id)
    assert found.attest.extra_data == QUALIFYING


def check_quote(public: bytes, name: bytes, quoted: bytes, signature: bytes) -> None:
    """A quote that is believed says exactly what was asked for."""
    trail = Trail()
    claims = vtpm.verify_quote(
        trail,
        ek_public=EK,
        ak_public=public,
        ak_name=name,
        quote=Quote(attest=quoted, signature=signature),
        pcrs=VALUES,
        qualifying_data=QUALIFYING,
        selection=WANTED,
    )
    assert not trail.failed
    assert claims.attest.extra_data == QUALIFYING
    assert claims.attest.pcr_select == WANTED
    assert claims.pcrs == {value.index: value.digest for value in VALUES}


def seeds() -> Iterator[bytes]:
    """Give one of each structure by each kind of key, as ours and as the TSS writes them."""
    for kind in (RSA_QUOTE, ECC_QUOTE):
        yield bytes([PUBLIC]) + ak(kind)
        yield bytes([AK]) + ak(kind)
        yield bytes([SIGNATURE]) + sign(kind, b"something")
        yield bytes([kind]) + attest()
        yield bytes([QUOTE]) + workshop.joined(ak(kind), sign(kind, attest()), attest())
        yield bytes([FILES]) + workshop.joined(ak(kind), sign(kind, attest()), attest())
        yield bytes([AK_FILE]) + ak(kind)
        yield bytes([AK_FILE]) + sized.field(ak(kind))
    for form in (Encoding.PEM, Encoding.DER):
        spki = ecc_key().public_key().public_bytes(form, PublicFormat.SubjectPublicKeyInfo)
        yield bytes([AK_FILE]) + spki
        bare = sign(ECC_QUOTE, attest())[6:]
        yield bytes([FILES]) + workshop.joined(spki, bare[:32] + bare[34:], attest())
    yield bytes([PUBLIC]) + tpm.EK_TEMPLATE_L1
    yield bytes([MANIFEST]) + EK
    yield bytes([SELECTION]) + WANTED
    yield bytes([SELECTION]) + tpm.NO_PCRS
    yield bytes([ATTEST]) + attest()
    yield bytes([ATTEST]) + attest(b"", tpm.NO_PCRS)
    for raw in workshop.recorded("*/*/*.tpmt_public"):
        yield bytes([PUBLIC]) + raw
    for raw in workshop.recorded("*/*/quote*.msg"):
        yield bytes([ATTEST]) + raw


def worst() -> Iterator[tuple[str, bytes]]:
    """Give structures as large as messages let through, and selections of as many banks as the TSS has room for."""
    banks = b"".join(struct.pack(">HB", 0xB, 4) + b"\xff" * 4 for _ in range(16))
    yield "sixteen banks", bytes([ATTEST]) + attest(b"x" * 64, struct.pack(">I", 16) + banks)
    yield "more banks than there are", bytes([SELECTION]) + b"\xff" * 64
    for choice in range(CHOICES):
        yield f"ones, as {choice}", bytes([choice]) + b"\xff" * 2048
        yield f"sizes of everything, as {choice}", bytes([choice]) + b"\x04\x00" * 1024
    yield "a whole quote by RSA", bytes([RSA_QUOTE]) + attest()
    even = ak(RSA_QUOTE)[:-1] + b"\0"
    yield "a modulus that is even", bytes([QUOTE]) + workshop.joined(even, sign(RSA_QUOTE, b""), attest())


TARGET = Target(
    name="tpm",
    about="TPM structures: public areas, signatures, selections, attestations, and quotes made of them",
    bound=BOUNDS["tpm"],
    refusals=(Malformed, NotAuthentic),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=parts.behind_choice(sized.mutate),
    covers=("kagimori_protocol.tpm", "kagimori_verifier.verify.vtpm", "kagimori_verifier.examine.quote"),
)
