"""The firmware's event log, replayed and held against quoted PCR values.

A log is a list of claims by the guest. Only the digests of events become facts, and only once ``replay_to``
has shown that they lead to PCR values that a TPM quoted. An event's type, its data, and its place among
events of *other* PCRs stay unauthenticated; ``eventlog_measured`` says which part of the data a digest
vouches for. Pure: no I/O.

Source: TCG PC Client Platform Firmware Profile 1.06 ("PFP"): PCR usage, StartupLocality and H-CRTM events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_protocol.errors import NotAuthentic
from kagimori_verifier.verify.eventlog_layout import (
    DIGEST_SIZES,
    EV_NO_ACTION,
    HASHES,
    PCR_COUNT,
    SHA256,
    Event,
    EventLog,
    no_bank,
    parse,
)
from kagimori_verifier.verify.eventlog_names import RECORDED_LENGTH, describe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "EV_NO_ACTION",
    "SHA256",
    "Event",
    "EventLog",
    "LoggedBoot",
    "PcrValues",
    "UserspaceExtend",
    "differing",
    "parse",
    "replay",
    "replay_to",
]

_DYNAMIC_PCRS: Final = frozenset(range(17, 23))  # all ones until a dynamic launch resets them


@dataclass(frozen=True, slots=True)
class LoggedBoot:
    """For each quoted PCR the events that lead to its value, in order, and what they are about."""

    events: Mapping[int, tuple[Event, ...]]
    _described: dict[tuple[int, int], list[tuple[str, str]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def described(self, pcr: int, most: int) -> list[tuple[str, str]]:
        """Give digest (SHA-256, hex) and description of a PCR's first ``most`` events. Made once, not to be changed."""
        known = self._described.get((pcr, most))
        if known is None:
            known = [
                (event.digest().hex(), describe(event, limit=RECORDED_LENGTH))
                for event in self.events[pcr][:most]
            ]
            self._described[pcr, most] = known
        return known


@dataclass(frozen=True, slots=True)
class PcrValues:
    """What a log replays to in one bank; ``values`` holds the PCRs that were extended, by index."""

    bank: str
    values: Mapping[int, bytes]
    startup_locality: int

    def pcr(self, index: int) -> bytes:
        """Return the digest of PCR ``index``; without events, its start-up value (zero for PCR 1 to 15)."""
        return self.values.get(index) or _initial(index, DIGEST_SIZES[self.bank], self.startup_locality)


class UserspaceExtend(NamedTuple):
    """An extend that userspace is known to make after the firmware's log ended, in the quoted bank."""

    pcr: int
    digest: bytes
    name: str


def replay(log: EventLog, bank: str = SHA256, userspace_extends: Sequence[UserspaceExtend] = ()) -> PcrValues:
    """Compute the PCRs that ``log``, and after it ``userspace_extends`` in their order, lead to in ``bank``.

    EV_NO_ACTION never extends. Raises NotAuthentic: eventlog.bank if the log lacks the bank, or it cannot be
    computed; eventlog.userspace for an extend that no TPM would take.
    """
    if bank not in HASHES or bank not in log.algorithms:
        raise no_bank(bank, log.algorithms)
    new, size = HASHES[bank], DIGEST_SIZES[bank]
    values: dict[int, bytes] = {}

    def extend(pcr: int, digest: bytes) -> None:
        value = values.get(pcr) or _initial(pcr, size, log.startup_locality)
        values[pcr] = new(value + digest).digest()

    for event in log.events:
        if event.type != EV_NO_ACTION:
            extend(event.pcr, event.digests[bank])
    for pcr, digest, name in userspace_extends:
        if len(digest) != size or not 0 <= pcr < PCR_COUNT:
            raise NotAuthentic(
                "An extend by userspace is none that a TPM would take.",
                code="eventlog.userspace",
                expected=f"{size} bytes for one of PCR 0 to {PCR_COUNT - 1}",
                found=f"{len(digest)} bytes for PCR {pcr} ({name!r})",
            )
        extend(pcr, digest)
    return PcrValues(bank, MappingProxyType(values), log.startup_locality)


def replay_to(
    log: EventLog,
    quoted: Mapping[int, bytes],
    *,
    bank: str = SHA256,
    userspace_extends: Sequence[UserspaceExtend] = (),
) -> dict[int, tuple[Event, ...]]:
    """Return the events behind each quoted PCR, in order, once the log replays to all of ``quoted``.

    Only these events' digests are authentic; events of PCRs that were not quoted, and EV_NO_ACTION, are left
    out. A PCR without events comes back empty, and was quoted with its start-up value: zero, for PCR 1 to 15.
    PROTOCOL.md section 6, step 8. Raises NotAuthentic: eventlog.replay, naming every PCR that differs, or for
    no quoted PCR at all (nothing would be proved); and what ``replay`` raises.
    """
    if not quoted:
        raise NotAuthentic(
            "No PCR was quoted, so the event log proves nothing.",
            code="eventlog.replay",
            expected="at least one quoted PCR",
            found="none",
        )
    replayed = replay(log, bank, userspace_extends)
    by_pcr: dict[int, list[Event]] = {pcr: [] for pcr in sorted(quoted)}
    for event in log.events:
        if event.type != EV_NO_ACTION and event.pcr in by_pcr:
            by_pcr[event.pcr].append(event)
    if wrong := differing(replayed, quoted):
        raise NotAuthentic(
            f"The event log does not lead to the quoted value of PCR {', '.join(map(str, wrong))}.",
            code="eventlog.replay",
            expected="; ".join(f"PCR {pcr} quoted as {_hex(quoted[pcr])}" for pcr in wrong),
            found="; ".join(_told(pcr, replayed, len(by_pcr[pcr]), userspace_extends) for pcr in wrong),
            todo="Send the log whole, and quote before anything else in the guest extends these PCRs. "
            "Firmware that measures more than it logs cannot be judged.",
        )
    return {pcr: tuple(events) for pcr, events in by_pcr.items()}


def differing(replayed: PcrValues, quoted: Mapping[int, bytes]) -> tuple[int, ...]:
    """Name the PCRs, lowest first, whose quoted value is not the replayed one."""
    return tuple(
        pcr for pcr in sorted(quoted) if pcr not in range(PCR_COUNT) or replayed.pcr(pcr) != quoted[pcr]
    )


def _told(pcr: int, replayed: PcrValues, count: int, userspace_extends: Sequence[UserspaceExtend]) -> str:
    """Say what the log gives for one PCR, and from how many events."""
    extends = sum(extend.pcr == pcr for extend in userspace_extends)
    known = f" and {extends} known extends by userspace" if extends else ""
    return f"PCR {pcr} is {_hex(replayed.pcr(pcr))} after {count or 'no'} logged events{known}"


def _hex(digest: bytes) -> str:
    """Write a digest; a PCR that was never extended is easier to read as a word."""
    return digest.hex() if any(digest) else "zero"


def _initial(pcr: int, size: int, startup_locality: int) -> bytes:
    """Give what a PCR has after TPM2_Startup (PC Client Platform TPM Profile, "PCR attributes")."""
    if pcr in _DYNAMIC_PCRS:
        return b"\xff" * size
    return bytes(size - 1) + bytes([startup_locality if pcr == 0 else 0])
