"""The certificate table that the host hands out: as every part of the verifier takes it apart."""

from __future__ import annotations

import functools
import random
import ssl
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate, Target
from tests.fuzz.targets.report import chip, trusted

from kagimori_protocol import certificate_table
from kagimori_protocol.certificate_table import ENTRY_SIZE, MAX_ENTRIES, MAX_TABLE_SIZE, NAMES
from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_simulator.machine import pack_certificate_table
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.snp import verify_report

NOWHERE = Path("/nonexistent")
"""A directory of endorsements that has none, so that only the table's count."""


START = (MAX_ENTRIES + 1) * ENTRY_SIZE
"""Where the payloads of a full table start."""


@functools.cache
def report() -> bytes:
    """Give the report that the tables are handed out with."""
    return chip("Milan", "vcek").own


def run(data: bytes) -> None:
    """Read a table, each of its payloads, and look for the chain of a genuine report in it."""
    entries = certificate_table.parse(data)
    assert len({entry.guid for entry in entries}) == len(entries) <= MAX_ENTRIES
    for entry in entries:
        assert entry.payload
        assert entry.payload in data
        assert entry.name
        with suppress(Malformed):
            check_der(entry.payload, entry.der())
    found = EndorsementDirectory(NOWHERE).find(report(), data)
    assert len(found.certificates) + len(found.revocation_lists) <= len(entries)
    trail = Trail()
    with suppress(NotAuthentic):
        verify_report(trail, report(), found, trusted())
        assert not trail.failed
        # Nothing that a host adds makes a report say anything else.
        assert trail.checks[-1].id == "report.signature"


def check_der(payload: bytes, der: bytes) -> None:
    """What is read as DER is a SEQUENCE, to its end, and read again it is the same."""
    assert der[0] == 0x30
    assert certificate_table.to_der(der) == der
    assert certificate_table.to_der(der + bytes(5)) == der
    if b"-----" not in payload:
        assert payload.startswith(der)
        assert not any(payload[len(der) :])


def seeds() -> Iterator[bytes]:
    """Give tables of DER and of PEM, with a revocation list, padded, and with an entry that nobody knows."""
    for product, signer in (("Milan", "vcek"), ("Milan", "vlek"), ("Turin", "vcek")):
        one = chip(product, signer)
        vek, intermediate, ark = one.endorsements.certificates
        mine = certificate_table.VLEK if signer == "vlek" else certificate_table.VCEK
        payloads = {mine: vek, certificate_table.ASK: intermediate, certificate_table.ARK: ark}
        yield pack_certificate_table(payloads)
        yield pack_certificate_table(
            {guid: ssl.DER_cert_to_PEM_cert(der).encode() for guid, der in payloads.items()}
        )
        crl = {certificate_table.CRL: one.endorsements.revocation_lists[0], uuid.UUID(int=7): b"unknown"}
        yield pack_certificate_table(payloads | crl).ljust(1 << 13, b"\0")
    yield bytes(64)
    yield from workshop.recorded("certtable/*auxblob*.bin")


def worst() -> Iterator[tuple[str, bytes]]:
    """Give full tables: all entries over the same bytes, PEM without end, and as many certificates as fit."""
    yield "64 entries, each all of the table, PEM", everything(MAX_TABLE_SIZE)
    rest = MAX_TABLE_SIZE - START
    vek = chip("Milan", "vcek").endorsements.certificates[0]
    yield "64 entries of nothing but zeros after DER", full(vek, [(0, rest)] * MAX_ENTRIES)
    yield "64 beginnings of PEM", full(b"-----BEGIN " * (rest // 11), [(i, rest - i) for i in range(64)])
    # Other names, so that no two candidates are the same bytes: each is read, and none can sign another.
    changed = [vek.replace(b"SEV-VCEK", b"SEV-VC%02d" % i) for i in range(rest // len(vek))]
    places = [(i % len(changed) * len(vek), len(vek)) for i in range(MAX_ENTRIES)]
    yield "as many certificates as fit", full(b"".join(changed), places)


def everything(size: int) -> bytes:
    """Give a table of 64 entries, each of which is one block of PEM, and the same: the rest of the table."""
    rest = size - START
    return full(pem(rest), [(0, rest)] * MAX_ENTRIES, size)


def full(payload: bytes, places: list[tuple[int, int]], size: int = MAX_TABLE_SIZE) -> bytes:
    """Lay out a table with an entry for each place, an offset into the payload and a size."""
    known = [guid.bytes for guid in NAMES]
    guids = known + [bytes([i]) * 16 for i in range(1, len(places) + 1 - len(known))]
    rows = b"".join(
        guid + (START + at).to_bytes(4, "little") + length.to_bytes(4, "little")
        for guid, (at, length) in zip(guids, places, strict=True)
    )
    return (rows + bytes(ENTRY_SIZE) + payload).ljust(size, b"\0")


def pem(size: int) -> bytes:
    """Give a PEM block of ``size`` bytes or little less, whose content is none."""
    body = b"A" * 64 + b"\n"
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    return begin + body * ((size - len(begin) - len(end)) // len(body)) + end


def mutate_table(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change an entry's payload and lay the table out anew, or change a number of an entry, or any bytes."""
    pick = chance.random()
    try:
        entries = {entry.guid: entry.payload for entry in certificate_table.parse(data)}
    except Malformed:
        return mutate(data, limit)
    if pick < 0.3 or not entries:
        return mutate(data, limit)
    if pick < 0.5:
        at = chance.randrange(len(entries) + 1) * ENTRY_SIZE + chance.choice((0, 16, 20))
        return parts.spliced(data, at, at + 4, parts.number(chance, 4))[:limit]
    guid = chance.choice(tuple(entries))
    payload = parts.part(entries.pop(guid), limit // 2, chance, mutate)
    if chance.random() < 0.2:
        guid = chance.choice((*NAMES, uuid.UUID(bytes=chance.randbytes(16))))
    if chance.random() < 0.2:
        payload = ssl.DER_cert_to_PEM_cert(payload).encode()
    entries[guid] = payload or b"\0"
    return pack_certificate_table(entries)[:limit]


TARGET = Target(
    name="certificates",
    about="the host's certificate table, and the search for a chain in it",
    bound=BOUNDS["certificates"],
    refusals=(Malformed,),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=mutate_table,
    covers=("kagimori_protocol.certificate_table", "kagimori_verifier.verify.snp"),
)
