"""Vectors of the operator's code and of its proof: docs/protocol.md section 5, from its words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.conformance.making import replies
from tests.conformance.making.vector import Vector, given

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
SECRET: Final = bytes(range(0x20, 0x30))
T0: Final = hashlib.sha512(b"T0").digest()
OTHER_T0: Final = hashlib.sha512(b"another T0").digest()


def code(secret: bytes, verifier_key: bytes, *, check: bytes | None = None) -> str:
    """Write a code."""
    content = secret + hashlib.sha256(verifier_key).digest()[:10]
    computed = hashlib.sha256(b"kagimori/1/enrol-check\0" + content).digest()[:4]
    bits = "".join(f"{byte:08b}" for byte in content + (check or computed))
    characters = "".join(ALPHABET[int(bits[at : at + 5], 2)] for at in range(0, len(bits), 5))
    return "-".join(characters[at : at + 6] for at in range(0, 48, 6))


def key(secret: bytes) -> Ed25519PrivateKey:
    """Give the key behind a code."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"kagimori/1/enrol-key\0" + secret).digest())


def proof(secret: bytes, t0: bytes) -> bytes:
    """Prove a code for an exchange."""
    return key(secret).sign(b"kagimori/1/enrol-proof\0" + t0)


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    verifier = replies.public_key(replies.SEED)
    good = code(SECRET, verifier)
    public = key(SECRET).public_key().public_bytes_raw()
    gives = {"public_key": public, "fingerprint": hashlib.sha256(verifier).digest()[:10]}
    told = {name: value.hex() for name, value in gives.items()}
    for name, text, about in (
        ("code", good, "A code as it is printed."),
        ("code-upper-case-in-one-piece", good.replace("-", "").upper(), "Case and dashes do not count."),
        ("code-with-blanks", f" {good.replace('-', ' ')}\n", "Nor do blanks."),
        ("code-as-it-looks", good.translate(str.maketrans("10", "lO")), "l and i are 1, o is 0."),
    ):
        yield Vector(f"enrol/{name}", about, given(code=text), told)
    turned = good[:-1] + ALPHABET[ALPHABET.index(good[-1]) ^ 1]
    for name, text in (
        ("one-character-off", turned),
        ("too-short", good[:-1]),
        ("too-long", good + "0"),
        ("no-letter-of-ours", "u" + good[1:]),
        ("another-check", code(SECRET, verifier, check=bytes(4))),
        ("nothing", ""),
    ):
        about = "A typing error is found before anything is sent."
        yield Vector(f"enrol/{name}", about, given(code=text), fails="enrol.code")
    proved = {"code": good, "t0": T0, "public_key": public}
    yield Vector(
        "enrol/proof",
        "Ed25519 under the key that the secret gives, over label and T0.",
        given(**proved),
        {"enrol_proof": proof(SECRET, T0).hex()},
    )
    for name, made in (
        ("of-another-exchange", proof(SECRET, OTHER_T0)),
        ("of-another-code", proof(bytes(16), T0)),
        ("without-label", key(SECRET).sign(T0)),
        ("nothing-but-zeros", bytes(64)),
    ):
        yield Vector(
            f"enrol/proof-{name}",
            "A proof is good for one code and one exchange.",
            given(**proved, enrol_proof=made),
            fails="enrol.proof",
        )
