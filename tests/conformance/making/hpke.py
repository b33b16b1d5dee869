"""A sender of HPKE without chance: RFC 9180 sections 4 and 5.1 with hashlib's HMAC, on a published encapsulation.

HPKE draws fresh randomness for every message, so a recipient cannot be tested against a fixed ciphertext unless somebody
fixed it. Here that is the published vector of MLKEM768-X25519 (../published/hpke.json): its recipient, its ``enc`` and
its shared secret, under our suite, our info and our plaintext.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PUBLISHED: Final = json.loads(
    (Path(__file__).parent.parent / "published" / "hpke.json").read_text(encoding="utf-8")
)
HYBRID: Final = {
    name: bytes.fromhex(PUBLISHED["MLKEM768-X25519"][name])
    for name in ("skRm", "pkRm", "enc", "shared_secret")
}
SUITE: Final = (0x647A, 0x0001, 0x0002)
"""MLKEM768-X25519, HKDF-SHA256, AES-256-GCM."""

RECIPIENT: Final = hashlib.shake_256(HYBRID["skRm"]).digest(96)
"""The recipient's private key, as HPKE-PQ expands it: 64 bytes of ML-KEM-768 seed, 32 bytes of X25519."""
RECIPIENT_PUBLIC: Final = HYBRID["pkRm"]
KEY_SIZE: Final = 32
NONCE_SIZE: Final = 12


def extract(salt: bytes, material: bytes) -> bytes:
    """HKDF-Extract with SHA-256."""
    return hmac.digest(salt or bytes(32), material, "sha256")


def expand(secret: bytes, info: bytes, size: int) -> bytes:
    """HKDF-Expand with SHA-256."""
    block, output = b"", b""
    number = 0
    while len(output) < size:
        number += 1
        block = hmac.digest(secret, block + info + bytes([number]), "sha256")
        output += block
    return output[:size]


def key_schedule(suite: tuple[int, int, int], shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 9180 section 5.1 in base mode: gives key (of 32 bytes) and base_nonce."""
    suite_id = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in suite)

    def labelled_extract(salt: bytes, label: bytes, material: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + suite_id + label + material)

    def labelled_expand(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return expand(secret, size.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + context, size)

    context = b"\x00" + labelled_extract(b"", b"psk_id_hash", b"") + labelled_extract(b"", b"info_hash", info)
    secret = labelled_extract(shared_secret, b"secret", b"")
    key = labelled_expand(secret, b"key", context, KEY_SIZE)
    return key, labelled_expand(secret, b"base_nonce", context, NONCE_SIZE)


def public_key(private: bytes) -> bytes:
    """Give the public key of 64 bytes of ML-KEM-768 seed and 32 bytes of X25519: both public keys, in that order."""
    mlkem = MLKEM768PrivateKey.from_seed_bytes(private[:-KEY_SIZE]).public_key()
    x25519 = X25519PrivateKey.from_private_bytes(private[-KEY_SIZE:]).public_key()
    return mlkem.public_bytes_raw() + x25519.public_bytes_raw()


def seal(info: bytes, plaintext: bytes) -> bytes:
    """Seal to the published recipient: ``enc``, then the ciphertext."""
    key, nonce = key_schedule(SUITE, HYBRID["shared_secret"], info)
    return HYBRID["enc"] + AESGCM(key).encrypt(nonce, plaintext, b"")
