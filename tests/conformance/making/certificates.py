"""Vectors of the host's certificate table: AMD 56421 (GHCB), section 4.1.8.1."""

from __future__ import annotations

import hashlib
import struct
import uuid
from base64 import encodebytes
from collections.abc import Iterator
from typing import Final

from tests.conformance.making.vector import Vector

NAMES: Final = {
    "ARK": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "ASK": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "VCEK": "63da758d-e664-4564-adc5-f4b93be8accd",
    "VLEK": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "CRL": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
}
UNKNOWN: Final = "00112233-4455-6677-8899-aabbccddeeff"
ENTRY_SIZE: Final = 24
END: Final = bytes(ENTRY_SIZE)
SHORT: Final = b"\x30\x03\x02\x01\x05"
LONG: Final = b"\x30\x82\x01\x2c" + bytes(300)
PEM: Final = b"-----BEGIN CERTIFICATE-----\n" + encodebytes(LONG) + b"-----END CERTIFICATE-----\n"


def row(guid: str, offset: int, length: int) -> bytes:
    """Write one entry: GUID in the order of RFC 4122, then offset and length, little-endian."""
    return uuid.UUID(guid).bytes + struct.pack("<II", offset, length)


def table(*payloads: tuple[str, bytes]) -> bytes:
    """Write a table with its payloads one after another."""
    at, rows = (len(payloads) + 1) * ENTRY_SIZE, b""
    for guid, payload in payloads:
        rows += row(guid, at, len(payload))
        at += len(payload)
    return rows + END + b"".join(payload for _, payload in payloads)


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    every = [(guid, LONG if name == "ARK" else SHORT) for name, guid in NAMES.items()]
    yield _good("all-kinds", "Every entry that AMD names.", table(*every), every)
    mixed = [(NAMES["VCEK"], PEM), (UNKNOWN, SHORT)]
    yield _good("pem-and-unknown", "PEM, and an entry that nobody knows.", table(*mixed), mixed)
    padded = [(NAMES["VLEK"], SHORT + bytes(9))]
    yield _good("padded-payload", "Zeros behind a certificate are padding.", table(*padded), padded)
    whole = [(NAMES["VCEK"], SHORT)]
    yield _good("padded-table", "A host pads a table to whole pages.", table(*whole) + bytes(400), whole)
    yield _good("nothing", "A host without certificates.", b"", [])
    yield _good("zeros", "A page of zeros.", bytes(100), [])
    vcek = NAMES["VCEK"]
    at = 2 * ENTRY_SIZE
    for name, about, raw in (
        ("no-end", "No entry of zeros ends it.", row(vcek, ENTRY_SIZE, 5) + SHORT),
        ("into-the-entries", "A payload lies within the entries.", row(vcek, ENTRY_SIZE, 5) + END + SHORT),
        ("outside", "A payload ends beyond the table.", row(vcek, at, 6) + END + SHORT),
        (
            "far-outside",
            "Offset and length overflow 32 bits.",
            row(vcek, 0xFFFFFFFF, 0xFFFFFFFF) + END + SHORT,
        ),
        ("empty-payload", "A payload of no bytes.", row(vcek, at, 0) + END + SHORT),
        ("twice", "One GUID twice.", table((vcek, SHORT), (vcek, LONG))),
        (
            "too-many",
            "More than 64 entries.",
            table(*((str(uuid.UUID(int=n + 1)), b"\1") for n in range(65))),
        ),
        ("cut", "It ends within an entry.", row(vcek, at, 5)[:-1]),
    ):
        yield Vector(f"certificates/{name}", about, {"raw.bin": raw}, fails="certificates.layout")
    for name, about, payload in (
        ("not-der", "A payload that is neither DER nor PEM.", b"certificate"),
        ("der-longer", "Something follows the certificate.", SHORT + b"\1"),
        ("der-cut", "A certificate's end is missing.", SHORT[:-1]),
        ("pem-without-end", "A PEM block's end is missing.", PEM[:40]),
        ("pem-not-base64", "A PEM block of something else.", PEM.replace(b"MIIB", b"MI*B")),
    ):
        raw = table((vcek, payload))
        yield Vector(f"certificates/{name}", about, {"raw.bin": raw}, fails="certificates.layout")


def _good(name: str, about: str, raw: bytes, payloads: list[tuple[str, bytes]]) -> Vector:
    names = {guid: known for known, guid in NAMES.items()}
    entries = [
        {
            "name": names.get(guid, guid),
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            "der_sha256": hashlib.sha256(
                LONG if payload == PEM else payload.rstrip(b"\0") or payload
            ).hexdigest(),
        }
        for guid, payload in payloads
    ]
    for entry, (_, payload) in zip(entries, payloads, strict=True):
        if payload == LONG:  # its own zeros are no padding
            entry["der_sha256"] = hashlib.sha256(LONG).hexdigest()
    return Vector(f"certificates/{name}", about, {"raw.bin": raw}, entries)
