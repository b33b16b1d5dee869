"""Step 8: the event log replays to the quoted values, or nothing that it says is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, denied, judged
from tests.attacks.lies import GOVERNED

from kagimori_simulator import faults, measured_boot
from kagimori_simulator.event_log import MeasuredBoot

if TYPE_CHECKING:
    from tests.attacks.attacker import Prey


@pytest.mark.parametrize("missing", [1, 40, 10_000_000])
def test_a_truncated_log_is_no_log(prey: Prey, missing: int) -> None:
    """T22: the guest cuts off the end, where the kernel that it should not have booted is told of."""
    faults.truncated_log(prey.tpm, min(missing, len(prey.tpm.event_log_path.read_bytes()) - 1))
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "eventlog.layout")


def test_no_log_at_all_explains_nothing(prey: Prey) -> None:
    """T22: the quote is perfect, and the verifier still wants to know what is behind it."""
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": b""}
    denied(prey.office, attacker.send(parts), "not-authentic", "eventlog.layout")


def test_a_log_without_events_leads_to_zeros(prey: Prey) -> None:
    """T22: a header alone is a well-formed log."""
    empty = MeasuredBoot("grub", ()).event_log(prey.tpm.banks())
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": empty}
    denied(prey.office, attacker.send(parts), "not-authentic", "eventlog.replay")


def test_an_event_that_never_reached_the_tpm_is_found_out(prey: Prey) -> None:
    """T22: the log tells of a command that GRUB did not run."""
    faults.extra_logged_event(prey.tpm, measured_boot.grub())
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "eventlog.replay")


@pytest.mark.parametrize("pcr", GOVERNED)
def test_an_event_left_out_of_the_log_is_found_out_in_every_pcr(prey: Prey, pcr: int) -> None:
    """T22: the log leaves out what came last in one PCR, whichever it is."""
    faults.missing_event(prey.tpm, measured_boot.grub(), pcr)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "eventlog.replay")
    assert f"PCR {pcr} " in prey.office.refusals()[0].found


@pytest.mark.parametrize("pcr", GOVERNED)
def test_a_pcr_that_moved_without_a_word_in_the_log_is_found_out(prey: Prey, pcr: int) -> None:
    """T22: something extended a PCR and nobody wrote down what."""
    faults.unlogged_extend(prey.tpm, pcr)
    attacker = prey.attacker()
    denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "eventlog.replay")


def test_events_in_another_order_lead_elsewhere(prey: Prey) -> None:
    """T22: the log tells the truth in the wrong order within one PCR."""
    honest = measured_boot.grub()
    commands = [event for event in honest.events if event.pcr == 8]
    others = [event for event in honest.events if event.pcr != 8]
    lie = MeasuredBoot(honest.way, (*others, *commands[::-1]), honest.startup_locality)
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": lie.event_log(prey.tpm.banks())}
    denied(prey.office, attacker.send(parts), "not-authentic", "eventlog.replay")


def test_a_startup_locality_that_the_tpm_did_not_have_is_found_out(prey: Prey) -> None:
    """T22: the log claims an H-CRTM start, which would give PCR 0 another value to begin with."""
    honest = measured_boot.grub()
    lie = MeasuredBoot(honest.way, honest.events, 3)
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": lie.event_log(prey.tpm.banks())}
    denied(prey.office, attacker.send(parts), "not-authentic", "eventlog.replay")


def test_a_log_of_another_bank_only_cannot_be_replayed(prey: Prey) -> None:
    """T22: the log has SHA-1 digests alone, which are cheaper to collide with."""
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": measured_boot.grub().event_log(["sha1"])}
    denied(prey.office, attacker.send(parts), "not-authentic", "eventlog.replay")


def test_what_the_log_says_of_the_cap_pcr_does_not_matter(prey: Prey) -> None:
    """T4: the agent caps long after the log has ended; an attacker who "explains" the cap in the log changes nothing."""
    from kagimori_simulator.event_log import EventType, same

    honest = measured_boot.grub()
    explained = MeasuredBoot(honest.way, (*honest.events, same(15, EventType.IPL, b"an innocent event\x00")))
    prey.tpm.extend(15, explained.events[-1].digest("sha256"))
    attacker = prey.attacker()
    parts = attacker.evidence() | {"event_log": explained.event_log(prey.tpm.banks())}
    judged(attacker, attacker.send(parts), "cap.off")


def test_events_of_pcrs_that_nobody_governs_are_left_alone(prey: Prey) -> None:
    """T22: other PCRs may say what they like; they neither help nor hurt."""
    from kagimori_simulator.event_log import EventType, same

    honest = measured_boot.grub()
    chatty = MeasuredBoot(honest.way, (*honest.events, same(6, EventType.IPL, b"a vendor's word\x00")))
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence() | {"event_log": chatty.event_log(prey.tpm.banks())})
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}
