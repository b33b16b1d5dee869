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
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC, TPMA_OBJECT

from kagimori_protocol import tpm, transcript
from kagimori_verifier.claims import VtpmClaims

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tpm2_pytss.types import TPMT_PUBLIC, TPMT_SIGNATURE

    from kagimori_protocol.messages import PcrValue, Quote
    from kagimori_protocol.snp import Report
    from kagimori_verifier.trail import Trail

_RSA_BITS: Final = 2048
_RSA_EXPONENT: Final = 65537
_P256_SIZE: Final = 32
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
    trail.require(
        "ak.scheme",
        _is_known_key(public),
        expected="RSA 2048 with RSASSA or RSAPSS and SHA-256, or ECC P-256 with ECDSA and SHA-256",
        found=f"{public.type} with scheme {public.parameters.asymDetail.scheme.scheme}",
    )
    return name


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
    trail.require(
        "quote.qualifying-data",
        attest.extra_data == qualifying_data,
        expected=f"{qualifying_data.hex()} (this exchange, this report, this manifest)",
        found=attest.extra_data.hex() or "nothing",
    )
    trail.require(
        "quote.pcr-selection",
        attest.pcr_select == selection and selection != tpm.NO_PCRS,
        expected=f"{selection.hex()}: PCRs {_numbers(selection)} of the SHA-256 bank",
        found=attest.pcr_select.hex(),
    )
    _require_quote_signature(trail, ak_public, quote)
    values = _require_pcr_values(trail, attest, pcrs, selection)
    return VtpmClaims(ek_public=ek_public, ak_name=ak_name, attest=attest, pcrs=values)


def signature_holds(public: TPMT_PUBLIC, signature: TPMT_SIGNATURE, message: bytes) -> None:
    """Check a TPM's signature over ``message`` with SHA-256; raises InvalidSignature or ValueError if it fails."""
    scheme = signature.sigAlg
    key = _key(public)
    if isinstance(key, rsa.RSAPublicKey) and scheme in (TPM2_ALG.RSASSA, TPM2_ALG.RSAPSS):
        detail = signature.signature.rsassa if scheme == TPM2_ALG.RSASSA else signature.signature.rsapss
        pad: padding.AsymmetricPadding = padding.PKCS1v15()
        if scheme == TPM2_ALG.RSAPSS:
            pad = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
        _require_sha256(detail.hash)
        key.verify(bytes(detail.sig), message, pad, hashes.SHA256())
        return
    if isinstance(key, ec.EllipticCurvePublicKey) and scheme == TPM2_ALG.ECDSA:
        detail = signature.signature.ecdsa
        _require_sha256(detail.hash)
        r, s = (int.from_bytes(bytes(part), "big") for part in (detail.signatureR, detail.signatureS))
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        return
    raise InvalidSignature


def _is_known_key(public: TPMT_PUBLIC) -> bool:
    try:
        _key(public)
    except (ValueError, InvalidSignature):
        return False
    asym = public.parameters.asymDetail
    schemes = {
        TPM2_ALG.RSA: (TPM2_ALG.RSASSA, TPM2_ALG.RSAPSS),
        TPM2_ALG.ECC: (TPM2_ALG.ECDSA,),
    }[public.type]
    return asym.scheme.scheme in schemes and asym.scheme.details.anySig.hashAlg == TPM2_ALG.SHA256


def _key(public: TPMT_PUBLIC) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """Give the public key of an RSA 2048 or ECC P-256 object. Raises ValueError for what cannot be one."""
    if public.type == TPM2_ALG.RSA:
        detail = public.parameters.rsaDetail
        if detail.keyBits != _RSA_BITS or detail.exponent not in (0, _RSA_EXPONENT):
            raise ValueError(detail.keyBits)
        modulus = int.from_bytes(bytes(public.unique.rsa), "big")
        if modulus.bit_length() != _RSA_BITS:
            raise ValueError(modulus.bit_length())
        return rsa.RSAPublicNumbers(_RSA_EXPONENT, modulus).public_key()
    if public.type == TPM2_ALG.ECC and public.parameters.eccDetail.curveID == TPM2_ECC.NIST_P256:
        x, y = (bytes(part) for part in (public.unique.ecc.x, public.unique.ecc.y))
        if max(len(x), len(y)) > _P256_SIZE:
            raise ValueError(len(x))
        numbers = ec.EllipticCurvePublicNumbers(
            int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()
        )
        return numbers.public_key()
    raise ValueError(public.type)


def _require_sha256(algorithm: int) -> None:
    if algorithm != TPM2_ALG.SHA256:
        raise InvalidSignature


def _require_quote_signature(trail: Trail, ak_public: bytes, quote: Quote) -> None:
    with trail.step("quote.signature-layout", "a TPMT_SIGNATURE and nothing after it"):
        signature = tpm.parse_signature(quote.signature)
    try:
        signature_holds(tpm.parse_public(ak_public), signature, quote.attest)
        holds = True
    except (InvalidSignature, ValueError):
        holds = False
    trail.require(
        "quote.signature",
        holds,
        expected="the quote signed by the AK of Hello, with SHA-256",
        found="a signature that verifies" if holds else "a signature that does not verify",
    )


def _require_pcr_values(
    trail: Trail, attest: tpm.Attest, pcrs: Sequence[PcrValue], selection: bytes
) -> Mapping[int, bytes]:
    """Return the values sent, if they are those of the selection, in order, and hash to the quote's pcrDigest."""
    indices = tuple(value.index for value in pcrs)
    digest = hashlib.sha256(b"".join(value.digest for value in pcrs)).digest()
    trail.require(
        "quote.pcr-values",
        indices == tpm.selected_pcrs(selection) and digest == attest.pcr_digest,
        expected=f"values of PCRs {_numbers(selection)} that hash to {attest.pcr_digest.hex()}",
        found=f"PCRs {', '.join(map(str, indices)) or 'none'} that hash to {digest.hex()}",
    )
    return {value.index: value.digest for value in pcrs}


def _numbers(selection: bytes) -> str:
    return ", ".join(map(str, tpm.selected_pcrs(selection))) or "none"
