"""LUKS2 headers made from nothing, as a host would make them: whatever they say, their checksums are right.

Source: LUKS2 On-Disk Format Specification 1.1.1, figure 2 (binary header) and section 3 (JSON area).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable

from tests.conformance.making.header import Json, sealed

from kagimori_protocol.luks2_allowed import check
from kagimori_protocol.luks2_layout import BINARY_SIZE, LuksHeader, parse

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
KEY = bytes(range(32))
SIZE = 0x4000
DEVICE_SIZE = 64 << 20
SALT = base64.b64encode(bytes(range(32))).decode()
DIGEST = base64.b64encode(bytes(range(32, 64))).decode()

HONEST: Json = {
    "keyslots": {
        "0": {
            "type": "luks2",
            "key_size": 64,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {
                "type": "raw",
                "offset": "32768",
                "size": "258048",
                "encryption": "aes-xts-plain64",
                "key_size": 64,
            },
            "kdf": {"type": "argon2id", "time": 4, "memory": 1048576, "cpus": 4, "salt": SALT},
        }
    },
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": "16777216",
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": "aes-xts-plain64",
            "sector_size": 512,
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2",
            "keyslots": ["0"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": 1000,
            "salt": SALT,
            "digest": DIGEST,
        }
    },
    "config": {"json_size": "12288", "keyslots_size": "16744448"},
}
"""What cryptsetup writes for a new volume whose header has the smallest size."""


def summed(copy: bytearray) -> bytes:
    """Put the right checksum into one copy of a header."""
    copy[448:512] = bytes(64)
    copy[448:480] = hashlib.sha256(copy).digest()
    return bytes(copy)


def one_copy(
    text: bytes, *, secondary: bool, size: int = SIZE, seqid: int = 3, uuid: bytes = UUID.encode()
) -> bytearray:
    """Make one copy of a header, but for its checksum."""
    copy = bytearray(size)
    copy[0:6] = b"SKUL\xba\xbe" if secondary else b"LUKS\xba\xbe"
    copy[6:8] = (2).to_bytes(2)
    copy[8:16] = size.to_bytes(8)
    copy[16:24] = seqid.to_bytes(8)
    copy[72:78] = b"sha256"
    copy[104:168] = bytes([secondary + 1]) * 64  # each copy has its own salt
    copy[168 : 168 + len(uuid)] = uuid
    copy[256:264] = (size if secondary else 0).to_bytes(8)
    text = text[: size - BINARY_SIZE]
    copy[BINARY_SIZE : BINARY_SIZE + len(text)] = text
    return copy


def header(text: bytes, size: int = SIZE, uuid: bytes = UUID.encode()) -> bytes:
    """Make both copies of a header around a JSON area."""
    return b"".join(
        summed(one_copy(text, secondary=secondary, size=size, uuid=uuid)) for secondary in (False, True)
    )


def edited(edit: Callable[[Json], object]) -> Json:
    """Give the honest JSON with a change."""
    document: Json = json.loads(json.dumps(HONEST))
    edit(document)
    return document


def config(**changes: object) -> Callable[[Json], object]:
    """Change members of the JSON's config."""
    return lambda one: one["config"].update(changes)


def segment(**changes: object) -> Callable[[Json], object]:
    """Change members of the JSON's one segment."""
    return lambda one: one["segments"]["0"].update(changes)


def judged(copy: bytes, offset: int = 0, device_size: int = DEVICE_SIZE) -> LuksHeader:
    """Take one copy apart, and ask whether what it says is allowed."""
    return check(parse(copy, offset), device_size)


def reader(raw: bytes) -> Callable[[int, int], bytes]:
    """Give what reads of a device that begins with these bytes, and ends with them."""
    return lambda offset, size: raw[offset : offset + size]


def flip(raw: bytes, at: int, value: bytes, *, resum: bool = True) -> bytes:
    """Overwrite bytes in the copy where they are; make its checksum right again unless told otherwise."""
    copies = [bytearray(raw[:SIZE]), bytearray(raw[SIZE:])]
    copy = copies[at // SIZE]
    copy[at % SIZE : at % SIZE + len(value)] = value
    return b"".join(summed(one) if resum and one is copy else bytes(one) for one in copies)


TEXT = json.dumps(HONEST).encode()
RAW = header(TEXT)
SEALED = sealed(HONEST, "0", KEY)
"""The same, with the token of the unlock key."""
SEALED_RAW = header(json.dumps(SEALED).encode())
