"""``eventlog show`` and ``eventlog replay``: what a log says, and whether it leads to a TPM's PCR values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import NotAuthentic
from kagimori_verifier.cli.verdict import aligned, read_artefact, readable, tell
from kagimori_verifier.examine import eventlog as examine
from kagimori_verifier.examine import pcr_values
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.eventlog_layout import EV_NO_ACTION, MAX_SIZE
from kagimori_verifier.verify.eventlog_measured import Measured, measured_part
from kagimori_verifier.verify.eventlog_names import TYPE_NAMES, describe

if TYPE_CHECKING:
    from pathlib import Path

    from kagimori_verifier.cli.output import Output
    from kagimori_verifier.examine.eventlog import ForeignLog
    from kagimori_verifier.examine.pcr_values import Banks
    from kagimori_verifier.verify.eventlog import Event, PcrValues

WHAT: Final = "a TCG event log"
_NOT_EXTENDED: Final = "extends nothing: the TPM vouches for none of it"
_NOT_COVERED: Final = "NOT covered by the digest: text that anybody could have written"


def show(options: argparse.Namespace, output: Output) -> int:
    """Show a log, unverified."""
    raw = read_artefact(options.log, MAX_SIZE, WHAT)
    with readable(options.log, WHAT):
        foreign = examine.parse(raw)
    events = sorted((*foreign.log.events, *foreign.unmeasured), key=lambda event: event.index)
    value = {
        "banks": list(foreign.log.algorithms),
        "startup_locality": foreign.log.startup_locality,
        "padding": foreign.padding,
        "notes": _notes(foreign),
        "events": [_event(foreign, event) for event in events],
    }
    lines = [
        f"{len(events)} events, banks {', '.join(foreign.log.algorithms)}. Nothing here is verified.",
        *(f"note   {note}" for note in _notes(foreign)),
    ]
    for event in events:
        lines += _event_lines(foreign, event)
    output.result(value, *lines)
    return 0


def replay(options: argparse.Namespace, output: Output) -> int:
    """Replay a log, and compare it with PCR values."""
    raw = read_artefact(options.log, MAX_SIZE, WHAT)
    given = _given(options.pcrs)
    trail = Trail()
    try:
        foreign = examine.parse(raw)
    except NotAuthentic as error:
        if not examine.is_begun(raw):
            with readable(options.log, WHAT):
                raise
        # It begins like a log, so it is one, which was cut off or changed.
        trail.note(error.code, False, expected=str(error.expected), found=f"{error.what} {error.found}")  # noqa: FBT003 - it failed
        return tell(output, trail, {"banks": {}}, [], [])
    trail.note(
        "eventlog.layout",
        True,  # noqa: FBT003 - it was read
        expected="a whole event log",
        found=f"{len(foreign.log.events)} events, banks {', '.join(foreign.log.algorithms)}",
    )
    replayed = examine.replay(trail, foreign, given)
    notes = [*_notes(foreign), *_open_notes(foreign, given)]
    if given is None:
        notes.append(
            "nothing was compared: without --pcrs, these values are what the log says, not what a TPM has"
        )
    facts = {
        "startup_locality": foreign.log.startup_locality,
        "banks": {
            bank: {str(pcr): digest.hex() for pcr, digest in sorted(values.values.items())}
            for bank, values in replayed.items()
        },
        "unexplained": {
            bank: list(examine.unexplained(foreign, values, bank))
            for bank, values in (given or {}).items()
            if bank in replayed
        },
    }
    return tell(output, trail, facts, _bank_lines(replayed), notes)


def _given(path: Path | None) -> Banks | None:
    if path is None:
        return None
    raw = read_artefact(path, pcr_values.MAX_SIZE, "PCR values in JSON")
    with readable(path, "PCR values"):
        return pcr_values.parse(raw)


def _bank_lines(replayed: dict[str, PcrValues]) -> list[str]:
    lines: list[str] = []
    for bank, values in replayed.items():
        lines.append(f"{bank}, as the log leads to it")
        lines += aligned([(f"PCR {pcr}", digest.hex()) for pcr, digest in sorted(values.values.items())])
    return lines


def _notes(foreign: ForeignLog) -> list[str]:
    notes = []
    if foreign.log.startup_locality:
        notes.append(
            f"PCR 0 starts with {foreign.log.startup_locality}: the TPM was started at that locality"
        )
    if foreign.of_registers:
        notes.append("a log of a TDX guest: PCR n stands for RTMR n-1")
    if foreign.padding:
        notes.append(f"{foreign.padding} bytes after the last event are padding")
    if foreign.unmeasured:
        notes.append(f"{len(foreign.unmeasured)} events are for no PCR (0xffffffff): they extend nothing")
    unknown = [bank for bank in foreign.log.algorithms if bank not in foreign.banks]
    if unknown:
        notes.append(f"banks that cannot be replayed here: {', '.join(unknown)}")
    if foreign.refusal is not None:
        notes.append(f"a verifier refuses a boot with such a log: {foreign.refusal}")
    return notes


def _open_notes(foreign: ForeignLog, given: Banks | None) -> list[str]:
    """Name what was not compared: PCRs that move without the log, and PCRs that were not given."""
    notes = []
    if given is not None and set(given) == {"sha1"}:
        notes.append("only SHA-1 values were compared, and collisions of SHA-1 can be made")
    if given is not None and (ignored := [bank for bank in foreign.banks if bank not in given]):
        notes.append(
            f"not compared: the log's {', '.join(ignored)} digests, for no values of that bank were given"
        )
    for bank, values in (given or {}).items():
        if bank not in foreign.banks:
            continue
        if open_pcrs := examine.unexplained(foreign, values, bank):
            notes.append(
                f"not compared: PCR {pcr_values.numbers(open_pcrs)} ({bank}), which the operating system extended without this log"
            )
        if missing := foreign.logged - set(values):
            notes.append(f"not compared: PCR {pcr_values.numbers(missing)} ({bank}), which were not given")
    return notes


def _event(foreign: ForeignLog, event: Event) -> dict[str, Any]:
    measured = _measured(foreign, event)
    return {
        "index": event.index,
        "pcr": None if event.pcr == examine.NO_PCR else event.pcr,
        "type": event.type,
        "type_name": TYPE_NAMES.get(event.type),
        "digests": {bank: digest.hex() for bank, digest in event.digests.items()},
        "description": _description(foreign, event),
        "covered": None if measured is None else measured.covers.value,
        "data": event.data.hex(),
    }


def _event_lines(foreign: ForeignLog, event: Event) -> list[str]:
    pcr = "no PCR" if event.pcr == examine.NO_PCR else f"PCR {event.pcr}"
    name = TYPE_NAMES.get(event.type, f"0x{event.type:08x}")
    return [
        "",
        f"{event.index:4}  {pcr:<6}  {name}  {_description(foreign, event)}".rstrip(),
        *(f"        {bank:<7} {digest.hex()}" for bank, digest in event.digests.items()),
        f"        data    {len(event.data)} bytes, {_coverage(foreign, event)}",
    ]


def _coverage(foreign: ForeignLog, event: Event) -> str:
    if event.type == EV_NO_ACTION or event.pcr == examine.NO_PCR:
        return _NOT_EXTENDED
    measured = _measured(foreign, event)
    return _NOT_COVERED if measured is None else f"covered by the digest: {measured.covers.value}"


def _measured(foreign: ForeignLog, event: Event) -> Measured | None:
    """Tell what of the data is covered in every bank that can be computed; one bank alone would not do."""
    if event.type == EV_NO_ACTION or event.pcr == examine.NO_PCR:
        return None
    parts = [measured_part(event, bank) for bank in foreign.banks if bank in event.digests]
    return parts[0] if parts and all(parts) else None


def _description(foreign: ForeignLog, event: Event) -> str:
    """Describe an event without its PCR, which stands beside it."""
    bank = foreign.banks[-1] if foreign.banks else ""
    text = describe(event, bank).partition(f"PCR {event.pcr} ")[2]
    return text.removeprefix(TYPE_NAMES.get(event.type, f"event type 0x{event.type:08x}")).strip()
