"""Signatures that a TPM makes: its key and its signature, as `cryptography` checks them.

Which algorithms are good enough is the caller's to say. Source: TCG TPM 2.0 Library part 2, sections 11.2 to
12.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives import hashes
    from tpm2_pytss.types import TPMT_PUBLIC, TPMT_SIGNATURE

    Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

RSA_EXPONENT: Final = 65537
_SCHEMES: Final = {
    TPM2_ALG.RSA: (TPM2_ALG.RSASSA, TPM2_ALG.RSAPSS),
    TPM2_ALG.ECC: (TPM2_ALG.ECDSA,),
}


@dataclass(frozen=True, slots=True)
class Algorithms:
    """What a caller accepts: sizes of RSA keys in bits, and curves and hashes by their TPM ids."""

    rsa_bits: frozenset[int]
    curves: Mapping[int, ec.EllipticCurve]
    hashes: Mapping[int, hashes.HashAlgorithm]


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature: scheme and hash by their TPM ids; ``value`` is RSA's integer or ECDSA's DER."""

    scheme: int
    hash: int
    value: bytes


def public_key(public: TPMT_PUBLIC, accepted: Algorithms) -> Key:
    """Give the public key of an RSA or ECC object. Raises ValueError for what is not accepted, or cannot be one."""
    if public.type == TPM2_ALG.RSA:
        detail = public.parameters.rsaDetail
        bits = int(detail.keyBits)
        if bits not in accepted.rsa_bits or detail.exponent not in (0, RSA_EXPONENT):
            raise ValueError(bits)
        modulus = int.from_bytes(bytes(public.unique.rsa), "big")
        if modulus.bit_length() != bits:
            raise ValueError(modulus.bit_length())
        return rsa.RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()
    if public.type == TPM2_ALG.ECC:
        curve = accepted.curves.get(int(public.parameters.eccDetail.curveID))
        if curve is None:
            raise ValueError(public.parameters.eccDetail.curveID)
        x, y = (bytes(part) for part in (public.unique.ecc.x, public.unique.ecc.y))
        if max(len(x), len(y)) > (curve.key_size + 7) // 8:
            raise ValueError(len(x))
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve)
        return numbers.public_key()
    raise ValueError(public.type)


def is_signing_key(public: TPMT_PUBLIC, accepted: Algorithms) -> bool:
    """Tell whether an object is an accepted key that signs by one accepted scheme only."""
    try:
        public_key(public, accepted)
    except ValueError:
        return False
    scheme = public.parameters.asymDetail.scheme
    return scheme.scheme in _SCHEMES[public.type] and int(scheme.details.anySig.hashAlg) in accepted.hashes


def from_tpmt(signature: TPMT_SIGNATURE) -> Signature:
    """Read a TPMT_SIGNATURE; raises InvalidSignature for one that is neither RSASSA, RSAPSS nor ECDSA."""
    scheme = signature.sigAlg
    if scheme in (TPM2_ALG.RSASSA, TPM2_ALG.RSAPSS):
        detail = signature.signature.rsassa if scheme == TPM2_ALG.RSASSA else signature.signature.rsapss
        return Signature(int(scheme), int(detail.hash), bytes(detail.sig))
    if scheme == TPM2_ALG.ECDSA:
        detail = signature.signature.ecdsa
        r, s = (int.from_bytes(bytes(part), "big") for part in (detail.signatureR, detail.signatureS))
        return Signature(int(scheme), int(detail.hash), encode_dss_signature(r, s))
    raise InvalidSignature


def require_signature(key: Key, signature: Signature, message: bytes, accepted: Algorithms) -> None:
    """Check a signature over ``message``; raises InvalidSignature or ValueError if it does not verify."""
    algorithm = accepted.hashes.get(signature.hash)
    if algorithm is None:
        raise InvalidSignature
    if isinstance(key, rsa.RSAPublicKey) and signature.scheme == TPM2_ALG.RSASSA:
        key.verify(signature.value, message, padding.PKCS1v15(), algorithm)
    elif isinstance(key, rsa.RSAPublicKey) and signature.scheme == TPM2_ALG.RSAPSS:
        # A TPM's salt is as long as the hash, or as long as fits (part 1, annex B.7).
        key.verify(
            signature.value, message, padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO), algorithm
        )
    elif isinstance(key, ec.EllipticCurvePublicKey) and signature.scheme == TPM2_ALG.ECDSA:
        key.verify(signature.value, message, ec.ECDSA(algorithm))
    else:
        raise InvalidSignature
