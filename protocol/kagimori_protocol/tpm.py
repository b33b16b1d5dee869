"""TPM structures as far as they are judged: the EK template, object names, quotes, PCR selections.

Bytes are decoded by tpm2-pytss's types (the TSS's own unmarshalling), and each is accepted only if it decodes
to its last byte and encodes back to itself: what was hashed, what was signed and what was read are then the
same thing. Source: TCG TPM 2.0 Library part 2 (structures) and TCG EK Credential Profile 2.5, section B.3.3
(template L-1).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tpm2_pytss.constants import TPM2_ALG, TPM2_GENERATED, TPM2_ST, TPMA_OBJECT
from tpm2_pytss.TSS2_Exception import TSS2_Exception
from tpm2_pytss.types import (
    TPM2B_NAME,
    TPM2B_PUBLIC,
    TPML_PCR_SELECTION,
    TPMS_ATTEST,
    TPMS_PCR_SELECTION,
    TPMT_PUBLIC,
    TPMT_SIGNATURE,
)

from kagimori_protocol.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable

EK_UNIQUE_SIZE: Final = 256
_EK_HEAD: Final = bytes.fromhex(
    "0001"  # type RSA
    "000b"  # nameAlg SHA-256
    "000300b2"  # fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt
    "0020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"  # PolicyA
    "000600800043"  # AES, 128 bit, CFB
    "0010"  # scheme NULL
    "080000000000"  # 2048 bit, default exponent
    "0100"  # size of unique
)
EK_TEMPLATE_L1: Final = _EK_HEAD + bytes(EK_UNIQUE_SIZE)
"""TPMT_PUBLIC of the TCG's RSA 2048 EK template, 314 bytes; ``unique`` is zero in the template."""

EK_SIZE: Final = len(EK_TEMPLATE_L1)

PCR_COUNT: Final = 24
PCR_SELECT_SIZE: Final = PCR_COUNT // 8
NO_PCRS: Final = bytes(4)
"""A TPML_PCR_SELECTION without any selection."""

QUALIFYING_SIZE: Final = 32

AK_REQUIRED: Final = (
    TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.SIGN_ENCRYPT
    | TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
)
"""Attributes that make a quote believable: the TPM made the key, keeps it, and signs with it only what it made."""


def require_ek_l1(raw: bytes) -> bytes:
    """Return ``raw`` if it is exactly one EK made from template L-1 and nothing else.

    The SVSM's manifest of version 0 is such a TPMT_PUBLIC, without a size in front (AMD 58019, section 8.3).
    Raises Malformed for another size, another template, or a modulus of less than 2048 bits.
    """
    expected = f"{EK_SIZE} bytes: TPMT_PUBLIC of the TCG EK template L-1 with a 2048-bit modulus"
    if len(raw) != EK_SIZE:
        raise Malformed(
            "An EK has the wrong size.", code="ek.size", expected=expected, found=f"{len(raw)} bytes"
        )
    if raw[: len(_EK_HEAD)] != _EK_HEAD:
        at = next(i for i, byte in enumerate(_EK_HEAD) if raw[i] != byte)
        raise Malformed(
            "An EK was not made from the TCG's template L-1.",
            code="ek.template",
            expected=expected,
            found=f"other bytes from offset {at} on: {raw[at : at + 8].hex()}",
            todo="Use an SVSM whose vTPM offers the default EK (COCONUT with FEATURES=vtpm does).",
        )
    modulus = raw[len(_EK_HEAD) :]
    if not modulus[0] & 0x80 or not modulus[-1] & 1:
        raise Malformed(
            "An EK's modulus cannot be one: it is even, or shorter than 2048 bits.",
            code="ek.modulus",
            expected=expected,
            found=f"a modulus {modulus[:4].hex()}...{modulus[-4:].hex()}",
        )
    return raw


@functools.lru_cache(maxsize=64)  # what reads one exchange asks several times for its EK and its AK
def parse_public(raw: bytes) -> TPMT_PUBLIC:
    """Read a TPMT_PUBLIC strictly; not to be changed. Raises Malformed."""
    return _exactly(TPMT_PUBLIC, raw, "public.layout")


def parse_signature(raw: bytes) -> TPMT_SIGNATURE:
    """Read a TPMT_SIGNATURE strictly. Raises Malformed."""
    return _exactly(TPMT_SIGNATURE, raw, "signature.layout")


def object_name(public: bytes) -> bytes:
    """Compute an object's Name: nameAlg || H(TPMT_PUBLIC) (TPM 2.0 part 1, section 16). SHA-256 names only.

    Raises Malformed.
    """
    name_alg = parse_public(public).nameAlg
    if name_alg != TPM2_ALG.SHA256:
        raise Malformed(
            "A TPM object's name is made with a hash that version 1 does not use.",
            code="public.name-alg",
            expected="SHA-256",
            found=str(name_alg),
        )
    return int(TPM2_ALG.SHA256).to_bytes(2, "big") + hashlib.sha256(public).digest()


def pcr_selection(indices: Iterable[int]) -> bytes:
    """Marshal a TPML_PCR_SELECTION of the SHA-256 bank; without any index it is NO_PCRS."""
    return _pcr_selection(tuple(sorted(set(indices))))


@functools.lru_cache(maxsize=64)  # a verifier has few policies, and each exchange of a VM asks twice
def _pcr_selection(chosen: tuple[int, ...]) -> bytes:
    if not chosen:
        return NO_PCRS
    bits = sum(1 << index for index in chosen)
    selection = TPMS_PCR_SELECTION(
        hash=TPM2_ALG.SHA256,
        sizeofSelect=PCR_SELECT_SIZE,
        pcrSelect=bits.to_bytes(PCR_SELECT_SIZE, "little"),
    )
    return bytes(TPML_PCR_SELECTION([selection]).marshal())


@functools.lru_cache(maxsize=64)
def selected_pcrs(selection: bytes) -> tuple[int, ...]:
    """Read back the indices of a selection made by ``pcr_selection``; any other form raises Malformed."""
    parsed = _exactly(TPML_PCR_SELECTION, selection, "pcr-selection.layout")
    chosen: tuple[int, ...] = ()
    if parsed.count == 1:
        bits = int.from_bytes(bytes(parsed.pcrSelections[0].pcrSelect)[:PCR_SELECT_SIZE], "little")
        chosen = tuple(index for index in range(PCR_COUNT) if bits >> index & 1)
    if pcr_selection(chosen) != selection:
        raise Malformed(
            "A PCR selection is not one selection of the SHA-256 bank.",
            code="pcr-selection.form",
            expected="TPML_PCR_SELECTION with one entry: SHA-256, 3 bytes",
            found=selection.hex(),
        )
    return chosen


def pcr_banks(selection: bytes) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Read any TPML_PCR_SELECTION: each entry's TPM_ALG_ID and its PCRs, ascending, in the order that is hashed.

    Raises Malformed. The protocol itself takes one form only: ``selected_pcrs``.
    """
    parsed = _exactly(TPML_PCR_SELECTION, selection, "pcr-selection.layout")
    banks = []
    for entry in (parsed.pcrSelections[at] for at in range(parsed.count)):
        bits = int.from_bytes(bytes(entry.pcrSelect)[: entry.sizeofSelect], "little")
        chosen = tuple(index for index in range(bits.bit_length()) if bits >> index & 1)
        banks.append((int(entry.hash), chosen))
    return tuple(banks)


_QUOTE_MARKS: Final = (
    (
        int(TPM2_GENERATED.VALUE).to_bytes(4, "big"),
        0,
        "quote.magic",
        "A quote does not start with the mark of what a TPM made itself.",
    ),
    (int(TPM2_ST.ATTEST_QUOTE).to_bytes(2, "big"), 4, "quote.type", "A TPMS_ATTEST is not a quote."),
)
ATTEST_HEAD: Final = 6
"""Bytes of TPMS_ATTEST's magic and type."""


@dataclass(frozen=True, slots=True)
class Attest:
    """The fields of a TPMS_ATTEST of type quote that are judged (TPM 2.0 part 2, section 10.12).

    ``pcr_select`` is the marshalled TPML_PCR_SELECTION; ``pcr_digest`` is made with the signature's hash.
    """

    extra_data: bytes
    pcr_select: bytes
    pcr_digest: bytes
    clock_ms: int
    reset_count: int
    restart_count: int
    firmware_version: int

    @classmethod
    def parse(cls, raw: bytes) -> Attest:
        """Read a quote strictly. Raises Malformed for anything that is not one (magic, type, trailing bytes)."""
        # Looked at before the TSS does: some releases of it refuse other values as they unmarshal, some do not.
        for value, offset, code, what in _QUOTE_MARKS:
            if len(raw) >= ATTEST_HEAD and raw[offset : offset + len(value)] != value:
                raise Malformed(
                    what, code=code, expected=value.hex(), found=raw[offset : offset + len(value)].hex()
                )
        attest = _exactly(TPMS_ATTEST, raw, "quote.layout")
        quote = attest.attested.quote
        return cls(
            extra_data=bytes(attest.extraData),
            pcr_select=bytes(quote.pcrSelect.marshal()),
            pcr_digest=bytes(quote.pcrDigest),
            clock_ms=int(attest.clockInfo.clock),
            reset_count=int(attest.clockInfo.resetCount),
            restart_count=int(attest.clockInfo.restartCount),
            firmware_version=int(attest.firmwareVersion),
        )


def make_credential(ek_public: bytes, name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Seal ``secret`` (at most 32 bytes) so that only the TPM with this EK *and* an object of this name opens it.

    Returns the marshalled TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET (TPM 2.0 part 1, section 24). Random.
    Raises Malformed if the EK is not of template L-1.
    """
    # Only a verifier makes credentials: an initramfs does without this part of the library.
    from tpm2_pytss.utils import make_credential as _make_credential  # noqa: PLC0415 - as said above

    public = TPM2B_PUBLIC(publicArea=parse_public(require_ek_l1(ek_public)))
    try:
        id_object, encrypted_secret = _make_credential(public, secret, TPM2B_NAME(name=name))
    except ValueError as error:
        raise Malformed(
            "No credential can be made for an EK.",
            code="ek.modulus",
            found=str(error),
            expected="an RSA 2048 key",
        ) from error
    return bytes(id_object.marshal()), bytes(encrypted_secret.marshal())


def _exactly(structure: Any, raw: bytes, code: str) -> Any:  # noqa: ANN401 - tpm2-pytss's types carry no annotations
    """Unmarshal all of ``raw`` as ``structure``, or raise Malformed."""
    try:
        value, used = structure.unmarshal(raw)
        whole = used == len(raw) and bytes(value.marshal()) == raw
    except (TSS2_Exception, ValueError, TypeError) as error:
        raise Malformed(
            f"Bytes are no {structure.__name__}.",
            code=code,
            expected=f"a {structure.__name__} (TPM 2.0 part 2)",
            found=f"{len(raw)} bytes: {error}",
        ) from error
    if not whole:
        raise Malformed(
            f"Bytes do not end where their {structure.__name__} ends, or encode differently.",
            code=code,
            expected=f"one {structure.__name__} and nothing after it",
            found=f"{used} of {len(raw)} bytes used",
        )
    return value
