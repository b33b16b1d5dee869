"""A quote counts if this AK signed it, for this exchange, over the PCRs that policy selects.

Every check refuses by its name. What only a Confirm can prove (that the AK lives in the TPM of the EK) is not proven here.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol import tpm, transcript
from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.messages import PcrValue, Quote
from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_verifier.claims import VtpmClaims
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import vtpm

RSA_KEY = rsa.generate_private_key(65537, 2048)
ECC_KEY = ec.generate_private_key(ec.SECP256R1())
EK = tpm.EK_TEMPLATE_L1[:-256] + b"\x80" + bytes(254) + b"\x01"
PERFECT = int(tpm.AK_REQUIRED) | 0x40  # userWithAuth, as every real AK has it
QUALIFYING = hashlib.sha256(b"T1").digest()
SELECTION = tpm.pcr_selection([0, 15])
PCRS = [PcrValue(index=0, digest=b"\x01" * 32), PcrValue(index=15, digest=bytes(32))]
T0 = bytes(64)


def rsa_ak(
    attributes: int = PERFECT,
    scheme: str = "0014000b",
    bits: int = 2048,
    exponent: int = 0,
    modulus: bytes | None = None,
) -> bytes:
    """Write the TPMT_PUBLIC of the test's RSA key."""
    unique = modulus if modulus is not None else RSA_KEY.public_key().public_numbers().n.to_bytes(256, "big")
    head = "0001000b" + f"{attributes:08x}" + "0000" + "0010" + scheme + f"{bits:04x}{exponent:08x}"
    return bytes.fromhex(head) + len(unique).to_bytes(2, "big") + unique


def ecc_ak(scheme: str = "0018000b", curve: str = "0003", point: tuple[int, int] | None = None) -> bytes:
    """Write the TPMT_PUBLIC of the test's ECC key."""
    numbers = ECC_KEY.public_key().public_numbers()
    x, y = point or (numbers.x, numbers.y)
    head = "0023000b" + f"{PERFECT:08x}" + "0000" + "0010" + scheme + curve + "0010"
    return bytes.fromhex(head) + b"".join(b"\x00\x20" + value.to_bytes(32, "big") for value in (x, y))


def attest(
    *,
    magic: str = "ff544347",
    kind: str = "8018",
    qualifying: bytes = QUALIFYING,
    selection: bytes = SELECTION,
    digest: bytes | None = None,
) -> bytes:
    """Write a TPMS_ATTEST."""
    if digest is None:
        digest = hashlib.sha256(b"".join(value.digest for value in PCRS)).digest()
    sized = [len(part).to_bytes(2, "big") + part for part in (b"", qualifying, digest)]
    clock = bytes(8) + bytes(4) + bytes(4) + b"\x01"
    return bytes.fromhex(magic + kind) + sized[0] + sized[1] + clock + bytes(8) + selection + sized[2]


def rsassa(message: bytes, algorithm: str = "0014000b") -> bytes:
    """Sign as a TPM with RSASSA (or as ``algorithm`` says) and SHA-256."""
    pad: padding.AsymmetricPadding = padding.PKCS1v15()
    if algorithm.startswith("0016"):
        pad = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    return bytes.fromhex(algorithm + "0100") + RSA_KEY.sign(message, pad, hashes.SHA256())


def ecdsa(message: bytes) -> bytes:
    """Sign as a TPM with ECDSA and SHA-256."""
    parts = decode_dss_signature(ECC_KEY.sign(message, ec.ECDSA(hashes.SHA256())))
    return bytes.fromhex("0018000b") + b"".join(b"\x00\x20" + part.to_bytes(32, "big") for part in parts)


def verify(trail: Trail | None = None, **changes: Any) -> VtpmClaims:  # noqa: ANN401 - any of the arguments
    """Verify the honest quote, with some arguments replaced."""
    message = attest()
    arguments: dict[str, Any] = {
        "ek_public": EK,
        "ak_public": rsa_ak(),
        "ak_name": tpm.object_name(rsa_ak()),
        "quote": Quote(attest=message, signature=rsassa(message)),
        "pcrs": PCRS,
        "qualifying_data": QUALIFYING,
        "selection": SELECTION,
    }
    return vtpm.verify_quote(trail or Trail(), **(arguments | changes))


def refused(code: str, **changes: Any) -> NotAuthentic:  # noqa: ANN401 - any of the arguments
    """Give the error with which a quote is refused, of the named check; it is the last on the trail."""
    trail = Trail()
    with pytest.raises(NotAuthentic) as caught:
        verify(trail, **changes)
    assert caught.value.code == code
    assert [check.id for check in trail.failed] == [code] == [trail.checks[-1].id]
    return caught.value


def signed(message: bytes) -> Quote:
    """Sign a TPMS_ATTEST, whatever it says."""
    return Quote(attest=message, signature=rsassa(message))


# The quote


@pytest.mark.parametrize(
    ("ak", "sign"),
    [
        (rsa_ak(), rsassa),
        (rsa_ak(exponent=65537), rsassa),
        (rsa_ak(scheme="0016000b"), lambda message: rsassa(message, "0016000b")),
        (ecc_ak(), ecdsa),
    ],
    ids=["RSASSA", "RSASSA, exponent written out", "RSAPSS", "ECDSA"],
)
def test_an_honest_quote_says_what_the_pcrs_are(ak: bytes, sign: Any) -> None:  # noqa: ANN401 - a lambda
    """In each scheme that version 1 knows, and the AK with perfect attributes passes before it."""
    trail = Trail()
    name = vtpm.verify_ak(trail, ak)
    message = attest()
    claims = verify(trail, ak_public=ak, ak_name=name, quote=Quote(attest=message, signature=sign(message)))
    assert claims.pcrs == {0: b"\x01" * 32, 15: bytes(32)}
    assert (claims.ek_public, claims.ak_name) == (EK, tpm.object_name(ak))
    assert not trail.failed


def test_a_software_key_with_perfect_attributes_passes_here_and_is_unproven() -> None:
    """The key of this test lives in no TPM, and nothing here could tell.

    That is why the answer carries a credential that only a TPM with the EK and this AK opens, and why nothing is
    learned from evidence until its Confirm verifies (PROTOCOL.md section 5).
    """
    assert vtpm.verify_ak(Trail(), rsa_ak()) == tpm.object_name(rsa_ak())
    assert verify().ak_name == tpm.object_name(rsa_ak())


@pytest.mark.parametrize("other", [b"", bytes(31), QUALIFYING[:-1], QUALIFYING + b"\x00", bytes(32)])
def test_a_quote_for_another_exchange_is_refused(other: bytes) -> None:
    """T1 binds it to this exchange, report and manifest; no nonce at all is no exception (THREATS T8)."""
    refused("quote.qualifying-data", quote=signed(attest(qualifying=other)))


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(tpm.NO_PCRS, id="nothing quoted"),
        pytest.param(tpm.pcr_selection([0]), id="a PCR less"),
        pytest.param(tpm.pcr_selection([0, 1, 15]), id="a PCR more"),
        pytest.param(bytes.fromhex("00000001000403018000"), id="the same PCRs of the SHA-1 bank"),
        pytest.param(bytes.fromhex("00000001000b0401800000"), id="the same PCRs in four bytes"),
        pytest.param(bytes.fromhex("00000002000b03018000000403018000"), id="another bank too"),
    ],
)
def test_a_quote_over_other_pcrs_is_refused(selection: bytes) -> None:
    """The policy's selection counts, byte for byte, and neither the guest's nor another bank's."""
    refused("quote.pcr-selection", quote=signed(attest(selection=selection)))


def test_a_policy_that_selects_nothing_accepts_nothing() -> None:
    """Empty means no: a quote over no PCRs proves no boot."""
    nothing = attest(selection=tpm.NO_PCRS, digest=hashlib.sha256().digest())
    refused("quote.pcr-selection", quote=signed(nothing), selection=tpm.NO_PCRS, pcrs=[])


@pytest.mark.parametrize(
    "pcrs",
    [
        pytest.param([], id="none"),
        pytest.param(PCRS[:1], id="one missing"),
        pytest.param(PCRS[::-1], id="another order"),
        pytest.param([*PCRS, PCRS[0]], id="one twice"),
        pytest.param([PCRS[0], PcrValue(index=14, digest=bytes(32))], id="another number for a value"),
        pytest.param([PCRS[0], PcrValue(index=15, digest=b"\x01" * 32)], id="another value"),
    ],
)
def test_pcr_values_other_than_those_quoted_are_refused(pcrs: list[PcrValue]) -> None:
    """Numbers and order come from the selection, values from the digest."""
    refused("quote.pcr-values", pcrs=pcrs)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(attest(magic="ff544348"), id="made outside a TPM"),
        pytest.param(attest(kind="8017"), id="another attestation"),
        pytest.param(attest() + b"\x00", id="a byte behind"),
    ],
)
def test_what_is_no_quote_is_refused(message: bytes) -> None:
    """However well it is signed."""
    refused("quote.layout", quote=signed(message))


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        pytest.param(b"", "quote.signature-layout", id="nothing"),
        pytest.param(rsassa(attest()) + b"\x00", "quote.signature-layout", id="a byte behind"),
        pytest.param(rsassa(attest())[6:], "quote.signature-layout", id="bare"),
        pytest.param(bytes.fromhex("0010"), "quote.signature", id="the scheme NULL"),
        pytest.param(bytes.fromhex("0005000b") + bytes(32), "quote.signature", id="an HMAC"),
        pytest.param(ecdsa(attest()), "quote.signature", id="by an ECC key"),
        pytest.param(rsassa(b"another", "0016000b"), "quote.signature", id="RSAPSS of another message"),
        pytest.param(bytes.fromhex("0014000b0000"), "quote.signature", id="an empty signature"),
        pytest.param(b"\x00\x14\x00\x04" + rsassa(attest())[4:], "quote.signature", id="SHA-1 in name"),
    ],
)
def test_a_quote_without_the_aks_signature_is_refused(signature: bytes, code: str) -> None:
    """By whatever else stands in its place."""
    refused(code, quote=Quote(attest=attest(), signature=signature))


def test_a_quote_signed_with_sha1_is_refused() -> None:
    """A genuine signature, but over a hash for which collisions can be made."""
    message = attest()
    sha1 = b"\x00\x14\x00\x04\x01\x00" + RSA_KEY.sign(message, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303 - what must be refused
    refused("quote.signature", quote=Quote(attest=message, signature=sha1))


def test_a_quote_by_another_key_is_refused() -> None:
    """The AK of Hello must have signed, not any AK."""
    refused("quote.signature", ak_public=ecc_ak())


@settings(max_examples=60)
@given(data=st.data())
def test_every_bit_of_quote_and_signature_counts(data: st.DataObject) -> None:
    """A flipped bit anywhere is refused."""
    message = attest()
    good = Quote(attest=message, signature=rsassa(message))
    for part in ("attest", "signature"):
        raw = bytearray(getattr(good, part))
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
        parts = {"attest": good.attest, "signature": good.signature, part: bytes(raw)}
        with pytest.raises(NotAuthentic):
            verify(quote=Quote(**parts))


# The AK


@pytest.mark.parametrize(
    ("bit", "name"),
    [(16, "restricted"), (18, "sign"), (1, "fixedTPM"), (4, "fixedParent"), (5, "sensitiveDataOrigin")],
)
def test_an_ak_without_one_of_its_attributes_is_refused_by_name(bit: int, name: str) -> None:
    """Each keeps out another forgery: of quotes, by copies, or of keys that were made elsewhere."""
    assert PERFECT >> bit & 1
    trail = Trail()
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(trail, rsa_ak(PERFECT & ~(1 << bit)))
    assert caught.value.code == "ak.attributes"
    assert caught.value.found == f"0x{PERFECT & ~(1 << bit):08x}: not {name}"


def test_an_ak_that_decrypts_is_refused() -> None:
    """It could open the credential of another EK's owner; a signing key has no use for it."""
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(Trail(), rsa_ak(PERFECT | 1 << 17))
    assert (caught.value.code, caught.value.found) == ("ak.attributes", f"0x{PERFECT | 1 << 17:08x}: decrypt")


def test_an_ak_with_none_of_them_is_told_all() -> None:
    """All reasons at once."""
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(Trail(), rsa_ak(0))
    expected = "0x00000000: not restricted, not sign, not fixedTPM, not fixedParent, not sensitiveDataOrigin"
    assert caught.value.found == expected


@pytest.mark.parametrize("bit", [0, 3, 8, 9, 12, 20, 31])
def test_reserved_attributes_make_nothing_stumble(bit: int) -> None:
    """Bits without a name do not decide, and whoever sends them gets an answer with a name all the same."""
    vtpm.verify_ak(Trail(), rsa_ak(PERFECT | 1 << bit))
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(Trail(), rsa_ak(1 << bit))
    assert caught.value.code == "ak.attributes"


def test_the_attributes_checked_are_those_that_the_protocol_names() -> None:
    """The table by name and the mask are one."""
    assert sum(int(bit) for bit in vtpm._AK_ATTRIBUTES.values()) == int(tpm.AK_REQUIRED)


@pytest.mark.parametrize(
    "ak",
    [
        pytest.param(rsa_ak(scheme="0010"), id="no scheme"),
        pytest.param(rsa_ak(scheme="00140004"), id="RSASSA with SHA-1"),
        pytest.param(rsa_ak(scheme="0016000c"), id="RSAPSS with SHA-384"),
        pytest.param(rsa_ak(scheme="0015"), id="RSAES, which encrypts"),
        pytest.param(rsa_ak(bits=1024), id="1024 bits in name"),
        pytest.param(rsa_ak(modulus=b"\x80" + bytes(127)), id="a modulus of 1024 bits"),
        pytest.param(rsa_ak(modulus=bytes(256)), id="a modulus of zero"),
        pytest.param(rsa_ak(modulus=b""), id="no modulus"),
        pytest.param(rsa_ak(exponent=3), id="exponent 3"),
        pytest.param(ecc_ak(curve="0004"), id="another curve"),
        pytest.param(ecc_ak(point=(1, 1)), id="a point off the curve"),
        pytest.param(ecc_ak(point=(0, 0)), id="no point"),
        pytest.param(ecc_ak(scheme="001a000b0000"), id="ECDAA"),
    ],
)
def test_an_ak_of_another_kind_is_refused(ak: bytes) -> None:
    """Key size, curve, scheme and hash are those that version 1 knows."""
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(Trail(), ak)
    assert caught.value.code == "ak.scheme"


@pytest.mark.parametrize("ak", [b"", rsa_ak()[:-1], rsa_ak() + b"\x00", b"\x00\x01\x00\x04" + rsa_ak()[4:]])
def test_an_ak_that_cannot_be_read_is_refused(ak: bytes) -> None:
    """Or whose name is not made with SHA-256."""
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_ak(Trail(), ak)
    assert caught.value.code == "ak.layout"


@given(data=st.data())
def test_no_ak_makes_it_stumble(data: st.DataObject) -> None:
    """A few bytes of a good AK changed: a name comes back, or a named refusal."""
    raw = bytearray(data.draw(st.sampled_from([rsa_ak(), ecc_ak()])))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 27) | st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 0xFF]) | st.integers(0, 255))
    try:
        assert vtpm.verify_ak(Trail(), bytes(raw)) == tpm.object_name(bytes(raw))
    except NotAuthentic as error:
        assert error.code.startswith("ak.")  # noqa: PT017 - not raised is as good


# The tie


def report(report_data: bytes) -> Report:
    """Give a report with this REPORT_DATA."""
    raw = bytearray(REPORT_SIZE)
    raw[0], raw[0x50:0x90] = 2, report_data
    return Report.parse(bytes(raw))


SVSM_DATA = transcript.svsm_report_data(transcript.svsm_nonce(T0), EK)


def test_a_manifest_that_the_svsm_signed_gives_its_ek() -> None:
    """REPORT_DATA is the hash over this exchange's nonce and the manifest, the manifest is Hello's EK."""
    trail = Trail()
    assert vtpm.verify_manifest(trail, report(SVSM_DATA), T0, EK, EK) == EK
    assert [check.id for check in trail.checks] == ["report.tie", "manifest.ek", "manifest.hello"]


def tied(manifest: bytes) -> Report:
    """Give the report that an SVSM with this manifest makes."""
    return report(transcript.svsm_report_data(transcript.svsm_nonce(T0), manifest))


@pytest.mark.parametrize(
    ("given_report", "manifest", "hello_ek", "code"),
    [
        pytest.param(report(bytes(64)), EK, EK, "report.tie", id="another REPORT_DATA"),
        pytest.param(report(transcript.direct_report_data(T0)), EK, EK, "report.tie", id="a direct report's"),
        pytest.param(tied(EK[:-1] + b"\x03"), EK, EK, "report.tie", id="another manifest's"),
        pytest.param(tied(EK + b"\x00"), EK + b"\x00", EK, "manifest.ek", id="a byte behind the EK"),
        pytest.param(tied(rsa_ak()), rsa_ak(), rsa_ak(), "manifest.ek", id="an AK as manifest"),
        pytest.param(tied(b""), b"", b"", "manifest.ek", id="an empty manifest"),
        pytest.param(tied(EK), EK, EK[:-1] + b"\x03", "manifest.hello", id="Hello with another EK"),
    ],
)
def test_a_manifest_without_the_tie_is_refused(
    given_report: Report, manifest: bytes, hello_ek: bytes, code: str
) -> None:
    """Each link by its name."""
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_manifest(Trail(), given_report, T0, manifest, hello_ek)
    assert caught.value.code == code


def test_the_report_of_another_exchange_is_refused_for_either_kind() -> None:
    """A recorded report answers another T0."""
    other = b"\x01" * 64
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_manifest(Trail(), report(SVSM_DATA), other, EK, EK)
    assert caught.value.code == "report.tie"
    direct = report(transcript.direct_report_data(T0))
    vtpm.verify_direct(Trail(), direct, T0)
    with pytest.raises(NotAuthentic) as caught:
        vtpm.verify_direct(Trail(), direct, other)
    assert caught.value.code == "report.tie"
    with pytest.raises(NotAuthentic):
        vtpm.verify_direct(Trail(), report(SVSM_DATA), T0)


def test_claims_cannot_be_changed() -> None:
    """Facts are frozen."""
    claims = verify()
    assert replace(claims) == claims
    with pytest.raises(AttributeError):
        claims.ak_name = b""  # type: ignore[misc]  # the point of the test
