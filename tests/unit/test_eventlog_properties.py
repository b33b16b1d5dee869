"""Event logs of any bytes: a value or NotAuthentic comes out, and what was written is what is read."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagimori_protocol.errors import NotAuthentic
from kagimori_verifier.verify.eventlog import Event, EventLog, parse, replay, replay_to
from kagimori_verifier.verify.eventlog_layout import HASHES
from kagimori_verifier.verify.eventlog_measured import GRUB_PREFIXES, measured_part
from kagimori_verifier.verify.eventlog_names import (
    LINE_LENGTH,
    TYPE_NAMES,
    describe,
    first_difference,
    printable,
)

if TYPE_CHECKING:
    from pathlib import Path

NO_ACTION, SEPARATOR, HCRTM = 0x3, 0x4, 0x80000010
BANKS = {
    "sha1": (0x4, 20),
    "sha256": (0xB, 32),
    "sha384": (0xC, 48),
    "sha512": (0xD, 64),
    "0x0012": (0x12, 32),
}
TYPES = st.sampled_from(sorted(TYPE_NAMES)) | st.integers(0, 2**32 - 1)
PCRS = st.integers(0, 23)

patient = settings(deadline=None)
"""A busy machine is no failure."""


class Written(NamedTuple):
    """One event as the tests' own writer takes it."""

    pcr: int
    kind: int
    digests: dict[str, bytes]
    data: bytes


def write(banks: list[str], events: list[Written]) -> bytes:
    """Write a crypto-agile log; no code is shared with the parser."""
    spec = b"Spec ID Event03\0\0\0\0\0\0\2\0\2" + len(banks).to_bytes(4, "little")
    for bank in banks:
        spec += BANKS[bank][0].to_bytes(2, "little") + BANKS[bank][1].to_bytes(2, "little")
    spec += b"\0"
    raw = bytes(4) + b"\3\0\0\0" + bytes(20) + len(spec).to_bytes(4, "little") + spec
    for pcr, kind, digests, data in events:
        raw += b"".join(number.to_bytes(4, "little") for number in (pcr, kind, len(digests)))
        raw += b"".join(BANKS[bank][0].to_bytes(2, "little") + digest for bank, digest in digests.items())
        raw += len(data).to_bytes(4, "little") + data
    return raw


@st.composite
def logs(draw: st.DrawFn, *, smallest: int = 0) -> tuple[list[str], list[Written]]:
    """Draw the banks and events of a log that is well made; the digests are of anything."""
    banks = draw(st.lists(st.sampled_from(sorted(BANKS)), min_size=1, unique=True))
    one = st.builds(
        Written,
        PCRS,
        TYPES.filter(lambda kind: kind not in {NO_ACTION, HCRTM}),
        st.fixed_dictionaries(
            {bank: st.binary(min_size=BANKS[bank][1], max_size=BANKS[bank][1]) for bank in banks}
        ),
        st.binary(max_size=64),
    )
    return banks, draw(st.lists(one, min_size=smallest, max_size=12))


def use(log: EventLog) -> None:
    """Do all that the verifier does with a log; nothing but NotAuthentic may come out of it."""
    for bank in log.algorithms:
        if bank in HASHES:
            values = replay(log, bank)
            assert replay_to(log, {index: values.pcr(index) for index in range(24)}, bank=bank)
    for event in log.events:
        for bank in event.digests:
            measured = measured_part(event, bank)
            assert measured is None or HASHES[bank](measured.part).digest() == event.digests[bank]
            line = describe(event, bank)
            assert line.isascii()
            assert line.isprintable()
            assert len(line) <= LINE_LENGTH


def parse_or_refuse(raw: bytes) -> None:
    """Read ``raw``, which may be anything."""
    try:
        log = parse(raw)
    except NotAuthentic as error:
        refusal = error
    else:
        use(log)
        return
    assert refusal.code == "eventlog.layout"
    assert refusal.expected
    assert refusal.found


@patient
@given(st.binary(max_size=400))
def test_random_bytes_are_a_log_or_not_authentic(raw: bytes) -> None:
    """No other exception leaves the parser."""
    parse_or_refuse(raw)


@patient
@given(st.sampled_from([["sha256"], ["sha1", "sha256"], sorted(BANKS)]), st.binary(max_size=300))
def test_random_bytes_behind_a_header_are_events_or_not_authentic(banks: list[str], raw: bytes) -> None:
    """The same, deeper inside."""
    parse_or_refuse(write(banks, []) + raw)


@pytest.mark.parametrize(
    "name", ["debian-10", "tpm2tools-event-sd-boot-fedora37", "tpm2tools-event-uefivar", "sb_cert"]
)
def test_real_logs_with_anything_done_to_them_are_logs_or_not_authentic(vectors: Path, name: str) -> None:
    """Bytes are replaced, cut out and put in, at any place."""
    whole = (vectors / f"eventlog/{name}.bin").read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def mangle(data: st.DataObject) -> None:
        raw = whole
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(raw)))
            end = min(len(raw), start + data.draw(st.integers(0, 8)))
            raw = raw[:start] + data.draw(st.binary(max_size=8)) + raw[end:]
        parse_or_refuse(raw)

    mangle()


@patient
@given(logs())
def test_what_was_written_is_what_is_read(drawn: tuple[list[str], list[Written]]) -> None:
    """Every event comes back with its PCR, type, digests and data, in order."""
    banks, events = drawn
    log = parse(write(banks, events))
    assert log.algorithms == tuple(banks)
    assert [(event.pcr, event.type, dict(event.digests), event.data) for event in log.events[1:]] == events
    assert [event.index for event in log.events] == list(range(len(events) + 1))
    use(log)


@patient
@given(logs(), st.sampled_from(sorted(HASHES)))
def test_a_log_replays_as_a_tpm_would_have_extended(
    drawn: tuple[list[str], list[Written]], bank: str
) -> None:
    """Each PCR is hashed from its own events alone, in every bank."""
    banks, events = drawn
    if bank not in banks:
        bank = next((name for name in banks if name in HASHES), "")
    if not bank:
        return
    size = BANKS[bank][1]
    pcrs = {index: (b"\xff" if index in range(17, 23) else b"\0") * size for index in range(24)}
    for pcr, _, digests, _ in events:
        pcrs[pcr] = hashlib.new(bank, pcrs[pcr] + digests[bank]).digest()
    values = replay(parse(write(banks, events)), bank)
    assert {index: values.pcr(index) for index in range(24)} == pcrs
    assert set(values.values) == {event.pcr for event in events}


@patient
@given(logs(smallest=1), st.data())
def test_a_changed_lost_or_added_event_does_not_replay(
    drawn: tuple[list[str], list[Written]], data: st.DataObject
) -> None:
    """Whatever is done to the digests of quoted PCRs is noticed, in the bank that was quoted."""
    banks, events = drawn
    bank = next((name for name in banks if name in HASHES), None)
    if bank is None:
        return
    quoted = {index: replay(parse(write(banks, events)), bank).pcr(index) for index in range(24)}
    at = data.draw(st.integers(0, len(events) - 1))
    victim = events[at]
    flipped = bytes([victim.digests[bank][0] ^ 1]) + victim.digests[bank][1:]
    changed = victim._replace(digests={**victim.digests, bank: flipped})
    elsewhere = victim._replace(pcr=(victim.pcr + 1) % 24)
    silenced = victim._replace(kind=NO_ACTION, data=b"")
    for replacement in ([changed], [elsewhere], [silenced], [], [victim, victim]):
        log = parse(write(banks, events[:at] + replacement + events[at + 1 :]))
        if bank not in log.algorithms:
            continue
        with pytest.raises(NotAuthentic) as caught:
            replay_to(log, quoted, bank=bank)
        assert caught.value.code == "eventlog.replay"


@patient
@given(
    PCRS,
    TYPES,
    st.binary(max_size=200)
    | st.builds(bytes.__add__, st.sampled_from(GRUB_PREFIXES), st.binary(max_size=40))
    | st.text(max_size=60).map(lambda text: text.encode("utf-16-le", "surrogatepass"))
    | st.builds(
        lambda name, size, tail: struct.pack("<16sQQ", b"", name, size) + tail,
        st.integers(0, 8) | st.integers(0, 2**64 - 1),
        st.integers(0, 40) | st.integers(0, 2**64 - 1),
        st.binary(max_size=60),
    )
    | st.builds(
        lambda size, path: struct.pack("<QQQQ", 0, 0, 0, size) + path,
        st.integers(0, 80) | st.integers(0, 2**64 - 1),
        st.lists(
            st.builds(
                lambda kind, sub, data: struct.pack("<BBH", kind, sub, 4 + len(data)) + data,
                st.integers(0, 127),
                st.integers(0, 10),
                st.binary(max_size=20),
            ),
            max_size=4,
        ).map(b"".join),
    ),
)
def test_any_event_is_described_in_printable_ascii(pcr: int, kind: int, data: bytes) -> None:
    """Whether its data is measured, foreign or made to look like a structure."""
    digest = hashlib.sha256(data).digest()
    use(EventLog((), (Event(0, pcr, kind, {"sha256": digest}, data), Event(1, pcr, kind, {}, data)), 0))


@patient
@given(st.text(max_size=200), st.integers(3, 120))
def test_printable_text_is_short_ascii(text: str, limit: int) -> None:
    """Text that is printable ASCII already, and fits, stays as it is."""
    shown = printable(text, limit)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= limit
    if text.isascii() and text.isprintable() and len(text) <= limit:
        assert shown == text


@patient
@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_a_difference_is_told_exactly_where_there_is_one(expected: list[int], found: list[int]) -> None:
    """And it is the first: what is told of is no common beginning."""
    wanted = [(hashlib.sha256(bytes([number])).digest(), f"{number}") for number in expected]
    events = [
        Event(i, 9, SEPARATOR, {"sha256": hashlib.sha256(bytes([n])).digest()}, b"")
        for i, n in enumerate(found)
    ]
    said = first_difference(wanted, events)
    assert (said is None) == (expected == found)
    if said is not None:
        at = int(said.split()[1]) - 1
        assert expected[:at] == found[:at]
        assert expected[at : at + 1] != found[at : at + 1]
