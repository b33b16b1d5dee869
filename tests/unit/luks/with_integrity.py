"""A volume with integrity, made without device-mapper: cryptsetup formats one only where it can map it.

Header and keyslot are what `cryptsetup luksFormat --integrity hmac-sha256` writes (``tests/boot/integrity.py`` lets it, in a
machine, and compares); what its data area would hold is not there.

Source: LUKS2 On-Disk Format Specification 1.1.1, section 3; LUKS1 On-Disk Format Specification 1.2.3, section 2.4 (AF splitter).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tests.conformance.making.header import Json
from tests.unit.luks.headers import edited, header

INTEGRITY: Final[Json] = {
    "type": "hmac(sha256)",
    "journal_encryption": "none",
    "journal_integrity": "none",
}
KEY_SIZE: Final = 96
AREA: Final = (32768, 385024)
_STRIPES: Final = 4000
_ITERATIONS: Final = 1000
_SECTOR: Final = 512


def with_integrity(one: Json) -> None:
    """Make of a header without integrity what cryptsetup would have written with it."""
    one["segments"]["0"]["integrity"] = dict(INTEGRITY)
    for keyslot in one["keyslots"].values():
        keyslot["key_size"] = KEY_SIZE
        keyslot["area"]["size"] = str(AREA[1])


def document(*edits: Callable[[Json], object]) -> Json:
    """Give the honest JSON of a volume with integrity, with changes."""

    def edit(one: Json) -> None:
        for each in (with_integrity, *edits):
            each(one)

    return edited(edit)


def make(image: Path, passphrase: bytes, uuid: str, size: int = 17 << 20) -> None:
    """Make one that the passphrase opens."""
    salts = [os.urandom(32) for _ in range(2)]
    volume_key = os.urandom(KEY_SIZE)
    derived = hashlib.pbkdf2_hmac("sha256", passphrase, salts[0], _ITERATIONS, 64)
    digest = hashlib.pbkdf2_hmac("sha256", volume_key, salts[1], _ITERATIONS, 32)
    made = document(
        lambda one: one["keyslots"]["0"].update(
            kdf={"type": "pbkdf2", "hash": "sha256", "iterations": _ITERATIONS, "salt": _base64(salts[0])}
        ),
        lambda one: one["digests"]["0"].update(salt=_base64(salts[1]), digest=_base64(digest)),
    )
    copies = header(json.dumps(made).encode(), uuid=uuid.encode())
    with image.open("wb") as file:
        file.truncate(size)
        file.write(copies)
        file.seek(AREA[0])
        file.write(_encrypted(derived, _split(volume_key)))


def _split(key: bytes) -> bytes:
    """Split a key into stripes of which all are needed."""
    diffused = bytes(len(key))
    stripes = b""
    for _ in range(_STRIPES - 1):
        stripe = os.urandom(len(key))
        stripes += stripe
        diffused = _diffused(_xor(diffused, stripe))
    return stripes + _xor(diffused, key)


def _diffused(block: bytes) -> bytes:
    size = hashlib.sha256().digest_size
    parts = [block[at : at + size] for at in range(0, len(block), size)]
    return b"".join(
        hashlib.sha256(struct.pack(">I", number) + part).digest() for number, part in enumerate(parts)
    )


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(len(one))


def _encrypted(key: bytes, data: bytes) -> bytes:
    """Encrypt by aes-xts-plain64, sector by sector from 0."""
    done = b""
    for number, at in enumerate(range(0, len(data), _SECTOR)):
        xts = Cipher(algorithms.AES(key), modes.XTS(number.to_bytes(16, "little"))).encryptor()
        done += xts.update(data[at : at + _SECTOR]) + xts.finalize()
    return done


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
