"""Is the vTPM's part of the evidence authentic?

PROTOCOL.md section 6, steps 5 to 7. AMD's signature covers REPORT_DATA, REPORT_DATA covers the SVSM's
manifest, the manifest is the EK. The AK hangs on the EK only by the credential that the answer carries: until
a Confirm verifies, it is unproven.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC, TPMA_OBJECT

from kagimori_protocol import tpm, transcript
from kagimori_verifier.claims import VtpmClaims
from kagimori_verifier.verify import signing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tpm2_pytss.types import TPMT_PUBLIC, TPMT_SIGNATURE

    from kagimori_protocol.messages import PcrValue, Quote
    from kagimori_protocol.snp import Report
    from kagimori_verifier.trail import Trail

ALGORITHMS: Final = signing.Algorithms(
    rsa_bits=frozenset({2048}),
    curves={int(TPM2_ECC.NIST_P256): ec.SECP256R1()},
    hashes={int(TPM2_ALG.SHA256): hashes.SHA256()},
)
"""What version 1 of the protocol lets an AK sign with."""

SHA256: Final = "sha256"
_AK_ATTRIBUTES: Final = {
    "restricted": TPMA_OBJECT.RESTRICTED,
    "sign": TPMA_OBJECT.SIGN_ENCRYPT,
    "fixedTPM": TPMA_OBJECT.FIXEDTPM,
    "fixedParent": TPMA_OBJECT.FIXEDPARENT,
    "sensitiveDataOrigin": TPMA_OBJECT.SENSITIVEDATAORIGIN,
}
"""The attributes of tpm.AK_REQUIRED, by the names of TPM 2.0 part 2, section 8.3."""


def verify_manifest(trail: Trail, report: Report, t0: bytes, manifest: bytes, hello_ek: bytes) -> bytes:
    """Return the EK of the manifest, if the SVSM signed this manifest for this exchange. Raises NotAuthentic.

    Version 0 of the vTPM's manifest is exactly one TPMT_PUBLIC of template L-1 (AMD 58019, section 8.3).
    """
    expected = transcript.svsm_report_data(transcript.svsm_nonce(t0), manifest)
    trail.require(
        "report.tie",
        report.report_data == expected,
        expected=f"REPORT_DATA {expected.hex()} (this exchange's nonce and the manifest)",
        found=report.report_data.hex(),
    )
    with trail.step("manifest.ek", "one EK of the TCG's template L-1 and nothing after it"):
        ek = tpm.require_ek_l1(manifest)
    trail.require(
        "manifest.hello",
        ek == hello_ek,
        expected=f"the EK of Hello: SHA-256 {hashlib.sha256(hello_ek).hexdigest()}",
        found=f"SHA-256 {hashlib.sha256(ek).hexdigest()}",
    )
    return ek


def verify_direct(trail: Trail, report: Report, t0: bytes) -> None:
    """Check the tie of kind ``snp-direct``, where REPORT_DATA is all there is. Raises NotAuthentic."""
    expected = transcript.direct_report_data(t0)
    trail.require(
        "report.tie",
        report.report_data == expected,
        expected=f"REPORT_DATA {expected.hex()} (this exchange)",
        found=report.report_data.hex(),
    )


def verify_ak(trail: Trail, ak_public: bytes) -> bytes:
    """Return the AK's Name, computed here, if its attributes make a quote believable. Raises NotAuthentic."""
    with trail.step("ak.layout", "a TPMT_PUBLIC with a SHA-256 name"):
        public = tpm.parse_public(ak_public)
        name = tpm.object_name(ak_public)
    require_ak_attributes(trail, public)
    trail.require(
        "ak.scheme",
        signing.is_signing_key(public, ALGORITHMS),
        expected="RSA 2048 with RSASSA or RSAPSS and SHA-256, or ECC P-256 with ECDSA and SHA-256",
        found=f"{public.type} with scheme {public.parameters.asymDetail.scheme.scheme}",
    )
    return name


def require_ak_attributes(trail: Trail, public: TPMT_PUBLIC) -> None:
    """Require that a TPM made this key, keeps it, and signs with it only what it made. Raises NotAuthentic."""
    attributes = int(public.objectAttributes)
    wrong = [f"not {name}" for name, bit in _AK_ATTRIBUTES.items() if not attributes & int(bit)]
    if attributes & int(TPMA_OBJECT.DECRYPT):
        wrong.append("decrypt")
    trail.require(
        "ak.attributes",
        not wrong,
        expected=", ".join(_AK_ATTRIBUTES) + "; not decrypt",
        found=f"0x{attributes:08x}" + (": " + ", ".join(wrong) if wrong else ""),
    )


def verify_quote(  # noqa: PLR0913 - the seven things that a quote ties together
    trail: Trail,
    *,
    ek_public: bytes,
    ak_public: bytes,
    ak_name: bytes,
    quote: Quote,
    pcrs: Sequence[PcrValue],
    qualifying_data: bytes,
    selection: bytes,
) -> VtpmClaims:
    """Return what the quote says, if this AK signed it for this exchange over the PCRs that policy selects.

    ``selection`` is the policy's marshalled TPML_PCR_SELECTION, never the one that the guest sends. Raises
    NotAuthentic.
    """
    with trail.step("quote.layout", "a TPMS_ATTEST of type quote, made by a TPM"):
        attest = tpm.Attest.parse(quote.attest)
    require_qualifying_data(trail, attest, qualifying_data, whose="this exchange, this report, this manifest")
    trail.require(
        "quote.pcr-selection",
        attest.pcr_select == selection and selection != tpm.NO_PCRS,
        expected=f"{selection.hex()}: PCRs {_numbers(selection)} of the SHA-256 bank",
        found=attest.pcr_select.hex(),
    )
    with trail.step("quote.signature-layout", "a TPMT_SIGNATURE and nothing after it"):
        signature = tpm.parse_signature(quote.signature)
    require_quote_signature(
        trail,
        lambda: signature_holds(tpm.parse_public(ak_public), signature, quote.attest),
        expected="the quote signed by the AK of Hello, with SHA-256",
    )
    require_pcr_values(
        trail,
        attest,
        [value.digest for value in pcrs],
        SHA256,
        complete=tuple(value.index for value in pcrs) == tpm.selected_pcrs(selection),
        wanted=f"PCRs {_numbers(selection)}",
        given=f"PCRs {', '.join(str(value.index) for value in pcrs) or 'none'}",
    )
    values = {value.index: value.digest for value in pcrs}
    return VtpmClaims(ek_public=ek_public, ak_name=ak_name, attest=attest, pcrs=values)


def require_qualifying_data(trail: Trail, attest: tpm.Attest, qualifying_data: bytes, *, whose: str) -> None:
    """Require that a quote was made for this challenge. Raises NotAuthentic."""
    trail.require(
        "quote.qualifying-data",
        attest.extra_data == qualifying_data,
        expected=f"{qualifying_data.hex()} ({whose})",
        found=attest.extra_data.hex() or "nothing",
    )


def require_quote_signature(trail: Trail, verify: Callable[[], None], *, expected: str) -> None:
    """Require that ``verify`` raises neither InvalidSignature nor ValueError. Raises NotAuthentic."""
    try:
        verify()
        holds = True
    except (InvalidSignature, ValueError):
        holds = False
    trail.require(
        "quote.signature",
        holds,
        expected=expected,
        found="a signature that verifies" if holds else "a signature that does not verify",
    )


def require_pcr_values(  # noqa: PLR0913 - the values, how they are hashed, and how to tell of them
    trail: Trail,
    attest: tpm.Attest,
    digests: Sequence[bytes],
    algorithm: str,
    *,
    complete: bool,
    wanted: str,
    given: str,
) -> None:
    """Require the values of all selected PCRs, in order, and that they hash to the quote's pcrDigest.

    ``algorithm`` is the hash of the quote's signature (TPM 2.0 part 3, section 18.4), whatever bank the values are
    of. Raises NotAuthentic.
    """
    digest = hashlib.new(algorithm, b"".join(digests), usedforsecurity=True).digest()
    trail.require(
        "quote.pcr-values",
        complete and digest == attest.pcr_digest,
        expected=f"values of {wanted} that hash to {attest.pcr_digest.hex()}",
        found=f"{given} that hash to {digest.hex()}",
    )


def signature_holds(public: TPMT_PUBLIC, signature: TPMT_SIGNATURE, message: bytes) -> None:
    """Check a TPM's signature over ``message`` with SHA-256; raises InvalidSignature or ValueError if it fails."""
    key = signing.public_key(public, ALGORITHMS)
    signing.require_signature(key, signing.from_tpmt(signature), message, ALGORITHMS)


def _numbers(selection: bytes) -> str:
    return ", ".join(map(str, tpm.selected_pcrs(selection))) or "none"
