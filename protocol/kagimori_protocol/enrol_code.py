"""An operator's one-time code for an enrolment, and the proof of it that travels in its place (ADR 9).

::

    code  = 8 groups of 6 characters: base32 of secret (16 bytes) || fingerprint (10) || check (4)
    proof = Ed25519, under the key that the secret gives, over "kagimori/1/enrol-proof" 0x00 || T0

The code goes from one person's screen to another's keyboard and never over the wire. A host that reads the proof can only
guess at 128 bits, and a proof is good for one T0: one Hello, one challenge. The verifier keeps the public key, from which
nobody makes a code or a proof. The fingerprint is the verifier's own: an agent believes no other key, whatever its
agent.toml says, since until the enrolment that lies on a disk of the host's (THREATS T18).

Pure: no I/O, and randomness is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kagimori_protocol.errors import NotAuthentic, UsageError

LABEL_CHECK: Final = b"kagimori/1/enrol-check"
LABEL_KEY: Final = b"kagimori/1/enrol-key"
LABEL_PROOF: Final = b"kagimori/1/enrol-proof"

SECRET_SIZE: Final = 16
FINGERPRINT_SIZE: Final = 10
"""Bytes of a verifier key's SHA-256: who wants another key with the same has 2^80 to try, within the life of one code."""
PROOF_SIZE: Final = 64

_CHECK_SIZE: Final = 4
_SIZE: Final = SECRET_SIZE + FINGERPRINT_SIZE + _CHECK_SIZE
_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
"""Without i, l, o and u: the first three are read as the digits that they look like."""
_LOOK_ALIKE: Final = str.maketrans("ilo", "110")
_GROUP: Final = 6
_BITS: Final = 5
_LENGTH: Final = _SIZE * 8 // _BITS


class EnrolCode:
    """One code: the secret, and whose verifier it is for."""

    __slots__ = ("_private", "_secret", "fingerprint")

    def __init__(self, secret: bytes, fingerprint: bytes) -> None:
        """Take 16 random bytes and a fingerprint. Raises UsageError for other sizes."""
        if (len(secret), len(fingerprint)) != (SECRET_SIZE, FINGERPRINT_SIZE):
            raise _wrong(
                f"{SECRET_SIZE} bytes of secret and {FINGERPRINT_SIZE} of fingerprint", "other sizes"
            )
        self._secret = secret
        self._private = Ed25519PrivateKey.from_private_bytes(_labelled(LABEL_KEY, secret))
        self.fingerprint = fingerprint

    @classmethod
    def parse(cls, text: str) -> EnrolCode:
        """Read a code as people type it: in any case, with or without dashes and blanks. Raises UsageError."""
        typed = "".join(text.split()).replace("-", "").lower().translate(_LOOK_ALIKE)
        if len(typed) != _LENGTH or set(typed) - set(_ALPHABET):
            expected = f"{_LENGTH} letters and digits in {_LENGTH // _GROUP} groups, as `kagimori-verifier vm code` prints"
            raise _wrong(
                expected, f"{len(typed)} characters" if len(typed) != _LENGTH else "others among them"
            )
        number = 0
        for character in typed:
            number = number << _BITS | _ALPHABET.index(character)
        raw = number.to_bytes(_SIZE, "big")
        content, check = raw[:-_CHECK_SIZE], raw[-_CHECK_SIZE:]
        if not hmac.compare_digest(check, _labelled(LABEL_CHECK, content)[:_CHECK_SIZE]):
            raise _wrong("a code as it was printed", "one with a typing error in it")
        return cls(content[:SECRET_SIZE], content[SECRET_SIZE:])

    def text(self) -> str:
        """Write the code for a person."""
        content = self._secret + self.fingerprint
        number = int.from_bytes(content + _labelled(LABEL_CHECK, content)[:_CHECK_SIZE], "big")
        characters = [_ALPHABET[number >> _BITS * at & 31] for at in reversed(range(_LENGTH))]
        return "-".join("".join(characters[at : at + _GROUP]) for at in range(0, _LENGTH, _GROUP))

    @property
    def public_key(self) -> bytes:
        """Give what the verifier keeps: the key that proofs are held against."""
        return self._private.public_key().public_bytes_raw()

    def is_for(self, verifier_key: bytes) -> bool:
        """Tell whether this code is for the verifier that signs by this Ed25519 public key."""
        return hmac.compare_digest(self.fingerprint, fingerprint(verifier_key))

    def prove(self, t0: bytes) -> bytes:
        """Give Evidence.enrol_proof: whoever typed this code wants this exchange."""
        return self._private.sign(_proved(t0))

    def __repr__(self) -> str:
        """Show no secret."""
        return f"EnrolCode(..., {self.fingerprint.hex()})"


def fingerprint(verifier_key: bytes) -> bytes:
    """Name a verifier's key within a code: the first 10 bytes of its SHA-256; the first 8 are its key id."""
    return hashlib.sha256(verifier_key).digest()[:FINGERPRINT_SIZE]


def verify_proof(public_key: bytes, t0: bytes, proof: bytes) -> bytes:
    """Return the proof of the code behind ``public_key`` for this exchange, or raise NotAuthentic (``enrol.proof``)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(proof, _proved(t0))
    except (InvalidSignature, ValueError):
        raise NotAuthentic(
            "The proof of a code does not verify.",
            code="enrol.proof",
            expected="a proof by the code that was made for this VM, over this exchange",
            found="another",
        ) from None
    return proof


def _proved(t0: bytes) -> bytes:
    return LABEL_PROOF + b"\x00" + t0


def _labelled(label: bytes, data: bytes) -> bytes:
    return hashlib.sha256(label + b"\x00" + data).digest()


def _wrong(expected: str, found: str) -> UsageError:
    return UsageError(
        "This is no code for an enrolment.",
        code="enrol.code",
        expected=expected,
        found=found,
        todo="`kagimori-verifier vm code VM` makes a new one.",
    )
