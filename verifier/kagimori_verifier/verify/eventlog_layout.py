"""The bytes of an event log: read strictly, to the last one, into frozen values.

What the events *say* is the guest's claim; ``eventlog.replay_to`` tells which digests become facts. Pure: no
I/O.

Source: TCG PC Client Platform Firmware Profile 1.06, event logging (TCG_PCR_EVENT, TCG_PCR_EVENT2,
TCG_EfiSpecIdEventStruct, TCG_EfiStartupLocalityEvent); all integers little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from kagimori_protocol.errors import NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MAX_SIZE: Final = 1 << 20
"""Bytes. No message of the protocol is longer (PROTOCOL.md section 3), so no log inside one can be."""

MAX_EVENTS: Final = 8192
"""Real logs have 15 to 250 events; 1 MiB could hold 20,000 empty ones, work that nobody honest asks for."""

MAX_ALGORITHMS: Final = 16
"""Banks in one log: TPM2_NUM_PCR_BANKS of the TSS, more than any TPM has."""

MAX_DIGEST_SIZE: Final = 64
"""Bytes of the largest digest in TPMU_HA; nothing longer can be skipped over either."""

PCR_COUNT: Final = 24
"""PCRs of a PC Client TPM. Windows appends events of PCR 0xFFFFFFFF, and its logs are refused."""

EV_NO_ACTION: Final = 0x00000003
EV_EFI_HCRTM_EVENT: Final = 0x80000010

SHA256: Final = "sha256"
"""The one bank that version 1 of the protocol judges."""

HASHES: Final[Mapping[str, Callable[[bytes], hashlib._Hash]]] = MappingProxyType(
    {"sha1": hashlib.sha1, SHA256: hashlib.sha256, "sha384": hashlib.sha384, "sha512": hashlib.sha512}
)
"""Banks that can be replayed. SHA-1 is for showing old logs only; nothing is ever released because of it."""

DIGEST_SIZES: Final = {name: new(b"").digest_size for name, new in HASHES.items()}
_ALGORITHMS: Final = {0x0004: "sha1", 0x000B: SHA256, 0x000C: "sha384", 0x000D: "sha512"}

_LEGACY_HEAD: Final = struct.Struct("<II20sI")  # TCG_PCR_EVENT: pcrIndex, eventType, digest, eventSize
_HEAD: Final = struct.Struct("<III")  # TCG_PCR_EVENT2: pcrIndex, eventType, digests.count
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
# signature, platformClass, minor, major, errata, uintnSize, numberOfAlgorithms
_SPEC_ID: Final = struct.Struct("<16sIBBBBI")
_ALGORITHM: Final = struct.Struct("<HH")  # algorithmId, digestSize

_SPEC_ID_03: Final = b"Spec ID Event03\0"
_SPEC_ID_ANY: Final = b"Spec ID Event"
_SPEC_ID_LEGACY: Final = (b"Spec ID Event00\0", b"Spec ID Event02\0")  # TPM 1.2: SHA-1 events follow
_SPEC_MAJOR: Final = 2
_UINTN_SIZES: Final = frozenset({1, 2})  # UINT32, UINT64

_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_LOCALITIES: Final = frozenset({0, 3, 4})
_HCRTM_LOCALITY: Final = 4


class _Algorithm(NamedTuple):
    """One entry of the header's list: a bank's name, or the id where it is unknown ("0x0012"); size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event as logged: ``index`` counts from 0 over the whole log, ``digests`` goes by bank name."""

    index: int
    pcr: int
    type: int
    digests: Mapping[str, bytes]
    data: bytes

    def digest(self, bank: str = SHA256) -> bytes:
        """Return what was extended in ``bank``; raises NotAuthentic (eventlog.bank) if the log lacks it."""
        try:
            return self.digests[bank]
        except KeyError:
            raise no_bank(bank, self.digests) from None


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole log; ``events`` includes the header, ``algorithms`` names the banks that every extend is in.

    ``startup_locality`` is what PCR 0 starts with (its last byte): 0, 3, or 4 after an H-CRTM.
    """

    algorithms: tuple[str, ...]
    events: tuple[Event, ...]
    startup_locality: int


class Dialect:
    """What a log may have beyond its profile: nothing. ``examine`` knows logs that may have more, the pipeline none."""

    header_pcrs: ClassVar[frozenset[int]] = frozenset({0})
    """What the header may say it is for; it extends nothing."""

    def ends(self, raw: bytes, offset: int) -> bool:
        """Tell whether the log ends at ``offset``, where an event has ended."""
        return offset >= len(raw)

    def require_pcr(self, pcr: int, offset: int) -> None:
        """Refuse an event for a PCR that no TPM has."""
        if pcr >= PCR_COUNT:
            raise _layout(
                "An event is for a PCR that no TPM has.", offset, f"0 to {PCR_COUNT - 1}", f"PCR {pcr}"
            )


_STRICT: Final = Dialect()


def parse(raw: bytes) -> EventLog:
    """Read a whole log, as /sys/kernel/security/tpm*/binary_bios_measurements gives it.

    A log that does not open with "Spec ID Event03" is read as one of SHA-1 events, which can be shown but has no
    bank that version 1 judges. Firmware may list more algorithms in the header than it computes, but what it
    computes must be the same for every event that extends, or a bank could miss one; digests of unknown
    algorithms are kept. Padding behind the last event is refused: the kernel never gives any.
    Raises NotAuthentic (eventlog.layout), with the byte offset, for everything else.
    """
    return read(raw, _STRICT)


def read(raw: bytes, dialect: Dialect) -> EventLog:
    """Read a whole log that may have what ``dialect`` allows; ``parse`` tells the rest."""
    if not raw:
        raise _layout("An event log is empty.", 0, "at least one event", "0 bytes")
    if len(raw) > MAX_SIZE:
        raise _layout("An event log is too long.", 0, f"at most {MAX_SIZE} bytes", f"{len(raw)} bytes")
    first, offset = _legacy_event(raw, 0, 0, dialect)
    events = [first]
    if first.data.startswith(_SPEC_ID_03):
        promised = _spec_id(first, dialect)
        carried: frozenset[str] | None = None
        while not dialect.ends(raw, offset):
            start = offset
            event, offset = _event2(raw, offset, _next_index(events, offset), promised, dialect)
            if event.type != EV_NO_ACTION:
                carried = _require_banks(event, carried, start)
            events.append(event)
        names = tuple(name for name, _ in promised.values() if carried is None or name in carried)
    else:
        if first.data.startswith(_SPEC_ID_ANY) and not first.data.startswith(_SPEC_ID_LEGACY):
            raise _layout(
                "An event log is of an unknown version.", 32, "Spec ID Event03", repr(first.data[:16])
            )
        names = ("sha1",)
        while not dialect.ends(raw, offset):
            event, offset = _legacy_event(raw, offset, _next_index(events, offset), dialect)
            events.append(event)
    return EventLog(names, tuple(events), _startup_locality(events))


def _next_index(events: Sequence[Event], offset: int) -> int:
    """Return the index of the next event, unless the log has too many already."""
    if len(events) >= MAX_EVENTS:
        raise _layout("An event log has too many events.", offset, f"at most {MAX_EVENTS}", "more")
    return len(events)


def _unpack(layout: struct.Struct, raw: bytes, offset: int, what: str) -> tuple[Any, ...]:
    """Unpack ``layout`` at ``offset``, if there are enough bytes."""
    if len(raw) - offset < layout.size:
        raise _truncated(what, raw, offset, layout.size)
    return layout.unpack_from(raw, offset)


def _take(raw: bytes, offset: int, size: int, what: str) -> bytes:
    """Return ``size`` bytes from ``offset`` on, never fewer."""
    if len(raw) - offset < size:
        raise _truncated(what, raw, offset, size)
    return raw[offset : offset + size]


def _legacy_event(raw: bytes, offset: int, index: int, dialect: Dialect) -> tuple[Event, int]:
    """Read one TCG_PCR_EVENT; return it and the offset behind it."""
    pcr, kind, digest, size = _unpack(_LEGACY_HEAD, raw, offset, "an event's head")
    dialect.require_pcr(pcr, offset)
    start = offset + _LEGACY_HEAD.size
    data = _take(raw, start, size, "an event's data")
    return Event(index, pcr, kind, MappingProxyType({"sha1": digest}), data), start + size


def _event2(
    raw: bytes, offset: int, index: int, algorithms: Mapping[int, _Algorithm], dialect: Dialect
) -> tuple[Event, int]:
    """Read one TCG_PCR_EVENT2; return it and the offset behind it."""
    pcr, kind, count = _unpack(_HEAD, raw, offset, "an event's head")
    dialect.require_pcr(pcr, offset)
    if not 1 <= count <= len(algorithms):
        raise _layout(
            "An event has no digest, or more than the log's header lists.",
            offset + 8,
            f"1 to {len(algorithms)} digests",
            f"{count}",
        )
    offset += _HEAD.size
    digests: dict[str, bytes] = {}
    for _ in range(count):
        (algorithm_id,) = _unpack(_U16, raw, offset, "a digest's algorithm")
        algorithm = algorithms.get(algorithm_id)
        if algorithm is None or algorithm.name in digests:
            raise _layout(
                "An event has a digest twice, or one that the log's header does not list.",
                offset,
                "algorithms of the header, each once",
                f"algorithm 0x{algorithm_id:04x}",
            )
        digests[algorithm.name] = _take(raw, offset + _U16.size, algorithm.size, "a digest")
        offset += _U16.size + algorithm.size
    (size,) = _unpack(_U32, raw, offset, "an event's size")
    start = offset + _U32.size
    data = _take(raw, start, size, "an event's data")
    return Event(index, pcr, kind, MappingProxyType(digests), data), start + size


def _require_banks(event: Event, carried: frozenset[str] | None, offset: int) -> frozenset[str]:
    """Return the banks of an event that extends, if they are those of all such events before it."""
    banks = frozenset(event.digests)
    if carried is not None and banks != carried:
        raise _layout(
            "An event has digests for other banks than those before it.",
            offset,
            ", ".join(sorted(carried)),
            ", ".join(sorted(banks)),
        )
    return banks


def _spec_id(header: Event, dialect: Dialect) -> dict[int, _Algorithm]:
    """Read TCG_EfiSpecIdEvent; return the log's algorithms by TPM_ALG_ID, in the header's order."""
    at, data = _LEGACY_HEAD.size, header.data
    if header.pcr not in dialect.header_pcrs or header.type != EV_NO_ACTION or any(header.digests["sha1"]):
        raise _layout(
            "An event log's header is not one.",
            0,
            "EV_NO_ACTION for PCR 0, digest zero",
            f"type 0x{header.type:08x} for PCR {header.pcr}, digest {header.digests['sha1'].hex()}",
        )
    if len(data) < _SPEC_ID.size:
        raise _layout(
            "An event log's header is cut off.", at, f"{_SPEC_ID.size} bytes or more", f"{len(data)} bytes"
        )
    _, _, minor, major, _, uintn_size, count = _SPEC_ID.unpack_from(data)
    if major != _SPEC_MAJOR or uintn_size not in _UINTN_SIZES or not 1 <= count <= MAX_ALGORITHMS:
        raise _layout(
            "An event log is of an unknown version.",
            at + 20,
            f"version {_SPEC_MAJOR}, uintnSize 1 or 2, 1 to {MAX_ALGORITHMS} algorithms",
            f"version {major}.{minor}, uintnSize {uintn_size}, {count} algorithms",
        )
    # The list, vendorInfoSize (one byte) and so many bytes of the vendor: exactly to the header's last byte.
    vendor = _SPEC_ID.size + count * _ALGORITHM.size
    if len(data) <= vendor or len(data) != vendor + 1 + data[vendor]:
        raise _layout(
            "An event log's header has another size than it says.",
            at + vendor,
            f"{count} algorithms, then vendorInfo of one byte's count",
            f"a header of {len(data)} bytes",
        )
    algorithms: dict[int, _Algorithm] = {}
    for offset in range(_SPEC_ID.size, vendor, _ALGORITHM.size):
        algorithm_id, size = _ALGORITHM.unpack_from(data, offset)
        name = _ALGORITHMS.get(algorithm_id)
        fits = 1 <= size <= MAX_DIGEST_SIZE if name is None else size == DIGEST_SIZES[name]
        if algorithm_id in algorithms or not fits:
            raise _layout(
                "An event log's header lists an algorithm twice, or with a wrong size.",
                at + offset,
                f"once, {DIGEST_SIZES[name] if name else f'1 to {MAX_DIGEST_SIZE}'} bytes",
                f"algorithm 0x{algorithm_id:04x}, {size} bytes",
            )
        algorithms[algorithm_id] = _Algorithm(name or f"0x{algorithm_id:04x}", size)
    return algorithms


def _startup_locality(events: Sequence[Event]) -> int:
    """Find what PCR 0 starts with: the StartupLocality event's word, else 4 after an H-CRTM, else 0.

    The word needs no trust: replay gives the quoted PCR 0 with the true one only. Two such events are too
    many.
    """
    silent = (event for event in events if event.type == EV_NO_ACTION)
    told = [event for event in silent if event.data.startswith(_STARTUP_LOCALITY)]
    if not told:
        hcrtm = any(event.type == EV_EFI_HCRTM_EVENT and event.pcr == 0 for event in events)
        return _HCRTM_LOCALITY if hcrtm else 0
    value = told[0].data[len(_STARTUP_LOCALITY) :]
    if len(told) > 1 or told[0].pcr != 0 or len(value) != 1 or value[0] not in _LOCALITIES:
        raise NotAuthentic(
            "An event log does not say clearly at which locality the TPM was started.",
            code="eventlog.layout",
            expected="one StartupLocality event for PCR 0 with locality 0, 3 or 4",
            found=f"{len(told)}, event {told[0].index} for PCR {told[0].pcr}: {value[:8].hex() or 'nothing'}",
        )
    return value[0]


def _truncated(what: str, raw: bytes, offset: int, size: int) -> NotAuthentic:
    """Make the error for a log that ends too early (or has something else behind its last event)."""
    return _layout(f"An event log ends inside {what}.", offset, f"{size} bytes", f"{len(raw) - offset} bytes")


def _layout(what: str, offset: int, expected: str, found: str) -> NotAuthentic:
    """Make the error for bytes that are no event log, with their place."""
    return NotAuthentic(what, code="eventlog.layout", expected=expected, found=f"{found}, at byte {offset}")


def no_bank(bank: str, banks: Iterable[str]) -> NotAuthentic:
    """Make the error for a log that says nothing about the bank that was quoted."""
    return NotAuthentic(
        f"The event log has no {bank} bank that could be replayed.",
        code="eventlog.bank",
        expected=f"a crypto-agile log (Spec ID Event03) with a {bank} digest in every event",
        found=f"digests of {', '.join(banks)} only",
        todo="Let the TPM's firmware log this bank (TPM 2.0, active bank).",
    )
