"""Quotes of any TPM 2.0: what an AK signed, for which challenge, over which PCR values.

Beyond ``verify.vtpm``: an AK as PEM or DER, which carries no attributes; signatures without TPMT_SIGNATURE around
them; RSA 3072 and 4096, P-384 and P-521; SHA-1, SHA-384 and SHA-512; any banks. Source: TCG TPM 2.0 Library part 2,
section 10.12, and part 3, section 18.4 (TPM2_Quote).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC, TPMA_OBJECT

from kagimori_protocol import tpm
from kagimori_protocol.errors import KagimoriError, Malformed, NotAuthentic
from kagimori_verifier.examine.pcr_values import numbers
from kagimori_verifier.verify import signing, vtpm
from kagimori_verifier.verify.certificate import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tpm2_pytss.types import TPMT_PUBLIC

    from kagimori_verifier.examine.pcr_values import Banks
    from kagimori_verifier.trail import Trail
    from kagimori_verifier.verify.signing import Key, Signature

ALGORITHMS: Final = signing.Algorithms(
    rsa_bits=frozenset({2048, 3072, 4096}),
    curves={
        int(TPM2_ECC.NIST_P256): ec.SECP256R1(),
        int(TPM2_ECC.NIST_P384): ec.SECP384R1(),
        int(TPM2_ECC.NIST_P521): ec.SECP521R1(),
    },
    hashes={
        int(TPM2_ALG.SHA256): hashes.SHA256(),
        int(TPM2_ALG.SHA384): hashes.SHA384(),
        int(TPM2_ALG.SHA512): hashes.SHA512(),
        int(TPM2_ALG.SHA1): hashes.SHA1(),  # noqa: S303 - old TPMs sign with it; the command says so
    },
)
_ACCEPTED: Final = (
    "RSA 2048 to 4096 with RSASSA or RSAPSS, or ECC P-256 to P-521 with ECDSA; SHA-1 to SHA-512"
)

BANK_NAMES: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
SCHEME_NAMES: Final = {
    int(TPM2_ALG.RSASSA): "RSASSA",
    int(TPM2_ALG.RSAPSS): "RSAPSS",
    int(TPM2_ALG.ECDSA): "ECDSA",
}
ATTRIBUTES: Final = {
    int(bit): name
    for name, bit in (
        ("fixedTPM", TPMA_OBJECT.FIXEDTPM),
        ("stClear", TPMA_OBJECT.STCLEAR),
        ("fixedParent", TPMA_OBJECT.FIXEDPARENT),
        ("sensitiveDataOrigin", TPMA_OBJECT.SENSITIVEDATAORIGIN),
        ("userWithAuth", TPMA_OBJECT.USERWITHAUTH),
        ("adminWithPolicy", TPMA_OBJECT.ADMINWITHPOLICY),
        ("noDA", TPMA_OBJECT.NODA),
        ("encryptedDuplication", TPMA_OBJECT.ENCRYPTEDDUPLICATION),
        ("restricted", TPMA_OBJECT.RESTRICTED),
        ("decrypt", TPMA_OBJECT.DECRYPT),
        ("sign", TPMA_OBJECT.SIGN_ENCRYPT),
        ("x509sign", TPMA_OBJECT.X509SIGN),
    )
}
"""TPM 2.0 part 2, section 8.3."""

_ATTEST_TYPES: Final = range(0x8014, 0x801D)  # TPM_ST_ATTEST_NV to TPM_ST_ATTEST_NV_DIGEST
_QUOTE_HEAD: Final = bytes.fromhex("ff5443478018")
_DER_SEQUENCE: Final = 0x30


@dataclass(frozen=True, slots=True)
class Ak:
    """An attestation key and the container that it came in; ``public`` is None where that has no attributes."""

    form: str
    key: Key
    public: TPMT_PUBLIC | None
    name: bytes | None

    @property
    def key_size(self) -> int:
        """The size of an RSA signature, or of one ECDSA coordinate, in bytes."""
        return (self.key.key_size + 7) // 8

    @property
    def attributes(self) -> tuple[str, ...] | None:
        """Names of the attributes that are set, or None where they are not known."""
        if self.public is None:
            return None
        value = int(self.public.objectAttributes)
        return tuple(name for bit, name in ATTRIBUTES.items() if value & bit)

    def __str__(self) -> str:
        """Say what kind of key it is."""
        if isinstance(self.key, rsa.RSAPublicKey):
            return f"RSA {self.key.key_size}"
        return f"ECC {self.key.curve.name}"


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a quote says. Believe it only where every check of the trail holds."""

    attest: tpm.Attest
    banks: tuple[tuple[int, tuple[int, ...]], ...]
    signature: Signature
    signature_form: str


def parse_ak(raw: bytes) -> Ak:
    """Read an AK: PEM or DER (public key or certificate), TPMT_PUBLIC or TPM2B_PUBLIC. Raises Malformed (ak.layout)."""
    if b"-----BEGIN " in raw:
        return _from_container("PEM", raw, serialization.load_pem_public_key, x509.load_pem_x509_certificate)
    if raw[:1] == bytes([_DER_SEQUENCE]):
        return _from_container("DER", raw, serialization.load_der_public_key, x509.load_der_x509_certificate)
    sized = int.from_bytes(raw[:2], "big") == len(raw) - 2
    area = raw[2:] if sized else raw
    try:
        public = tpm.parse_public(area)
        key = signing.public_key(public, ALGORITHMS)
    except (Malformed, ValueError) as error:
        found = (
            error.found if isinstance(error, Malformed) else "a key of another kind, or that cannot be one"
        )
        raise _no_ak(str(found)) from None
    try:
        name = tpm.object_name(area)
    except Malformed:  # its nameAlg is not SHA-256
        name = None
    return Ak("TPM2B_PUBLIC" if sized else "TPMT_PUBLIC", key, public, name)


def _from_container(
    encoding: str,
    raw: bytes,
    load_key: Callable[[bytes], object],
    load_certificate: Callable[[bytes], x509.Certificate],
) -> Ak:
    form = "public key"
    try:
        try:
            key = load_key(raw)
        except (ValueError, UnsupportedAlgorithm):
            key, form = load_certificate(raw).public_key(), "certificate"
    except UNREADABLE:
        raise _no_ak(f"{encoding} that holds neither a public key nor a certificate") from None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in ALGORITHMS.rsa_bits:
        return Ak(f"{encoding} {form}", key, None, None)
    curves = {curve.name for curve in ALGORITHMS.curves.values()}
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in curves:
        return Ak(f"{encoding} {form}", key, None, None)
    raise _no_ak("a key of another kind")


def _no_ak(found: str) -> Malformed:
    return Malformed(
        "An AK cannot be read.",
        code="ak.layout",
        expected=f"PEM, TPMT_PUBLIC or TPM2B_PUBLIC of {_ACCEPTED}",
        found=found,
    )


def parse_attest(trail: Trail, raw: bytes) -> tpm.Attest:
    """Read a TPMS_ATTEST; magic or type of another value are noted as failed checks, so that the rest is told too.

    Raises Malformed for what is no TPMS_ATTEST at all, NotAuthentic (quote.type) for one that is no quote.
    """
    try:
        attest = tpm.Attest.parse(raw)
    except Malformed as error:
        if error.code not in ("quote.magic", "quote.type"):
            raise
        kind = int.from_bytes(raw[4:6], "big")
        try:
            attest = tpm.Attest.parse(_QUOTE_HEAD + raw[len(_QUOTE_HEAD) :])
        except Malformed:
            if error.code == "quote.type" and kind in _ATTEST_TYPES:
                trail.require(
                    "quote.type",
                    False,  # noqa: FBT003 - it is none
                    expected="0x8018, a quote",
                    found=f"0x{kind:04x}",
                )
            raise error from None
        trail.note(error.code, False, expected=str(error.expected), found=str(error.found))  # noqa: FBT003 - it failed
        return attest
    trail.note(
        "quote.layout",
        True,  # noqa: FBT003 - it was read
        expected="a TPMS_ATTEST of type quote, made by a TPM",
        found="so it is",
    )
    return attest


def parse_signature(raw: bytes, ak: Ak) -> tuple[str, tuple[Signature, ...]]:
    """Read a signature: its container, and what it may be, best first, where the container does not tell.

    Raises Malformed (quote.signature-layout).
    """
    with contextlib.suppress(Malformed, InvalidSignature):
        return "TPMT_SIGNATURE", (signing.from_tpmt(tpm.parse_signature(raw)),)
    if isinstance(ak.key, rsa.RSAPublicKey):
        if len(raw) == ak.key_size:
            return "bare RSA signature", tuple(_bare(ak, raw, (TPM2_ALG.RSASSA, TPM2_ALG.RSAPSS)))
    elif len(raw) == 2 * ak.key_size:
        r, s = (int.from_bytes(raw[at : at + ak.key_size], "big") for at in (0, ak.key_size))
        return "bare ECDSA signature (r, s)", tuple(_bare(ak, encode_dss_signature(r, s), (TPM2_ALG.ECDSA,)))
    else:
        with contextlib.suppress(ValueError):
            decode_dss_signature(raw)
            return "bare ECDSA signature (DER)", tuple(_bare(ak, raw, (TPM2_ALG.ECDSA,)))
    raise Malformed(
        "A signature cannot be read.",
        code="quote.signature-layout",
        expected=f"a TPMT_SIGNATURE, or the bare signature of an {ak} key",
        found=f"{len(raw)} bytes of something else",
    )


def is_sized_like_a_signature(raw: bytes, ak: Ak) -> bool:
    """Tell whether bytes have the length of a TPMT_SIGNATURE by this key: then it is one that somebody changed."""
    heads, parts = (6, 1) if isinstance(ak.key, rsa.RSAPublicKey) else (8, 2)
    return len(raw) == heads + parts * ak.key_size


def _bare(ak: Ak, value: bytes, schemes: Iterable[int]) -> Iterable[Signature]:
    """Give what a bare signature may be: what its AK's only scheme says, or else every scheme and hash."""
    if ak.public is not None and signing.is_signing_key(ak.public, ALGORITHMS):
        scheme = ak.public.parameters.asymDetail.scheme
        yield signing.Signature(int(scheme.scheme), int(scheme.details.anySig.hashAlg), value)
        return
    for scheme in schemes:
        for algorithm in ALGORITHMS.hashes:
            yield signing.Signature(int(scheme), algorithm, value)


def verify(  # noqa: PLR0913 - what a quote ties together
    trail: Trail, *, attest: bytes, signature: bytes, ak: Ak, qualifying_data: bytes, pcrs: Banks | None
) -> Quoted:
    """Make every check on a quote; nothing that only fails is raised, so that all reasons are told together.

    1. it is a quote: magic and type
    2. the AK, as far as its attributes are known, signs only what its TPM made, and by an accepted scheme
    3. it was made for ``qualifying_data``
    4. the AK signed it
    5. it is about PCRs, and the ones in ``pcrs`` (if given) hash to its pcrDigest

    Raises Malformed for a quote or signature that cannot be read, NotAuthentic for another attestation than a quote.
    """
    # 1
    quote = parse_attest(trail, attest)
    banks = tpm.pcr_banks(quote.pcr_select)
    try:
        form, candidates = parse_signature(signature, ak)
    except Malformed as error:
        if not is_sized_like_a_signature(signature, ak):
            raise
        trail.note(error.code, False, expected=str(error.expected), found=str(error.found))  # noqa: FBT003 - it failed
        form, candidates = "unknown", (signing.Signature(0, int(TPM2_ALG.SHA256), b""),)
    # 2
    if ak.public is not None:
        with contextlib.suppress(NotAuthentic):
            vtpm.require_ak_attributes(trail, ak.public)
        trail.note(
            "ak.scheme",
            signing.is_signing_key(ak.public, ALGORITHMS),
            expected=_ACCEPTED,
            found=f"{ak} with scheme 0x{int(ak.public.parameters.asymDetail.scheme.scheme):04x}",
        )
    # 3
    with contextlib.suppress(NotAuthentic):
        vtpm.require_qualifying_data(trail, quote, qualifying_data, whose="as --qualifying says")
    # 4
    chosen = next((one for one in candidates if _verifies(ak, one, attest)), None)
    signed = candidates[0] if chosen is None else chosen
    with contextlib.suppress(NotAuthentic):
        vtpm.require_quote_signature(
            trail,
            lambda: signing.require_signature(ak.key, signed, attest, ALGORITHMS),
            expected="the quote signed by this AK",
        )
    # 5
    trail.note(
        "quote.pcr-selection",
        any(chosen for _, chosen in banks),
        expected="at least one PCR",
        found=told(banks),
    )
    if pcrs is not None:
        _require_values(trail, quote, banks, signed, pcrs)
    return Quoted(quote, banks, signed, form)


def _verifies(ak: Ak, signature: Signature, message: bytes) -> bool:
    try:
        signing.require_signature(ak.key, signature, message, ALGORITHMS)
    except (InvalidSignature, ValueError):
        return False
    return True


def _require_values(
    trail: Trail,
    quote: tpm.Attest,
    banks: tuple[tuple[int, tuple[int, ...]], ...],
    signature: Signature,
    pcrs: Banks,
) -> None:
    wanted = [(BANK_NAMES.get(bank, f"0x{bank:04x}"), pcr) for bank, chosen in banks for pcr in chosen]
    digests = [pcrs[bank][pcr] for bank, pcr in wanted if pcr in pcrs.get(bank, {})]
    absent = [f"PCR {pcr} ({bank})" for bank, pcr in wanted if pcr not in pcrs.get(bank, {})]
    with contextlib.suppress(NotAuthentic):
        vtpm.require_pcr_values(
            trail,
            quote,
            digests,
            BANK_NAMES.get(signature.hash, "sha256"),
            complete=bool(wanted) and not absent,
            wanted=told(banks),
            given=f"values without {', '.join(absent)}" if absent else "the values given",
        )


def not_covered(quoted: Quoted, pcrs: Banks) -> str:
    """Name the given values that the quote says nothing about, for a person; empty where there are none."""
    covered = {(BANK_NAMES.get(bank), pcr) for bank, chosen in quoted.banks for pcr in chosen}
    beside = {
        bank: [pcr for pcr in values if (bank, pcr) not in covered] for bank, values in sorted(pcrs.items())
    }
    return "; ".join(f"PCRs {numbers(rest)} of {bank}" for bank, rest in beside.items() if rest)


def told(banks: tuple[tuple[int, tuple[int, ...]], ...]) -> str:
    """Write a selection for a person."""
    parts = [
        f"PCRs {numbers(chosen)} of {BANK_NAMES.get(bank, f'bank 0x{bank:04x}')}" for bank, chosen in banks
    ]
    return "; ".join(parts) or "no PCRs"


def refusals(quoted: Quoted, ak: Ak) -> tuple[str, ...]:
    """Say for what the protocol would refuse such a quote, whatever it was made for."""
    reasons = []
    if ak.public is None:
        reasons.append(f"an AK as {ak.form} has no attributes: whether a TPM keeps it is not known")
    elif not signing.is_signing_key(ak.public, vtpm.ALGORITHMS) or ak.name is None:
        reasons.append(f"the AK is {ak}, or its scheme or name is not with SHA-256")
    if quoted.signature_form != "TPMT_SIGNATURE":
        reasons.append(f"the signature is a {quoted.signature_form}, not a TPMT_SIGNATURE")
    if quoted.signature.hash not in vtpm.ALGORITHMS.hashes:
        reasons.append(f"it is signed with {BANK_NAMES.get(quoted.signature.hash)}, not sha256")
    try:
        tpm.selected_pcrs(quoted.attest.pcr_select)
    except KagimoriError:
        reasons.append(f"it is over {told(quoted.banks)}, not over the sha256 bank alone")
    if len(quoted.attest.extra_data) != tpm.QUALIFYING_SIZE:
        reasons.append(f"its qualifying data has {len(quoted.attest.extra_data)} bytes, not 32")
    return tuple(reasons)
