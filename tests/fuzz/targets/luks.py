"""LUKS2 headers: as bytes, as a JSON area, and as binary fields, with checksums made right as a host would make them.

The first byte chooses. A JSON area is written into both copies; fields come with two bytes of offset and are written
into both copies, or into one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import documents, parts
from tests.fuzz.target import Mutate, Target
from tests.unit.luks import with_integrity
from tests.unit.luks.headers import (
    DEVICE_SIZE,
    KEY,
    RAW,
    SEALED,
    SEALED_RAW,
    SIZE,
    TEXT,
    UUID,
    config,
    edited,
    header,
    one_copy,
    reader,
    summed,
)

from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_allowed import check
from kagimori_protocol.luks2_guard import choose
from kagimori_protocol.luks2_layout import BINARY_SIZE, MAX_JSON, SIZES, LuksHeader, copies, probe

BYTES, AREA, BOTH, ONE = range(4)
SEALED_TEXT = json.dumps(SEALED).encode()
WHAT_OPENS = choose(reader(SEALED_RAW), DEVICE_SIZE, UUID, KEY, 1).memory
"""What cryptsetup gets of the one header that was sealed by this key."""


def honest(size: int) -> dict[str, Any]:
    """Give the JSON of a new volume whose header has another size."""
    document = edited(config(json_size=str(size - BINARY_SIZE)))
    document["segments"]["0"]["offset"] = str(32 << 20)
    document["keyslots"]["0"]["area"]["offset"] = str(2 * size)
    return document


def patched(data: bytes, *, both: bool) -> bytes:
    """Make a header with bytes written at a place of both copies, or of the secondary alone."""
    at, new = int.from_bytes(data[:2], "big") % SIZE, data[2:]
    made_copies = []
    for secondary in (False, True):
        made = one_copy(SEALED_TEXT, secondary=secondary)
        if both or secondary:
            made[at : at + len(new)] = new[: SIZE - at]
        made_copies.append(summed(made))
    return b"".join(made_copies)


def run(data: bytes) -> None:
    """Read a header and ask whether it may be used."""
    choice, raw = workshop.head(data)
    match choice % 4:
        case 0:
            whole = raw
        case 1:
            whole = header(raw, SIZES[choice >> 2 & 1])
        case 2:
            whole = patched(raw, both=True)
        case _:
            whole = patched(raw, both=False)
    read = reader(whole)
    probe(read)
    refused: list[DiskError] = []
    for copy in copies(read):
        try:
            if isinstance(copy, DiskError):
                raise copy
            check_allowed(check(copy, DEVICE_SIZE), whole)
        except DiskError as error:
            refused.append(error)
    with suppress(DiskError):
        assert choose(read, DEVICE_SIZE, UUID, KEY, 1).memory == WHAT_OPENS
    if refused:
        raise refused[0]


def check_allowed(read: LuksHeader, whole: bytes) -> None:
    """A header that is used has one encrypted segment, no way round the key, and reads the same to everyone."""
    document, size = read.json, read.size
    for name in (read.label, read.subsystem, read.uuid):
        assert name.isascii()
        assert name.isprintable() or not name
    text = whole[read.offset + BINARY_SIZE : read.offset + size].rstrip(b"\0")
    assert json.loads(text) == document
    assert list(document["segments"]) == ["0"]
    segment = document["segments"]["0"]
    assert segment["type"] == "crypt"
    assert segment["encryption"] == "aes-xts-plain64"
    assert int(segment["offset"]) >= 2 * size
    assert all(token["type"] == "kagimori-header" for token in document["tokens"].values())
    assert not document["config"].get("flags")
    assert not document["config"].get("requirements")
    assert segment.get("integrity", with_integrity.INTEGRITY) == with_integrity.INTEGRITY
    for keyslot in document["keyslots"].values():
        assert keyslot["type"] == "luks2"
        assert keyslot["area"]["encryption"] == "aes-xts-plain64"
        assert keyslot["area"]["key_size"] == 64
        assert keyslot["key_size"] == (96 if "integrity" in segment else 64)
    assert sorted(document["digests"]["0"]["keyslots"]) == sorted(document["keyslots"])


def seeds() -> Iterator[bytes]:
    """Give an honest header as bytes, as JSON in two sizes, and with a label written into both copies."""
    yield bytes([BYTES]) + RAW
    yield bytes([AREA]) + TEXT
    yield bytes([BYTES]) + SEALED_RAW
    yield bytes([AREA]) + SEALED_TEXT
    yield bytes([AREA | 4]) + json.dumps(honest(SIZES[1])).encode()
    yield bytes([BOTH]) + (24).to_bytes(2, "big") + b"root disk"
    yield bytes([BOTH]) + (208).to_bytes(2, "big") + b"subsystem"
    yield bytes([ONE]) + (104).to_bytes(2, "big") + bytes(range(64))  # each copy has its own salt
    second = json.loads(TEXT)
    slots = second["keyslots"]
    slots["1"] = slots["0"] | {
        "priority": 2,
        "kdf": {
            "type": "pbkdf2",
            "salt": slots["0"]["kdf"]["salt"],
            "hash": "sha512",
            "iterations": 1,
        },
        "area": slots["0"]["area"] | {"offset": "290816"},
    }
    second["digests"]["0"]["keyslots"] = ["0", "1"]
    yield bytes([AREA]) + json.dumps(second).encode()
    yield bytes([AREA]) + json.dumps(with_integrity.document()).encode()


def worst() -> Iterator[tuple[str, bytes]]:
    """Give headers of the largest size, with as much JSON as is read, of what makes JSON parsers work, and with more."""
    size = SIZES[-1]
    for what, text in dear(MAX_JSON).items():
        yield what, bytes([BYTES]) + header(text, size)
    area = size - BINARY_SIZE
    yield "more than is read", bytes([BYTES]) + header(dear(area - 1)["empty objects"], size)
    yield "no zero at all", bytes([BYTES]) + header(b"x" * area, size)
    yield "bytes at the very end", bytes([BYTES]) + header(b"{}".ljust(area - 1, b"\0") + b"x", size)


def dear(room: int) -> dict[str, bytes]:
    """Give JSON of ``room`` bytes, or a few less, that costs a parser most in one way or another."""
    return {
        "empty lists": b"[" + b"[]," * (room // 3 - 1) + b"[]]",
        "empty objects": b"[" + b"{}," * (room // 3 - 1) + b"{}]",
        "small objects": b"[" + b'{"":0},' * (room // 7 - 1) + b"0]",
        "numbers": b"[" + b"0," * (room // 2 - 1) + b"0]",
        "large numbers": b"[" + b"9223372036854775807," * (room // 20 - 1) + b"0]",
        "names": b"{" + b",".join(b'"%06x":0' % i for i in range((room - 20) // 11)) + b"}",
        "one name again and again": b"{" + b'"":0,' * (room // 5 - 1) + b'"":0}',
        "lists in lists": b"[" * room,
        "one text of escapes": b'"' + b"\\u0041" * (room // 6 - 1) + b'"',
        "digits": b"9" * room,
    }


def mutate_header(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change the JSON as JSON, a field's place or bytes, or any bytes of a whole header."""
    choice, body = (data[0], data[1:]) if data else (AREA, b"")
    if chance.random() < 0.03:
        choice = chance.randrange(8)
    if choice % 4 == AREA:
        return bytes([choice]) + documents.mutate_document(body, limit - 1, chance, mutate)
    if choice % 4 != BYTES and chance.random() < 0.7:
        offset = chance.choice((0, 6, 8, 16, 24, 72, 104, 168, 208, 256, 264, 448, 512, 4095, 4096))
        with suppress(IndexError):
            return bytes([choice]) + offset.to_bytes(2, "big") + parts.part(body[2:], 64, chance, mutate)
    return bytes([choice]) + mutate(body, limit - 1)


TARGET = Target(
    name="luks",
    about="LUKS2 headers: binary fields, JSON, and what a header may say",
    bound=BOUNDS["luks"],
    refusals=(DiskError,),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=mutate_header,
    covers=(
        "kagimori_protocol.luks2_layout",
        "kagimori_protocol.luks2_allowed",
        "kagimori_protocol.luks2_guard",
    ),
)
