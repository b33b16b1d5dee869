"""Event logs: layout, replay, what digests vouch for, names for people, and the judgement of a boot."""

from __future__ import annotations

import functools
import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import suppress

from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import events
from tests.fuzz.target import Mutate, Target

from kagimori_protocol import messages
from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.messages import Verdict
from kagimori_simulator import measured_boot
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_verifier.appraise.boot import appraise_boot
from kagimori_verifier.appraise.policy import Policy, TcbFloor
from kagimori_verifier.appraise.reference import BootState, PcrReference, References
from kagimori_verifier.examine import eventlog as examine
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.eventlog import Event, EventLog, parse, replay, replay_to
from kagimori_verifier.verify.eventlog_layout import EV_NO_ACTION, HASHES, MAX_EVENTS
from kagimori_verifier.verify.eventlog_measured import measured_part
from kagimori_verifier.verify.eventlog_names import LINE_LENGTH, describe

MOST_TAMPERED = 2
"""Events of one log that are flipped one at a time: each costs a replay."""


def boots() -> list[MeasuredBoot]:
    """Give a boot of each way."""
    return [measured_boot.grub(), measured_boot.uki(), measured_boot.direct()]


@functools.cache
def references() -> References:
    """Give what an owner learnt of one boot, so that an input is another."""
    log = parse(measured_boot.grub().event_log())
    values = replay(log)
    states = {
        pcr: PcrReference(
            values.pcr(pcr),
            tuple((e.digest(), describe(e)) for e in log.events if e.pcr == pcr and e.type != EV_NO_ACTION),
        )
        for pcr in range(16)
    }
    policy = Policy(boot_way="grub", tcb_floors={"Milan": TcbFloor(boot_loader=0, tee=0, snp=0, microcode=0)})
    state = BootState("first boot", states)
    return References(policy, frozenset(), (state,), (state,))


def run(data: bytes) -> None:
    """Do everything that the verifier does with a log, and what its command does with one that it refuses."""
    try:
        log = parse(data)
    except NotAuthentic:
        check_foreign(examine.parse(data))
        raise
    assert 1 <= len(log.events) <= MAX_EVENTS
    assert [event.index for event in log.events] == list(range(len(log.events)))
    for bank in log.algorithms:
        if bank in HASHES:
            check_replay(log, bank)
    for event in log.events:
        check_event(event)
    if "sha256" in log.algorithms:
        check_judgement(log)


def check_foreign(foreign: examine.ForeignLog) -> None:
    """A log that only the command reads is said to be one, and replays or says why not."""
    assert foreign.refusal
    assert foreign.padding == 0 or foreign.padding >= examine.LEAST_PADDING
    for event in (*foreign.log.events, *foreign.unmeasured):
        check_event(event)
    trail = Trail()
    values = examine.replay(trail, foreign, None)
    assert set(values) <= set(foreign.banks)
    assert trail.checks


def check_replay(log: EventLog, bank: str) -> None:
    """A log leads to what a TPM would have, and to nothing else once a digest of it is another."""
    values = replay(log, bank)
    quoted = {index: values.pcr(index) for index in range(24)}
    size = len(quoted[0])
    for index, events_of in replay_to(log, quoted, bank=bank).items():
        value = (b"\xff" if index in range(17, 23) else b"\0") * size
        if index == 0:
            value = log.startup_locality.to_bytes(size, "big")
        for event in events_of:
            value = hashlib.new(bank, value + event.digests[bank]).digest()
        assert value == quoted[index]
    extending = [event for event in log.events if event.type != EV_NO_ACTION]
    for victim in extending[:MOST_TAMPERED]:
        flipped = bytes([victim.digests[bank][0] ^ 1]) + victim.digests[bank][1:]
        other = Event(victim.index, victim.pcr, victim.type, {**victim.digests, bank: flipped}, victim.data)
        changed = tuple(other if event is victim else event for event in log.events)
        try:
            replay_to(EventLog(log.algorithms, changed, log.startup_locality), quoted, bank=bank)
        except NotAuthentic:
            continue
        raise AssertionError(f"event {victim.index} changed, and the log still leads to the quoted values")


def check_event(event: Event) -> None:
    """What is believed of an event is what was hashed, and what is told of it is one short line of ASCII."""
    for bank in event.digests:
        measured = measured_part(event, bank)
        if measured is not None:
            assert hashlib.new(bank, measured.part).digest() == event.digests[bank]
        line = describe(event, bank)
        assert line.isascii()
        assert line.isprintable()
        assert len(line) <= LINE_LENGTH


def check_judgement(log: EventLog) -> None:
    """Whatever was booted, the verdict about it can be sent, and read."""
    values = replay(log)
    pcrs = {index: values.pcr(index) for index in range(16)}
    trail = Trail()
    appraise_boot(trail, "unlock", pcrs, replay_to(log, pcrs), references())
    assert {check.id for check in trail.checks} > {f"pcr.{index}" for index in (0, 4, 7, 8, 9)}
    verdict = Verdict(confirm_key=bytes(32), allowed=not trail.failed, checks=list(trail.checks))
    assert messages.decode_payload(messages.encode(verdict)) == verdict


def seeds() -> Iterator[bytes]:
    """Give logs of each way to boot, in all banks and in one, and as TPM 1.2 wrote them."""
    for boot in boots():
        yield boot.event_log()
        yield boot.event_log(["sha256"])
    yield events.legacy([(4, 0xD, b"an old boot loader"), (8, 4, b"\xff" * 4)])
    for raw in workshop.recorded("eventlog/*.bin", "gce-tpm/*/eventlog.bin"):
        with suppress(NotAuthentic):  # of Windows, or with padding at the end
            log = parse(raw)
            yield raw
            if "sha256" in log.algorithms:
                yield events.one_of_each(log)


def worst() -> Iterator[tuple[str, bytes]]:
    """Give logs of as many events as may be, and of one event as large as may be, of the dearest types."""
    largest = BOUNDS["eventlog"].largest
    one = events.Logged(8, 0xD, {"sha256": bytes(32)}, b"")
    yield "as many events as may be", events.written(["sha256"], [one] * (MAX_EVENTS - 1))
    banks = ["sha1", "sha256", "sha384", "sha512"]
    digests = {bank: bytes(hashlib.new(bank).digest_size) for bank in banks}
    room = (largest - 200) // (12 + 4 + sum(2 + len(digest) for digest in digests.values()))
    many = events.Logged(0, 5, digests, b"")
    yield "as many events in four banks", events.written(banks, [many] * min(room, MAX_EVENTS - 1))
    for what, pcr, kind, data in (
        ("GRUB text", 8, 0xD, b"grub_cmd: "),
        ("a UKI section", 11, 0xD, b""),
        ("a UEFI variable", 7, 0x80000002, struct.pack("<16sQQ", b"", 1 << 18, 0)),
        ("an image's path", 4, 0x80000003, struct.pack("<QQQQ", 0, 0, 0, 1 << 20)),
        (
            "a boot order",
            1,
            0x80000002,
            struct.pack("<16sQQ", b"", 9, 1 << 19) + "BootOrder".encode("utf-16-le"),
        ),
    ):
        fill = b"\x04\x04\x04\x00" if kind == 0x80000003 else b"a\0"
        event = events.Logged(pcr, kind, digests, (data + fill * (1 << 20))[: largest - 400])
        yield f"one event of everything: {what}", events.written(banks, [event])
    slots = (largest - 100) // 64
    small = events.Logged(
        4, 0x80000003, {"sha256": bytes(32)}, struct.pack("<QQQQ", 0, 0, 0, 4) + b"\x04\x04\x04\0"
    )
    yield "many images", events.written(["sha256"], [small] * min(slots // 2, MAX_EVENTS - 1))


def mutate_log(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change, drop, double or swap an event and keep the log well made; now and then, change any bytes."""
    try:
        log = parse(data)
    except NotAuthentic:
        return mutate(data, limit)
    if not log.events[0].data.startswith(b"Spec ID Event03\0") or chance.random() < 0.2:
        return mutate(data, limit)
    return events.mutated(log, limit, chance, mutate)


TARGET = Target(
    name="eventlog",
    about="event logs: layout, replay, what digests vouch for, names, and the judgement of a boot",
    bound=BOUNDS["eventlog"],
    refusals=(NotAuthentic,),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=mutate_log,
    covers=(
        "kagimori_verifier.verify.eventlog",
        "kagimori_verifier.verify.eventlog_layout",
        "kagimori_verifier.verify.eventlog_measured",
        "kagimori_verifier.verify.eventlog_names",
        "kagimori_verifier.appraise.boot",
        "kagimori_verifier.examine.eventlog",
    ),
)
