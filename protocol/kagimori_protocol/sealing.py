"""The two layers around an answer (PROTOCOL.md section 5), and the MAC that confirms it.

Outer layer: HPKE (RFC 9180, base mode) with ML-KEM-768 + X25519, HKDF-SHA256 and AES-256-GCM: only the
agent's process opens it, and traffic recorded today does not open to a quantum computer later. Inner layer,
where there is a TPM: AES-256-GCM under S, which only that TPM gives out. No suite is negotiated.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_protocol.messages import HPKE_PUBLIC_SIZE
from kagimori_protocol.transcript import LABEL_ANSWER

if TYPE_CHECKING:
    from collections.abc import Sequence

LABEL_HPKE_KEY: Final = b"kagimori/1/hpke-key"
LABEL_INNER: Final = b"kagimori/1/inner"
LABEL_CONFIRM: Final = b"kagimori/1/confirm"

SECRET_SIZE: Final = 32
"""Size of S, of a confirm_key, and of an unlock key, in bytes."""

_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MLKEM_SEED_SIZE: Final = 64
_X25519_SIZE: Final = 32
_MLKEM_PUBLIC_SIZE: Final = HPKE_PUBLIC_SIZE - _X25519_SIZE
_SMALLEST_ENTROPY: Final = 32
_NONCE: Final = bytes(12)
"""Zero is safe: S is fresh for every answer, so the key that comes from it encrypts once."""


class ResponseKey:
    """The agent's HPKE key pair for one exchange; it lives in the agent's memory only and cannot be exported."""

    __slots__ = ("_private", "public")

    def __init__(self, entropy: Sequence[bytes]) -> None:
        """Make the pair from several sources; it is as good as the best of them.

        Raises Malformed if no source gives at least 32 bytes.
        """
        if max(map(len, entropy), default=0) < _SMALLEST_ENTROPY:
            raise Malformed(
                "There is too little randomness for a key.",
                code="sealing.entropy",
                expected=f"a source of at least {_SMALLEST_ENTROPY} bytes",
                found=f"{max(map(len, entropy), default=0)} bytes",
            )
        sources = b"".join(len(source).to_bytes(4, "big") + source for source in entropy)
        seed = HKDF(hashes.SHA512(), _MLKEM_SEED_SIZE + _X25519_SIZE, None, LABEL_HPKE_KEY).derive(sources)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:_MLKEM_SEED_SIZE])
        x25519 = X25519PrivateKey.from_private_bytes(seed[_MLKEM_SEED_SIZE:])
        self._private: MLKEM768X25519PrivateKey | None = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public: bytes = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, binding: bytes) -> bytes:
        """Open the outer layer of an answer bound to ``binding`` (TH). Raises NotAuthentic."""
        if self._private is None:
            raise NotAuthentic("The key of this exchange is gone already.", code="answer.hpke")
        try:
            return _SUITE.decrypt(sealed, self._private, info=_info(binding))
        except (InvalidTag, ValueError):
            raise _not_for_us("answer.hpke", "an answer sealed to this exchange's key and evidence") from None

    def forget(self) -> None:
        """Drop the private key; OpenSSL clears it as the last reference goes."""
        self._private = None

    def __repr__(self) -> str:
        """Show no key."""
        return "ResponseKey(...)"


def seal(public_key: bytes, binding: bytes, payload: bytes, secret: bytes | None) -> bytes:
    """Put ``payload`` into both layers; without a TPM (``secret`` is None) into the outer one only.

    ``public_key`` is a Hello's hpke_public_key, ``binding`` is TH. Raises Malformed for a key that is none.
    Random.
    """
    try:
        recipient = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_SIZE]),
            X25519PublicKey.from_public_bytes(public_key[_MLKEM_PUBLIC_SIZE:]),
        )
        inner = payload if secret is None else _inner(secret, binding).encrypt(_NONCE, payload, binding)
        return _SUITE.encrypt(inner, recipient, info=_info(binding))
    except (InvalidTag, ValueError) as error:
        raise Malformed(
            "An hpke_public_key is none.",
            code="hello.hpke-key",
            expected="an ML-KEM-768 encapsulation key, then an X25519 public key",
            found=str(error) or "bytes that the suite refuses",
        ) from None


def open_inner(inner: bytes, binding: bytes, secret: bytes) -> bytes:
    """Open the inner layer with S. Raises NotAuthentic."""
    try:
        return _inner(secret, binding).decrypt(_NONCE, inner, binding)
    except (InvalidTag, ValueError):
        raise _not_for_us("answer.inner", "an inner layer under the S of this answer's credential") from None


def confirm_mac(confirm_key: bytes, binding: bytes, outcome: str) -> bytes:
    """Give Confirm.mac, which shows that both layers of the answer bound to ``binding`` were opened."""
    message = LABEL_CONFIRM + b"\x00" + binding + outcome.encode()
    return hmac.new(confirm_key, message, hashlib.sha256).digest()


def _inner(secret: bytes, binding: bytes) -> AESGCM:
    if len(secret) != SECRET_SIZE:
        raise _not_for_us("answer.inner", f"a secret of {SECRET_SIZE} bytes")
    return AESGCM(HKDF(hashes.SHA256(), 32, binding, LABEL_INNER).derive(secret))


def _info(binding: bytes) -> bytes:
    return LABEL_ANSWER + b"\x00" + binding


def _not_for_us(code: str, expected: str) -> NotAuthentic:
    return NotAuthentic("An answer does not open.", code=code, expected=expected, found="something else")
