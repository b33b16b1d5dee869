"""Attacks through what the verifier remembers: evidence that was believed once opens no door to evidence like it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import denied, judged
from tests.worlds import VM

from kagimori_simulator import faults, measured_boot
from kagimori_verifier.store import references
from kagimori_verifier.verify import eventlog, eventlog_layout

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker, Prey


def believed(prey: Prey) -> Attacker:
    """Let the honest VM ask twice what it would get, so that everything about it is remembered."""
    for _ in range(2):
        attacker = prey.attacker()
        asked = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
        assert attacker.verdict(asked).allowed
    return prey.attacker()


def test_a_log_is_read_once_and_told_of_each_time(prey: Prey, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the memory is for; the owner sees the same checks, and the same events to learn from."""
    believed(prey)
    monkeypatch.setattr(eventlog, "parse", None)
    monkeypatch.setattr(eventlog_layout, "read", None)
    attacker = prey.attacker()
    asked = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
    made = [check.id for check in attacker.verdict(asked).checks]
    assert {"eventlog.layout", "eventlog.replay"} <= set(made)
    lines = [entry.body["checks"] for entry in prey.office.ledger()]
    assert [[check["id"] for check in checks] for checks in lines] == [made] * 3


def test_a_remembered_log_vouches_for_its_own_values_only(prey: Prey) -> None:
    """T22: the TPM has gone on, and its host plays the log of before."""
    attacker = believed(prey)
    prey.tpm.extend(9, hashlib.sha256(b"another initramfs").digest())
    before = len(prey.office.events())
    asked = attacker.send(attacker.evidence())
    assert asked.denial == "not-authentic"
    assert prey.office.refusals()[0].code == "eventlog.replay"
    assert len(prey.office.events()) == before


def test_another_log_of_remembered_values_is_read(prey: Prey) -> None:
    """T22: the values are those of before, and the log is one byte shorter."""
    attacker = believed(prey)
    parts = attacker.evidence()
    asked = attacker.send(parts | {"event_log": parts["event_log"][:-1]})
    assert asked.denial == "not-authentic"
    assert prey.office.refusals()[0].code == "eventlog.layout"


def test_a_log_that_failed_is_not_remembered_as_one_that_holds(prey: Prey) -> None:
    """T22: asked again and again, until a memory takes it for known."""
    faults.extra_logged_event(prey.tpm, measured_boot.grub())
    for _ in range(3):
        attacker = prey.attacker()
        denied(prey.office, attacker.send(attacker.evidence()), "not-authentic", "eventlog.replay")


def test_a_policy_that_was_changed_holds_for_a_boot_that_is_remembered(prey: Prey) -> None:
    """The owner has raised a floor, and forgotten no VM by it: the very next answer is no."""
    attacker = believed(prey)
    floors = {"Milan": {"boot_loader": 4, "tee": 0, "snp": 25, "microcode": 219}}
    prey.office.change_policy("grub", tcb_floors=floors)
    asked = attacker.send(attacker.evidence())
    judged(attacker, asked, "tcb.reported", "tcb.committed", "tcb.current", "tcb.launch")


def test_a_reference_value_that_was_removed_explains_nothing_more(prey: Prey) -> None:
    """The owner has learned that this kernel has a hole, and removed its boot state."""
    attacker = believed(prey)
    with prey.office.verifier.store.write() as txn:
        for row in references.boot_states(txn, "vm", VM):
            references.remove_boot_state(txn, row.id)
    asked = attacker.send(attacker.evidence())
    judged(attacker, asked, "pcr.8", "pcr.9")


def test_a_vm_that_was_disabled_is_not_answered_from_memory(prey: Prey) -> None:
    """Between its challenge and its evidence, after many honest boots."""
    attacker = believed(prey)
    parts = attacker.evidence()
    prey.office.change_vm(VM, enabled=False)
    asked = attacker.send(parts)
    assert asked.denial == "unknown-vm"
    assert attacker.refused_challenge(attacker.hello()) == "unknown-vm"
