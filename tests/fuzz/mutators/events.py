"""Event logs: a writer of our own, which shares nothing with the parser, and mutations of whole events.

Source: TCG PC Client Platform Firmware Profile 1.06, TCG_PCR_EVENT, TCG_PCR_EVENT2, TCG_EfiSpecIdEventStruct.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate

from kagimori_verifier.verify.eventlog_layout import EV_NO_ACTION, EventLog
from kagimori_verifier.verify.eventlog_names import TYPE_NAMES

IDS = {"sha1": 0x4, "sha256": 0xB, "sha384": 0xC, "sha512": 0xD}
HCRTM = 0x80000010
BEGINNINGS = (
    b"grub_cmd: ",
    b"kernel_cmdline: ",
    b"StartupLocality\0",
    b"l\0i\0n\0u\0x\0",
    struct.pack("<16sQQ", b"", 4, 8) + "Boot".encode("utf-16-le"),
    struct.pack("<QQQQ", 0, 0, 0, 8) + b"\x04\x04\x08\x00e\0f\0",
)


class Logged(NamedTuple):
    """One event as the writer takes it."""

    pcr: int
    kind: int
    digests: Mapping[str, bytes]
    data: bytes


def written(banks: Sequence[str], events: Sequence[Logged], sizes: Mapping[str, int] | None = None) -> bytes:
    """Write a crypto-agile log. ``sizes``: of banks that have no name but their number in hexadecimal."""
    sizes = sizes or {}
    spec = b"Spec ID Event03\0\0\0\0\0\0\2\0\2" + len(banks).to_bytes(4, "little")
    for bank in banks:
        size = sizes[bank] if bank in sizes else hashlib.new(bank).digest_size
        spec += struct.pack("<HH", number(bank), size)
    spec += b"\0"
    written_parts = [struct.pack("<II20sI", 0, EV_NO_ACTION, b"", len(spec)), spec]
    for event in events:
        written_parts.append(struct.pack("<III", event.pcr, event.kind, len(event.digests)))
        for bank, digest in event.digests.items():
            written_parts += [struct.pack("<H", number(bank)), digest]
        written_parts += [struct.pack("<I", len(event.data)), event.data]
    return b"".join(written_parts)


def legacy(events: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Write a log of SHA-1 events: PCR, type and data of each."""
    return b"".join(
        struct.pack("<II20sI", pcr, kind, hashlib.sha1(data, usedforsecurity=False).digest(), len(data))
        + data
        for pcr, kind, data in events
    )


def number(bank: str) -> int:
    """Give a bank's TPM_ALG_ID."""
    return IDS[bank] if bank in IDS else int(bank, 16)


def mutated(log: EventLog, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change one event of a log that was read, and write it again."""
    banks = list(log.algorithms)
    sizes = {
        bank: len(event.digests[bank])
        for event in log.events[1:]
        for bank in event.digests
        if bank not in IDS
    }
    # Without an event, nothing tells the size of a bank that has no name; it goes.
    banks = [bank for bank in banks if bank in IDS or bank in sizes]
    if not banks:
        return written(["sha256"], [])
    listed = [Logged(event.pcr, event.type, event.digests, event.data) for event in log.events[1:]]
    at = chance.randrange(len(listed)) if listed else 0
    match chance.randrange(6) if listed else 5:
        case 0:
            del listed[at]
        case 1:
            listed.insert(at, listed[at])
        case 2:
            other = chance.randrange(len(listed))
            listed[at], listed[other] = listed[other], listed[at]
        case 3:
            listed[at] = listed[at]._replace(pcr=chance.randrange(24), kind=kind(chance))
        case _:
            data = parts.part(listed[at].data if listed else b"", limit // 2, chance, mutate)
            if chance.random() < 0.3:
                data = chance.choice(BEGINNINGS) + data
            wanted = listed[at] if listed else Logged(chance.randrange(24), kind(chance), {}, b"")
            digests = {bank: digest(bank, data, sizes, chance) for bank in wanted.digests or banks}
            changed = wanted._replace(data=data, digests=digests)
            listed[at : at + 1] = [changed]
    return written(banks, listed, sizes)[:limit]


def one_of_each(log: EventLog) -> bytes:
    """Write a short log: of each PCR and type the first event, in the bank that is judged."""
    first = {
        (event.pcr, event.type): event for event in reversed(log.events[1:]) if "sha256" in event.digests
    }
    kept = sorted(first.values(), key=lambda event: event.index)
    return written(
        ["sha256"],
        [Logged(event.pcr, event.type, {"sha256": event.digests["sha256"]}, event.data) for event in kept],
    )


def kind(chance: random.Random) -> int:
    """Give an event's type: mostly one that has a meaning."""
    return chance.choice((*TYPE_NAMES, HCRTM, chance.randrange(1 << 32)))


def digest(bank: str, data: bytes, sizes: Mapping[str, int], chance: random.Random) -> bytes:
    """Give a digest of the data, or of a part of it, as firmware and boot loaders hash it."""
    if bank in sizes:
        return chance.randbytes(sizes[bank])
    of = chance.choice((data, data, data[:-1], data[10:-1], data[32:], data[::2] + b"\0", b"elsewhere"))
    return hashlib.new(bank, of).digest()
