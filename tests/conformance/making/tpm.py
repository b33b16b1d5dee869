"""Vectors of TPM structures, written with struct from TPM 2.0 part 2: EK, AK, quote, PCR selection, signature."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tests.conformance.making.vector import Vector, given

RSA, ECC, SHA1, SHA256, AES, NULL, CFB, RSASSA, RSAPSS, ECDSA = (
    0x0001,
    0x0023,
    0x0004,
    0x000B,
    0x0006,
    0x0010,
    0x0043,
    0x0014,
    0x0016,
    0x0018,
)
P256: Final = 0x0003
FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN, USER_WITH_AUTH, ADMIN_WITH_POLICY = (
    1 << bit for bit in (1, 4, 5, 6, 7)
)
RESTRICTED, DECRYPT, SIGN = (1 << bit for bit in (16, 17, 18))
EK_ATTRIBUTES: Final = (
    FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT
)
AK_ATTRIBUTES: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | RESTRICTED | SIGN
POLICY_A: Final = hashlib.sha256(
    hashlib.sha256(bytes(32) + struct.pack(">II", 0x151, 0x4000000B)).digest()
).digest()
"""TPM2_PolicySecret(TPM_RH_ENDORSEMENT): TCG EK Credential Profile, section B.3."""
MODULUS: Final = b"\xc0" + bytes(range(1, 255)) + b"\x01"
KEY: Final = ec.derive_private_key(0x1F2E3D4C5B6A7988, ec.SECP256R1())
OTHER_KEY: Final = ec.derive_private_key(7, ec.SECP256R1())
PCRS: Final = tuple((index, hashlib.sha256(bytes([index])).digest()) for index in (0, 7, 15))
PCR_DIGEST: Final = hashlib.sha256(b"".join(digest for _, digest in PCRS)).digest()
QUALIFYING: Final = hashlib.sha256(b"T1").digest()


def sized(data: bytes) -> bytes:
    """TPM2B: a size of two bytes in front."""
    return struct.pack(">H", len(data)) + data


def ek(modulus: bytes = MODULUS, attributes: int = EK_ATTRIBUTES) -> bytes:
    """TPMT_PUBLIC of the TCG's EK template L-1: RSA 2048, AES-128-CFB."""
    head = struct.pack(">HHI", RSA, SHA256, attributes) + sized(POLICY_A)
    return head + struct.pack(">HHHHHI", AES, 128, CFB, NULL, 2048, 0) + sized(modulus)


def ecc_ak(
    attributes: int = AK_ATTRIBUTES,
    *,
    key: ec.EllipticCurvePrivateKey = KEY,
    name_alg: int = SHA256,
    scheme: int = ECDSA,
    scheme_hash: int = SHA256,
    curve: int = P256,
) -> bytes:
    """TPMT_PUBLIC of a P-256 key that signs."""
    numbers = key.public_key().public_numbers()
    point = b"".join(sized(part.to_bytes(32, "big")) for part in (numbers.x, numbers.y))
    chosen = struct.pack(">H", scheme) + (struct.pack(">H", scheme_hash) if scheme != NULL else b"")
    head = struct.pack(">HHI", ECC, name_alg, attributes) + sized(b"") + struct.pack(">H", NULL)
    return head + chosen + struct.pack(">HH", curve, NULL) + point


def rsa_ak(scheme: int = RSASSA, bits: int = 2048) -> bytes:
    """TPMT_PUBLIC of an RSA key that signs."""
    head = struct.pack(">HHI", RSA, SHA256, AK_ATTRIBUTES) + sized(b"") + struct.pack(">H", NULL)
    return head + struct.pack(">HHHI", scheme, SHA256, bits, 0) + sized(MODULUS[: bits // 8 - 1] + b"\x01")


def name(public: bytes) -> bytes:
    """Give an object's Name."""
    return struct.pack(">H", SHA256) + hashlib.sha256(public).digest()


def selection(indices: Sequence[int], algorithm: int = SHA256, size: int = 3) -> bytes:
    """TPML_PCR_SELECTION with one entry."""
    bits = sum(1 << index for index in indices)
    return struct.pack(">IHB", 1, algorithm, size) + bits.to_bytes(size, "little")


def attest(
    *,
    magic: int = 0xFF544347,
    kind: int = 0x8018,
    qualifying: bytes = QUALIFYING,
    selected: bytes = selection([0, 7, 15]),
    digest: bytes = PCR_DIGEST,
) -> bytes:
    """TPMS_ATTEST of a quote."""
    clock = struct.pack(">QIIB", 0x1234, 5, 6, 1)
    firmware = bytes.fromhex("1122334455667788")
    head = struct.pack(">IH", magic, kind) + sized(b"") + sized(qualifying)
    return head + clock + firmware + selected + sized(digest)


def ecdsa(
    message: bytes, key: ec.EllipticCurvePrivateKey = KEY, scheme: int = ECDSA, hashed: int = SHA256
) -> bytes:
    """TPMT_SIGNATURE; deterministic (RFC 6979), so that this file is."""
    der = key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    parts = b"".join(sized(part.to_bytes(32, "big")) for part in decode_dss_signature(der))
    return struct.pack(">HH", scheme, hashed) + parts


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    yield from _eks()
    yield from _aks()
    yield from _selections()
    yield from _attests()
    yield from _signatures()
    yield from _quotes()


def _raw(path: str, about: str, raw: bytes, gives: object = None, fails: str | None = None) -> Vector:
    return Vector(f"tpm/{path}", about, {"raw.bin": raw}, gives, fails)


def _eks() -> Iterator[Vector]:
    good = ek()
    yield _raw("ek/template-l1", "The manifest of an SVSM: 314 bytes.", good, {"name": name(good).hex()})
    for case, about, raw, code in (
        ("longer", "Nothing follows the EK.", good + b"\0", "ek.size"),
        ("sized", "A TPM2B_PUBLIC is not a TPMT_PUBLIC.", sized(good), "ek.size"),
        ("nothing", "There is no manifest.", b"", "ek.size"),
        (
            "signs",
            "Other attributes: a key of another template.",
            ek(attributes=AK_ATTRIBUTES),
            "ek.template",
        ),
        ("small-modulus", "A modulus of 2047 bits.", ek(b"\x7f" + MODULUS[1:]), "ek.modulus"),
        ("even-modulus", "An even modulus.", ek(MODULUS[:-1] + b"\x02"), "ek.modulus"),
    ):
        yield _raw(f"ek/{case}", about, raw, fails=code)


def _aks() -> Iterator[Vector]:
    for case, good in (("ecdsa-p256", ecc_ak()), ("rsassa", rsa_ak()), ("rsapss", rsa_ak(RSAPSS))):
        yield _raw(
            f"ak/{case}",
            "A key that a TPM made, keeps, and signs quotes with.",
            good,
            {"name": name(good).hex()},
        )
    for case, bit in (
        ("not-restricted", RESTRICTED),
        ("not-sign", SIGN),
        ("not-fixed-tpm", FIXED_TPM),
        ("not-fixed-parent", FIXED_PARENT),
        ("not-sensitive-data-origin", SENSITIVE_DATA_ORIGIN),
    ):
        about = "An attribute without which a quote proves nothing."
        yield _raw(f"ak/{case}", about, ecc_ak(AK_ATTRIBUTES & ~bit), fails="ak.attributes")
    yield _raw("ak/decrypt", "It also decrypts.", ecc_ak(AK_ATTRIBUTES | DECRYPT), fails="ak.attributes")
    scheme, layout = "ak.scheme", "ak.layout"
    for case, about, raw, code in (
        ("no-scheme", "Whoever uses it would choose how it signs.", ecc_ak(scheme=NULL), scheme),
        ("sha-1", "ECDSA with SHA-1.", ecc_ak(scheme_hash=SHA1), scheme),
        ("rsa-1024", "RSA with 1024 bits.", rsa_ak(bits=1024), scheme),
        ("p-384", "Another curve, with a point that is not on it.", ecc_ak(curve=0x0004), scheme),
        ("name-sha-1", "Names are made with SHA-256 in version 1.", ecc_ak(name_alg=SHA1), layout),
        ("longer", "Nothing follows a TPMT_PUBLIC.", ecc_ak() + b"\0", layout),
        ("cut", "Its end is missing.", ecc_ak()[:-1], layout),
        ("sized", "A TPM2B_PUBLIC is not a TPMT_PUBLIC.", sized(ecc_ak()), layout),
    ):
        yield _raw(f"ak/{case}", about, raw, fails=code)


def _selections() -> Iterator[Vector]:
    for case, indices in (("all", range(24)), ("boot-and-cap", [*range(10), 14, 15]), ("one", [23])):
        yield _raw(
            f"pcr-selection/{case}", "One entry: SHA-256, 3 bytes.", selection(list(indices)), list(indices)
        )
    yield _raw("pcr-selection/none", "No PCR is an empty list.", bytes(4), [])
    layout, form = "pcr-selection.layout", "pcr-selection.form"
    for case, about, raw, code in (
        ("sha-1", "Another bank.", selection([0], SHA1), form),
        ("two-bytes", "A bitmap of another size.", selection([0], size=2), form),
        ("four-bytes", "A bitmap of another size.", selection([0], size=4), form),
        ("nothing-chosen", "An entry that chooses nothing: none has one form.", selection([]), form),
        ("two-entries", "Two entries.", struct.pack(">I", 2) + selection([0])[4:] * 2, form),
        ("longer", "Nothing follows it.", selection([0]) + b"\0", layout),
        ("cut", "Its end is missing.", selection([0])[:-1], layout),
    ):
        yield _raw(f"pcr-selection/{case}", about, raw, fails=code)


def _attests() -> Iterator[Vector]:
    gives = {
        "extra_data": QUALIFYING.hex(),
        "pcr_select": selection([0, 7, 15]).hex(),
        "pcr_digest": PCR_DIGEST.hex(),
        "clock_ms": 0x1234,
        "reset_count": 5,
        "restart_count": 6,
        "firmware_version": 0x1122334455667788,
    }
    yield _raw("attest/quote", "The fields of a TPMS_ATTEST that are judged.", attest(), gives)
    for case, about, raw, code in (
        ("other-magic", "Not made by a TPM itself.", attest(magic=0xFF544348), "quote.magic"),
        ("certify", "Another kind of attestation.", attest(kind=0x8017), "quote.type"),
        ("longer", "Nothing follows it.", attest() + b"\0", "quote.layout"),
        ("cut", "Its end is missing.", attest()[:-1], "quote.layout"),
        ("nothing", "There is no quote.", b"", "quote.layout"),
    ):
        yield _raw(f"attest/{case}", about, raw, fails=code)


def _signatures() -> Iterator[Vector]:
    plain_rsa = struct.pack(">HH", RSASSA, SHA256) + sized(MODULUS)
    for case, raw in (("ecdsa", ecdsa(attest())), ("rsassa", plain_rsa)):
        yield _raw(f"signature/{case}", "A TPMT_SIGNATURE.", raw, {"scheme": int.from_bytes(raw[:2], "big")})
    for case, raw in (
        ("longer", ecdsa(attest()) + b"\0"),
        ("cut", plain_rsa[:-1]),
        ("nothing", b""),
        ("bare", MODULUS),
    ):
        yield _raw(f"signature/{case}", "Not exactly one TPMT_SIGNATURE.", raw, fails="signature.layout")


def _quotes() -> Iterator[Vector]:
    good = attest()
    values = {str(index): value.hex() for index, value in PCRS}
    yield Vector(
        "tpm/quote/holds",
        "The AK signed a quote for this T1 over the PCRs of the policy, and the values hash to its pcrDigest.",
        _quote(good),
        {"pcrs": values, "ak_name": name(ecc_ak()).hex()},
    )
    cases = {
        "other-t1": ("quote.qualifying-data", "Made for another exchange.", _quote(attest(qualifying=bytes(32)))),
        "no-t1": ("quote.qualifying-data", "Made for nobody.", _quote(attest(qualifying=b""))),
        "fewer-pcrs": ("quote.pcr-selection", "It leaves a PCR out.", _quote(attest(selected=selection([0, 7])))),
        "no-pcrs": ("quote.pcr-selection", "It quotes nothing.", _quote(attest(selected=bytes(4)))),
        "other-key": ("quote.signature", "Signed by another key.", _quote(good, signed=ecdsa(good, OTHER_KEY))),
        "other-attest": ("quote.signature", "Signed for another quote.", _quote(good, signed=ecdsa(good[:-1]))),
        "rsa-scheme": ("quote.signature", "Not of the key's scheme.", _quote(good, signed=_RSA_SIGNATURE)),
        "sha-1": ("quote.signature", "It names SHA-1.", _quote(good, signed=ecdsa(good, hashed=SHA1))),
        "signature-cut": ("quote.signature-layout", "Its end is missing.", _quote(good, signed=ecdsa(good)[:-1])),
        "not-a-quote": ("quote.layout", "Another attestation.", _quote(attest(kind=0x8017))),
        "other-value": ("quote.pcr-values", "A PCR's value is another.", _quote(good, pcrs=_replaced(bytes(32)))),
        "value-missing": ("quote.pcr-values", "A PCR has no value.", _quote(good, pcrs=PCRS[:-1])),
        "other-order": ("quote.pcr-values", "Values are in order.", _quote(good, pcrs=PCRS[::-1])),
        "other-index": ("quote.pcr-values", "A value goes by another PCR.", _quote(good, pcrs=[(1, PCRS[0][1]), *PCRS[1:]])),
    }  # fmt: skip
    for case, (code, about, files) in cases.items():
        yield Vector(f"tpm/quote/{case}", about, files, fails=code)


_RSA_SIGNATURE: Final = struct.pack(">HH", RSASSA, SHA256) + sized(MODULUS)


def _quote(
    raw: bytes, signed: bytes | None = None, pcrs: Sequence[tuple[int, bytes]] = PCRS
) -> dict[str, bytes]:
    return given(
        ek_public=ek(),
        ak_public=ecc_ak(),
        attest=raw,
        signature=ecdsa(raw) if signed is None else signed,
        pcrs=[{"index": index, "digest": value} for index, value in pcrs],
        qualifying_data=QUALIFYING,
        pcr_selection=selection([0, 7, 15]),
    )


def _replaced(value: bytes) -> Sequence[tuple[int, bytes]]:
    return [*PCRS[:-1], (PCRS[-1][0], value)]
