"""The certificate table that a host hands to its guest (AMD 56421 (GHCB), section 4.1.8.1).

An array of {GUID, u32 offset, u32 length}, ended by an entry of zeros; offsets count from the table's start.
GUIDs are stored in RFC 4122 byte order (unlike everywhere else in SNP). A payload is DER or PEM; hosts pad
with zeros as they like. All of it is the host's word: certificates found here are hints, to be chained to a
pinned root.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from dataclasses import dataclass
from typing import Final

from kagimori_protocol.errors import Malformed

ARK: Final = uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
ASK: Final = uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
"""ASK on hosts that sign with a VCEK, ASVK on hosts that sign with a VLEK."""
VCEK: Final = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK: Final = uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
CRL: Final = uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

NAMES: Final[dict[uuid.UUID, str]] = {ARK: "ARK", ASK: "ASK", VCEK: "VCEK", VLEK: "VLEK", CRL: "CRL"}

MAX_TABLE_SIZE: Final = 0x10000
"""Linux gives at most 16 KiB (SEV_FW_BLOB_MAX_SIZE); four times that leaves room for what comes."""
MAX_ENTRIES: Final = 64
ENTRY_SIZE: Final = 24


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its GUID and the payload as stored (PEM or DER)."""

    guid: uuid.UUID
    payload: bytes

    @property
    def name(self) -> str:
        """AMD's name of the entry, or the GUID where it is unknown."""
        return NAMES.get(self.guid, str(self.guid))

    def der(self) -> bytes:
        """Give the payload as DER; from PEM, the first block. Raises Malformed."""
        return to_der(self.payload)


def parse(table: bytes) -> tuple[Entry, ...]:
    """Read a table by its entries, not by its length; no table at all (empty, or all zeros) has none.

    Unknown GUIDs are kept: hosts may add what they like. Raises Malformed for a table without an end, an
    entry that points outside or into the entries, or a GUID that comes twice.
    """
    if len(table) > MAX_TABLE_SIZE:
        raise _broken(f"at most {MAX_TABLE_SIZE} bytes", f"{len(table)} bytes")
    if not any(table):
        return ()
    rows = _rows(table)
    first_payload = (len(rows) + 1) * ENTRY_SIZE
    entries: dict[uuid.UUID, Entry] = {}
    for guid, offset, length in rows:
        if offset < first_payload or length == 0 or offset + length > len(table):
            raise _broken(
                f"a payload between offsets {first_payload} and {len(table)}",
                f"{NAMES.get(guid, guid)} at {offset}, {length} bytes",
            )
        if guid in entries:
            raise _broken("each GUID once", f"{NAMES.get(guid, guid)} twice")
        entries[guid] = Entry(guid, bytes(table[offset : offset + length]))
    return tuple(entries.values())


def to_der(payload: bytes) -> bytes:
    """Turn one certificate, PEM or DER, into DER; zeros after it are padding. Raises Malformed."""
    begin = payload.find(b"-----BEGIN ")
    if begin < 0:
        return _unpadded_der(payload)
    body = payload.find(b"-----", begin + len(b"-----BEGIN "))
    end = payload.find(b"-----END ", begin)
    if body < 0 or end < body:
        raise _broken("a whole PEM block", f"{payload[:24]!r}...")
    try:
        der = base64.b64decode(b"".join(payload[body + 5 : end].split()), validate=True)
    except binascii.Error as error:
        raise _broken("base64 inside a PEM block", str(error)) from error
    return _unpadded_der(der)


def _rows(table: bytes) -> list[tuple[uuid.UUID, int, int]]:
    """Collect the entries up to the one of zeros."""
    rows: list[tuple[uuid.UUID, int, int]] = []
    for at in range(0, len(table) - ENTRY_SIZE + 1, ENTRY_SIZE):
        row = table[at : at + ENTRY_SIZE]
        if not any(row):
            return rows
        if len(rows) == MAX_ENTRIES:
            raise _broken(f"at most {MAX_ENTRIES} entries", "more")
        rows.append(
            (
                uuid.UUID(bytes=bytes(row[:16])),
                int.from_bytes(row[16:20], "little"),
                int.from_bytes(row[20:24], "little"),
            )
        )
    raise _broken("an entry of zeros at the end", "none")


def _unpadded_der(payload: bytes) -> bytes:
    """Cut a DER SEQUENCE at its own length; only zeros may follow."""
    if len(payload) < 4 or payload[0] != 0x30:  # noqa: PLR2004 - X.690: SEQUENCE, and the shortest long form
        raise _broken("a DER certificate (SEQUENCE)", payload[:4].hex() or "nothing")
    size = payload[1]
    head = 2
    if size & 0x80:
        head += size & 0x7F
        size = int.from_bytes(payload[2:head], "big")
    end = head + size
    if end > len(payload) or any(payload[end:]):
        raise _broken(
            "one DER certificate, then zeros at most", f"{end} bytes announced, {len(payload)} there"
        )
    return bytes(payload[:end])


def _broken(expected: str, found: str) -> Malformed:
    return Malformed(
        "A certificate table is broken.",
        code="certificates.layout",
        expected=expected,
        found=found,
        todo="The host supplies this table; import the certificates with `kagimori-verifier endorsements import`.",
    )
