"""An authenticated box under a long-lived key: for what rests in the database and for session tokens.

::

    box = salt (32 random bytes) || AES-256-GCM(key = HKDF-SHA256(long-lived key, salt, info = label), plaintext, aad)

Every box has a key of its own, so its nonce can be zero and no counter or birthday bound has to be watched. A label
keeps the uses apart: a box made for one cannot be opened for another.
"""

from __future__ import annotations

import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kagimori_protocol.errors import OperatorError

KEY_SIZE: Final = 32
SALT_SIZE: Final = 32
_NONCE: Final = bytes(12)
_TAG_SIZE: Final = 16


class BoxBroken(OperatorError):
    """A box does not open: another key, another label, other associated data, or other bytes."""

    default_code = "box.broken"


def seal(key: bytes, label: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """Put ``plaintext`` into a box that also vouches for ``aad``. ``key`` has 32 bytes. Random."""
    salt = secrets.token_bytes(SALT_SIZE)
    return salt + _cipher(key, label, salt).encrypt(_NONCE, plaintext, aad)


def unseal(key: bytes, label: bytes, box: bytes, aad: bytes) -> bytes:
    """Open a box. Raises BoxBroken, which tells nothing of its content."""
    salt, sealed = box[:SALT_SIZE], box[SALT_SIZE:]
    if len(sealed) >= _TAG_SIZE:
        try:
            return _cipher(key, label, salt).decrypt(_NONCE, sealed, aad)
        except InvalidTag:
            pass
    raise BoxBroken(
        "A sealed box does not open.",
        expected=f"a box made for {label.decode()} under this key",
        found=f"{len(box)} bytes that are none",
    )


def _cipher(key: bytes, label: bytes, salt: bytes) -> AESGCM:
    if len(key) != KEY_SIZE:
        raise BoxBroken("A key has the wrong size.", expected=f"{KEY_SIZE} bytes", found=f"{len(key)} bytes")
    return AESGCM(HKDF(hashes.SHA256(), KEY_SIZE, salt, label).derive(key))
