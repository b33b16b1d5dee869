"""What nobody may learn from, or be given after all: evidence that something else speaks against than what it booted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID

from kagimori_protocol.errors import OperatorError
from kagimori_simulator import faults
from kagimori_simulator.amd import DEFAULT_CSP_ID
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier import learning
from kagimori_verifier.release import Release
from kagimori_verifier.store import StoreUnavailable, references

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker, Prey, Told


def _asked(prey: Prey, purpose: str) -> tuple[Attacker, Told]:
    """Ask, open the answer and confirm that it was received."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose=purpose)))
    assert attacker.send_confirm(attacker.confirm(told, attacker.open(told), "received")) == "received"
    return attacker, told


def _learn(prey: Prey, told: Told) -> learning.Proposal:
    with prey.office.verifier.store.read() as txn:
        return learning.proposal(txn, told.session, "learned", 0)


@pytest.mark.parametrize(
    "lie", [faults.debug_policy, faults.migration_policy, faults.old_firmware], ids=lambda lie: lie.__name__
)
def test_nothing_is_learned_behind_a_guest_or_firmware_that_the_owner_refuses(
    prey: Prey, lie: Callable[[SnpMachine], None]
) -> None:
    """T14, T20: the host of a guest with DEBUG writes the SVSM's memory, so its TPM confirms whatever it likes."""
    lie(prey.machine)
    _, told = _asked(prey, "dry-run")
    with pytest.raises(OperatorError) as caught:
        _learn(prey, told)
    assert caught.value.code == "accept.unconfirmed"


def test_nothing_is_learned_from_a_chip_that_the_vm_may_not_run_on(prey: Prey) -> None:
    """T7, T20: anyone with one genuine machine and the public SVSM build confirms a verdict in the VM's name."""
    prey.office.change_vm("web1", chips=["77" * 64])
    _, told = _asked(prey, "dry-run")
    with pytest.raises(OperatorError):
        _learn(prey, told)


def test_what_a_new_kernel_measures_can_still_be_learned(prey: Prey) -> None:
    """PCRs that differ are what learning is for."""
    with prey.office.verifier.store.write() as txn:
        for state in references.boot_states(txn, "vm", "web1"):
            references.remove_boot_state(txn, state.id)
    _, told = _asked(prey, "dry-run")
    assert {row.owner_kind for row, _ in _learn(prey, told).states} >= {"vm"}


def _not_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the verifier die between the ledger and the answer; gives what brings it back."""

    def die(*_: object) -> bytes:
        raise StoreUnavailable("The database is gone.")

    made = Release._make_answer
    monkeypatch.setattr(Release, "_make_answer", die)
    return lambda: monkeypatch.setattr(Release, "_make_answer", made)


def test_an_answer_that_was_not_made_in_time_is_made_again(
    prey: Prey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier died between ledger and answer: the same evidence gets its keys, under the same line."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    come_back = _not_made(monkeypatch)
    with pytest.raises(StoreUnavailable):
        attacker.send(parts)
    come_back()
    assert attacker.keys(attacker.send(parts)) == {UUID: UNLOCK_KEY}
    assert prey.office.events() == ["released"]


def test_an_answer_that_was_not_made_in_time_is_not_made_once_the_owner_says_no(
    prey: Prey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner took the chip off the list while the verifier was down: the old line in the ledger is no permission."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    come_back = _not_made(monkeypatch)
    with pytest.raises(StoreUnavailable):
        attacker.send(parts)
    come_back()
    prey.office.change_vm("web1", chips=["77" * 64])
    assert attacker.send(parts).denial == "used-session"
    assert "chip.allowed" in prey.office.refusals()[0].expected


def test_root_of_a_booted_vm_without_a_tpm_gets_no_second_answer_by_letting_another_key_sign(
    direct_prey: Prey,
) -> None:
    """T4: a guest may name the key that signs its report (MSG_REPORT_REQ.KEY_SEL); its REPORT_ID stays the same."""
    direct_prey.office.change_policy(
        "direct", signers=["vcek", "vlek"], csp_ids=[DEFAULT_CSP_ID], any_chip=True
    )
    agent = direct_prey.attacker()
    assert agent.keys(agent.send(agent.evidence())) == {UUID: UNLOCK_KEY}
    direct_prey.machine.signer = "vlek"
    root = direct_prey.attacker()
    verdict = root.verdict(root.send(root.evidence()))
    assert [check.id for check in verdict.checks if not check.ok] == ["boot.ungranted"]
