"""A measured boot as ordered events: what a firmware extends into PCRs, and the log that it keeps of it.

Source: TCG PC Client Platform Firmware Profile, sections "TCG_PCR_EVENT2" and "Specification ID Version Event" (the
crypto-agile log); TCG UEFI event types.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BANKS: Final[dict[str, int]] = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
"""Hash algorithms of PCR banks with their TPM_ALG_ID; all are active in a fresh swtpm."""

_SPEC_ID_SIGNATURE: Final = b"Spec ID Event03\x00"
_SPEC_VERSION: Final = (0, 2, 0, 2)
"""specVersionMinor, specVersionMajor, specErrata, uintnSize (2: 64 bit)."""
_STARTUP_LOCALITY: Final = b"StartupLocality\x00"
_SHA1_SIZE: Final = 20


class EventType(IntEnum):
    """TCG_EVENTTYPE values that occur in a boot."""

    NO_ACTION = 0x3
    SEPARATOR = 0x4
    EVENT_TAG = 0x6
    S_CRTM_VERSION = 0x8
    PLATFORM_CONFIG_FLAGS = 0xA
    IPL = 0xD
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_GPT_EVENT = 0x80000006
    EFI_ACTION = 0x80000007
    EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EFI_VARIABLE_AUTHORITY = 0x800000E0


@dataclass(frozen=True, slots=True)
class Event:
    """One event: the PCR that it extends, its type, the data in the log, and the bytes whose hash is extended.

    For some types ``measured`` is the event data itself, for others something outside the log (a file, a variable).
    """

    pcr: int
    type: EventType
    data: bytes
    measured: bytes

    @property
    def extends(self) -> bool:
        """Whether a PCR changes: EV_NO_ACTION only informs."""
        return self.type != EventType.NO_ACTION

    def digest(self, bank: str) -> bytes:
        """Give the digest in one bank; zeros for EV_NO_ACTION."""
        if not self.extends:
            return bytes(hashlib.new(bank).digest_size)
        return hashlib.new(bank, self.measured).digest()


@dataclass(frozen=True)
class MeasuredBoot:
    """One boot, in order. ``startup_locality``: from which locality TPM2_Startup came; logged where not None."""

    way: str
    events: tuple[Event, ...]
    startup_locality: int | None = None

    def pcr(self, index: int, bank: str = "sha256") -> bytes:
        """Give the value that a PCR from 0 to 15 has after this boot."""
        size = hashlib.new(bank).digest_size
        start = self.startup_locality or 0 if index == 0 else 0
        value = start.to_bytes(size, "big")
        for event in self.events:
            if event.pcr == index and event.extends:
                value = hashlib.new(bank, value + event.digest(bank)).digest()
        return value

    def event_log(self, banks: Iterable[str] = tuple(BANKS)) -> bytes:
        """Write the crypto-agile log as firmware does, for the banks that are active."""
        active = tuple(banks)
        unknown = sorted(set(active) - BANKS.keys())
        if unknown or not active:
            raise UsageError(
                "A log needs known banks.", expected=", ".join(BANKS), found=", ".join(unknown) or "none"
            )
        return b"".join([_header(active), *(_event2(event, active) for event in self._logged())])

    def changed(
        self, matches: Callable[[Event], bool], change: Callable[[Event], Event | None]
    ) -> MeasuredBoot:
        """Give a boot in which every matching event is changed, or left out where ``change`` returns None.

        Raises UsageError if no event matches, since a test would then test nothing.
        """
        if not any(map(matches, self.events)):
            raise UsageError(
                "No event of this boot matches.", found=f"{len(self.events)} events, boot way {self.way}"
            )
        events = (change(event) if matches(event) else event for event in self.events)
        return replace(self, events=tuple(event for event in events if event is not None))

    def _logged(self) -> list[Event]:
        if self.startup_locality is None:
            return list(self.events)
        data = _STARTUP_LOCALITY + bytes([self.startup_locality])
        return [Event(0, EventType.NO_ACTION, data, b""), *self.events]


def same(pcr: int, kind: EventType, data: bytes) -> Event:
    """Make an event whose digest is over its own data."""
    return Event(pcr, kind, data, data)


def _header(banks: tuple[str, ...]) -> bytes:
    """Write the first event: in the old SHA-1 form, listing the algorithms of all that follow."""
    minor, major, errata, uintn_size = _SPEC_VERSION
    spec_id = _SPEC_ID_SIGNATURE + struct.pack("<IBBBBI", 0, minor, major, errata, uintn_size, len(banks))
    for bank in banks:
        spec_id += struct.pack("<HH", BANKS[bank], hashlib.new(bank).digest_size)
    spec_id += b"\x00"
    return (
        struct.pack("<II", 0, EventType.NO_ACTION)
        + bytes(_SHA1_SIZE)
        + struct.pack("<I", len(spec_id))
        + spec_id
    )


def _event2(event: Event, banks: tuple[str, ...]) -> bytes:
    digests = b"".join(struct.pack("<H", BANKS[bank]) + event.digest(bank) for bank in banks)
    head = struct.pack("<III", event.pcr, event.type, len(banks))
    return head + digests + struct.pack("<I", len(event.data)) + event.data
