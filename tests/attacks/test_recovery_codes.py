"""The recovery key of an enrolment (ADR 11): who gets it, when, and how long it rests at the verifier (THREATS T20)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest
from msgspec import UNSET
from tests.attacks.attacker import Attacker, Prey, Told
from tests.attacks.bite.sessions import unanswered
from tests.attacks.test_enrolments import DATA, DAY_S, NEW, enrolled, parts_of
from tests.worlds import VM, Owner

from kagimori_protocol.enrol_code import EnrolCode
from kagimori_protocol.errors import OperatorError
from kagimori_protocol.messages import Keys, Outcome
from kagimori_verifier import enrolling
from kagimori_verifier.store import enrolments
from kagimori_verifier.wrapping import BoxBroken


@dataclass
class Codes:
    """An owner who has his recovery keys on paper."""

    office: Owner

    def make(self, life_s: int = enrolling.CODE_S, *, recovery: bool = True) -> tuple[EnrolCode, bytes]:
        """Make a one-time code, and the recovery key that comes with it."""
        key, unlock_keys = secrets.token_bytes(32), self.office.verifier.unlock_keys
        self.office.change_vm(VM, purposes=["unlock", "dry-run", "enrol"])

        def wrapped(code_key: bytes) -> bytes:
            return unlock_keys.wrap_recovery_key(key, VM, code_key)

        with self.office.verifier.store.write() as txn:
            made = enrolling.make_code(txn, VM, self.office.now_s(), life_s, wrapped if recovery else None)
        return made[0], key

    def kept(self) -> bool:
        """Tell whether the verifier still has one."""
        with self.office.verifier.store.read() as txn:
            row = enrolments.code(txn, VM)
        return row is not None and row.recovery is not None


@pytest.fixture
def codes(office: Owner) -> Codes:
    """Give an owner with paper."""
    return Codes(office)


def keys_of(attacker: Attacker, told: Told) -> Keys:
    """Open an answer that has keys."""
    payload = attacker.open(told)
    assert isinstance(payload, Keys), payload
    return payload


def test_one_recovery_key_comes_with_the_new_keys_and_is_forgotten_once_they_are_confirmed(
    prey: Prey, codes: Codes
) -> None:
    """The ledger tells that it was given, and to which volumes; no unlock ever gives it again."""
    attacker = prey.attacker()
    code, key = codes.make()
    told, payload = enrolled(attacker, code, NEW, DATA)
    assert payload.recovery_key == key
    assert codes.kept()
    assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    assert not codes.kept()
    assert prey.office.events(told.session)[:2] == ["released", "recovery-given"]
    assert prey.office.ledger(told.session)[1].body == {"volumes": [NEW, DATA]}
    prey.machine.reboot()
    later = prey.attacker()
    answer = later.send(later.evidence(later.hello(volumes=[DATA, NEW])))
    assert keys_of(later, answer).recovery_key is UNSET


def test_without_paper_there_is_no_recovery_key(prey: Prey, codes: Codes) -> None:
    """Nobody asked for one, so no keyslot is made that somebody might find."""
    code, _ = codes.make(recovery=False)
    assert enrolled(prey.attacker(), code)[1].recovery_key is UNSET


def test_the_same_evidence_gets_the_same_recovery_key_also_from_a_verifier_that_died(
    prey: Prey, codes: Codes
) -> None:
    """What lies on paper is what the disk gets, however often an answer has to be made."""
    attacker = prey.attacker()
    code, key = codes.make()
    parts = parts_of(attacker, code)
    unanswered(attacker, parts)
    assert keys_of(attacker, attacker.send(parts)).recovery_key == key
    assert keys_of(attacker, attacker.send(parts)).recovery_key == key


@pytest.mark.parametrize("outcome", ["failed", "opened"])
def test_nothing_that_was_confirmed_leaves_a_recovery_key_behind(
    prey: Prey, codes: Codes, outcome: Outcome
) -> None:
    """Added or not: the agent has heard it, and who has the KEK later shall not."""
    attacker = prey.attacker()
    told, payload = enrolled(attacker, codes.make()[0])
    assert attacker.send_confirm(attacker.confirm(told, payload, outcome)) == outcome
    assert not codes.kept()


def test_another_code_takes_the_place_of_the_recovery_key_too(prey: Prey, codes: Codes) -> None:
    """The paper of a code that was replaced opens nothing; one without paper takes it away."""
    _, older = codes.make()
    code, newer = codes.make()
    assert older != newer
    assert enrolled(prey.attacker(), code)[1].recovery_key == newer
    codes.make(recovery=False)
    assert not codes.kept()


def ask(prey: Prey) -> None:
    """Let another request be redeemed."""
    attacker = prey.attacker()
    attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))


def test_time_ends_a_recovery_key_with_its_code(prey: Prey, codes: Codes) -> None:
    """The next request that comes in takes it away, whoever's it is."""
    codes.make()
    prey.office.move_clock(DAY_S + 1)
    assert codes.kept()
    ask(prey)
    assert not codes.kept()


def test_an_answer_that_is_asked_for_again_after_its_code_has_ended_is_the_same(
    prey: Prey, codes: Codes
) -> None:
    """A code that ends while its session lives takes nothing from an answer that has been promised."""
    attacker = prey.attacker()
    code, key = codes.make(life_s=30)
    parts = parts_of(attacker, code)
    unanswered(attacker, parts)
    prey.office.move_clock(40)
    with prey.office.verifier.store.write() as txn:  # as any other request does
        enrolling.drop_old_recoveries(txn, prey.office.now_s())
    assert keys_of(attacker, attacker.send(parts)).recovery_key == key
    prey.office.move_clock(enrolling.SESSION_S)
    ask(prey)
    assert not codes.kept()


def test_an_answer_is_not_made_without_the_recovery_key_that_its_owner_believes_in(
    prey: Prey, codes: Codes
) -> None:
    """The verifier died, and another code was made before it could answer: the paper of the first opens nothing."""
    attacker = prey.attacker()
    parts = parts_of(attacker, codes.make()[0])
    unanswered(attacker, parts)
    codes.make()
    with pytest.raises(OperatorError) as caught:
        attacker.send(parts)
    assert caught.value.code == "recovery.gone"


def test_a_kept_recovery_key_is_good_for_one_vm_and_one_code(prey: Prey, codes: Codes) -> None:
    """Who writes the database moves none to a code of his own."""
    unlock_keys = prey.office.verifier.unlock_keys
    codes.make()
    with codes.office.verifier.store.read() as txn:
        row = enrolments.code(txn, VM)
    assert row is not None
    assert row.recovery is not None
    assert "recovery" not in repr(row)
    for vm_id, code_key in (("web2", row.public_key), (VM, bytes(32))):
        with pytest.raises(BoxBroken):
            unlock_keys.unwrap_recovery_key(row.recovery, vm_id, code_key)
