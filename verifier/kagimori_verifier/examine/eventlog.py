"""Event logs of any machine: read, replayed, and held against the PCR values of its TPM.

Beyond ``verify.eventlog``, a log may have what firmware and operating systems are known to add:

- padding after its last event, all zeros or all ones (the area behind an ACPI CCEL table is padded so),
- events for PCR 0xFFFFFFFF, which extend nothing (Windows ends its logs with such),
- a header for PCR 1: so begins the log of a TDX guest (CCEL), where the index of a PCR means a measurement register.
  1 is RTMR 0, 2 is RTMR 1, and so on; they start at zero, and are replayed like PCRs (UEFI 2.10, section 38.4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import KagimoriError
from kagimori_verifier.examine.pcr_values import numbers
from kagimori_verifier.verify import eventlog
from kagimori_verifier.verify.eventlog_layout import (
    HASHES,
    PCR_COUNT,
    Dialect,
    Event,
    EventLog,
    no_bank,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kagimori_verifier.examine.pcr_values import Banks
    from kagimori_verifier.trail import Trail
    from kagimori_verifier.verify.eventlog import PcrValues

NO_PCR: Final = 0xFFFFFFFF
REGISTER_HEADER: Final = 1
"""What the header of a log of measurement registers is for."""

LEAST_PADDING: Final = 8
"""Bytes. Fewer equal bytes can be the head of an event that was cut off: its PCR, and half of its type."""

OPEN_PCRS: Final = frozenset({10, 11, 12, 13, *range(15, 24)})
"""PCRs that an operating system extends without the firmware's log: IMA (10), systemd and snaps (11 to 13, 15), CEL
(13), debugging (16), dynamic launch (17 to 22), applications (23). Where the log has no event of one, it says nothing
about it."""

_REGISTER_BANKS: Final = ("sha384",)
_REGISTERS: Final = frozenset(range(5))
"""MRTD and RTMR 0 to 3: there are no more (Intel TDX Module, TDREPORT_STRUCT)."""
_OPEN_REGISTERS: Final = frozenset({0, 4})
"""MRTD, which the log does not extend, and RTMR 3, which is the operating system's."""

_HEAD_SIZE: Final = 32  # TCG_PCR_EVENT: pcrIndex, eventType, a SHA-1 digest, eventSize
_EBS_PCR: Final = 5
_EBS: Final = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")


@dataclass(frozen=True, slots=True)
class ForeignLog:
    """A log that was read: ``log`` is what extends PCRs, ``unmeasured`` the events for no PCR, in the log's order.

    ``padding`` counts the bytes after the last event. ``refusal`` tells why the protocol would refuse such a log, or
    is None.
    """

    log: EventLog
    unmeasured: tuple[Event, ...]
    padding: int
    refusal: str | None

    @property
    def banks(self) -> tuple[str, ...]:
        """Name the banks that can be replayed."""
        return tuple(bank for bank in self.log.algorithms if bank in HASHES)

    @property
    def of_registers(self) -> bool:
        """Tell whether the log's indices can be those of measurement registers: its header says so, and all else fits.

        The header alone is anybody's word, and a TPM's PCRs must not go uncompared for it.
        """
        header = self.log.events[0] if self.log.events else None
        return (
            header is not None
            and header.type == eventlog.EV_NO_ACTION
            and header.pcr == REGISTER_HEADER
            and self.log.algorithms == _REGISTER_BANKS
            and self.logged <= _REGISTERS
        )

    def open_among(self, given: Iterable[int]) -> frozenset[int]:
        """Name the PCRs that move without the log, where these are given; what it has an event of is compared all the same."""
        registers = self.of_registers and _REGISTERS.issuperset(given)
        return (_OPEN_REGISTERS if registers else OPEN_PCRS) - self.logged

    @property
    def logged(self) -> frozenset[int]:
        """Name the PCRs that the log extends."""
        return frozenset(event.pcr for event in self.log.events if event.type != eventlog.EV_NO_ACTION)


class _Foreign(Dialect):
    """Allows padding, events for no PCR, and the header of a log of measurement registers."""

    header_pcrs = frozenset({0, REGISTER_HEADER})

    def __init__(self, raw: bytes) -> None:
        """Find where padding could begin; it begins at an event's end, or not at all."""
        runs = [len(raw) - len(raw.rstrip(byte)) for byte in (b"\x00", b"\xff")]
        self._longest = max(runs)
        self.padding = 0

    def ends(self, raw: bytes, offset: int) -> bool:
        rest = len(raw) - offset
        if LEAST_PADDING <= rest <= self._longest:
            self.padding = rest
            return True
        return super().ends(raw, offset)

    def require_pcr(self, pcr: int, offset: int) -> None:
        if pcr != NO_PCR:
            super().require_pcr(pcr, offset)


def parse(raw: bytes) -> ForeignLog:
    """Read a log of any machine. Raises NotAuthentic (eventlog.layout)."""
    dialect = _Foreign(raw)
    # An area that nothing was logged to is all padding, and no event of PCR 0.
    whole = read(raw if any(raw) else b"", dialect)
    measured = tuple(event for event in whole.events if event.pcr != NO_PCR)
    unmeasured = tuple(event for event in whole.events if event.pcr == NO_PCR)
    log = EventLog(whole.algorithms, measured, whole.startup_locality)
    return ForeignLog(log, unmeasured, dialect.padding, _refusal(raw))


def is_begun(raw: bytes) -> bool:
    """Tell whether bytes begin like an event log, with a TCG_PCR_EVENT that fits, whatever follows."""
    pcr, size = (int.from_bytes(raw[at : at + 4], "little") for at in (0, 28))
    return any(raw) and pcr < PCR_COUNT and _HEAD_SIZE + size <= len(raw)


def replay(trail: Trail, foreign: ForeignLog, given: Banks | None) -> dict[str, PcrValues]:
    """Replay every bank, and note each check; nothing is raised, so that all reasons are told together.

    ``given`` are PCR values of the TPM: every one is compared, but those of OPEN_PCRS that the log has no event of.
    """
    extending = [event for event in foreign.log.events if event.type != eventlog.EV_NO_ACTION]
    trail.note(
        "eventlog.events",
        bool(extending),
        expected="at least one event that extends a PCR",
        found=f"{len(extending)} of {len(foreign.log.events)} events",
    )
    trail.note(
        "eventlog.bank",
        bool(foreign.banks),
        expected=f"a digest that can be replayed: {', '.join(HASHES)}",
        found=", ".join(foreign.log.algorithms),
    )
    replayed = {bank: eventlog.replay(foreign.log, bank) for bank in foreign.banks}
    for bank, values in (given or {}).items():
        _compare(trail, foreign, replayed, bank, values)
    return replayed


def unexplained(foreign: ForeignLog, given: Mapping[int, bytes], bank: str) -> tuple[int, ...]:
    """Name the open PCRs that have another value than at start-up, though the log has no event of them."""
    start = _start(foreign, bank)
    unheld = foreign.open_among(given)
    return tuple(pcr for pcr in sorted(given) if pcr in unheld and given[pcr] != start.pcr(pcr))


def _start(foreign: ForeignLog, bank: str) -> PcrValues:
    return eventlog.replay(EventLog((bank,), (), foreign.log.startup_locality), bank)


def _compare(
    trail: Trail,
    foreign: ForeignLog,
    replayed: Mapping[str, PcrValues],
    bank: str,
    given: Mapping[int, bytes],
) -> None:
    if bank not in replayed:
        error = no_bank(bank, foreign.log.algorithms)
        trail.note("eventlog.bank", False, expected=str(error.expected), found=str(error.found))  # noqa: FBT003 - it lacks
        return
    logged = foreign.logged
    unheld = foreign.open_among(given)
    governed = {pcr: digest for pcr, digest in given.items() if pcr not in unheld}
    trail.note(
        "eventlog.pcrs",
        bool(governed.keys() & logged),
        expected=f"values of PCRs that the log extends: {numbers(logged)}",
        found=f"PCRs {numbers(given)} of {bank}",
    )
    wrong = eventlog.differing(replayed[bank], governed)
    for pcr in sorted(governed):
        trail.note(
            "eventlog.replay",
            pcr not in wrong,
            expected=f"PCR {pcr} ({bank}) {governed[pcr].hex()}",
            found=f"PCR {pcr} ({bank}) {replayed[bank].pcr(pcr).hex()}"
            + (_hint(foreign, bank, pcr, governed[pcr]) if pcr in wrong else ""),
        )


def _hint(foreign: ForeignLog, bank: str, pcr: int, expected: bytes) -> str:
    """Name the trouble with a PCR where it is a known one."""
    if pcr not in foreign.logged:
        return ": the log has no event of it"
    if pcr == _EBS_PCR:
        extends = [eventlog.UserspaceExtend(pcr, HASHES[bank](text).digest(), text.decode()) for text in _EBS]
        if eventlog.replay(foreign.log, bank, extends).pcr(pcr) == expected:
            return (
                ": what is missing are the two ExitBootServices events, which firmware or kernel did not log"
            )
    return ""


def _refusal(raw: bytes) -> str | None:
    """Say why the protocol would refuse a log, if it would."""
    try:
        log = eventlog.parse(raw)
        eventlog.replay(log)
    except KagimoriError as error:
        return error.reason
    return None
