"""Enrolments (ADR 9): what an honest one leaves behind, and what nobody gets by one (THREATS T18, T20)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.attacks.attacker import UNLOCK_KEY, UUID, Attacker, Prey, Told, judged, t0_of
from tests.attacks.bite.sessions import unanswered
from tests.worlds import VM, Owner

from kagimori_protocol.enrol_code import EnrolCode
from kagimori_protocol.messages import Keys
from kagimori_simulator import measured_boot, pe
from kagimori_simulator.vtpm import Vtpm
from kagimori_verifier import enrolling
from kagimori_verifier.store import enrolments, vms

NEW = "77777777-2222-4333-8444-555555555555"
DATA = "88888888-2222-4333-8444-555555555555"
DAY_S = 86_400


@pytest.fixture
def code(office: Owner) -> Callable[..., EnrolCode]:
    """Make codes for the VM, which may enrol."""

    def make(life_s: int = enrolling.CODE_S) -> EnrolCode:
        office.change_vm(VM, purposes=["unlock", "dry-run", "enrol"])
        with office.verifier.store.write() as txn:
            return enrolling.make_code(txn, VM, office.now_s(), life_s)[0]

    return make


def parts_of(attacker: Attacker, code: EnrolCode, *volumes: str, **changes: object) -> dict[str, Any]:
    """Collect the evidence of an enrolment."""
    asked = {"purpose": "enrol", "volumes": list(volumes or (NEW,))}
    parts = attacker.evidence(attacker.hello(**(asked | changes)))
    return parts | {"enrol_proof": code.prove(t0_of(parts))}


def enrolled(attacker: Attacker, code: EnrolCode, *volumes: str) -> tuple[Told, Keys]:
    """Enrol, and give the answer with its keys."""
    told = attacker.send(parts_of(attacker, code, *volumes))
    payload = attacker.open(told)
    assert isinstance(payload, Keys), payload
    return told, payload


def refused(office: Owner, told: Told, check: str) -> None:
    """Hold both sides: the sender learned that it is not believed, the owner by which check; no code is spent by it."""
    assert (told.denial, office.refusals()[0].code) == ("not-authentic", check)
    assert set(office.events()) <= {"enrol-code", "released", "volume-enrolled", "confirmed-opened"}


def states(office: Owner) -> dict[str, str]:
    """Give the state of each volume of the VM."""
    with office.verifier.store.read() as txn:
        return {row.uuid: row.state for row in vms.volumes(txn, VM, state=None)}


def provenance(office: Owner) -> dict[str, str]:
    """Give where each volume's key was made."""
    with office.verifier.store.read() as txn:
        return {row.uuid: row.provenance for row in enrolments.of_vm(txn, VM)}


def test_an_enrolment_gives_new_keys_that_open_nothing_before_its_vm_has_confirmed(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """One code, two volumes: staged, then active; the next boot unlocks by the keys that were enrolled."""
    attacker = prey.attacker()
    told, payload = enrolled(attacker, code(), NEW, DATA)
    keys = {one.uuid: one.unlock_key for one in payload.volumes}
    assert list(keys) == [NEW, DATA]
    assert len({UNLOCK_KEY, *keys.values()}) == 3
    assert {one.header_epoch for one in payload.volumes} == {1}
    assert states(prey.office) == {UUID: "active", NEW: "staged", DATA: "staged"}
    early = attacker.send(attacker.evidence(attacker.hello(volumes=[NEW])))
    assert early.denial == "not-authentic"
    assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    assert states(prey.office) == {UUID: "active", NEW: "active", DATA: "active"}
    events = prey.office.events(told.session)
    assert events == ["released", "volume-enrolled", "volume-enrolled", "confirmed-opened"]
    prey.machine.reboot()
    later = prey.attacker()
    assert later.keys(later.send(later.evidence(later.hello(volumes=[DATA, NEW, UUID])))) == {
        **keys,
        UUID: UNLOCK_KEY,
    }


def test_the_code_never_travels_and_rests_nowhere(prey: Prey, code: Callable[..., EnrolCode]) -> None:
    """Neither request nor reply nor database has it, in any spelling that it is typed in."""
    made = code()
    told, _ = enrolled(prey.attacker(), made)
    kept = (prey.office.directory / "verifier.db").read_bytes()
    kept += (prey.office.directory / "verifier.db-wal").read_bytes()
    for spelling in (made.text().encode(), made.text().replace("-", "").encode(), made._secret):
        assert spelling not in told.request + told.body + kept


def test_the_same_evidence_gets_the_same_keys_and_other_evidence_none(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """A lost reply costs no code; a host that keeps one back and asks itself gets nothing by it."""
    made, attacker = code(), prey.attacker()
    parts = parts_of(attacker, made)
    first = attacker.send(parts)
    assert attacker.send(parts).body == first.body
    judged(attacker, attacker.send(parts_of(attacker, made)), "enrol.code")
    assert states(prey.office)[NEW] == "staged"


def test_an_answer_that_its_verifier_did_not_live_to_make_is_made_with_the_same_key(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """The code is used with the ledger's line, and the key that was kept with it is the one that is given."""
    attacker = prey.attacker()
    parts = parts_of(attacker, code())
    unanswered(attacker, parts)
    with prey.office.verifier.store.read() as txn:
        (row,) = vms.volumes(txn, VM, state="staged")
    kept = prey.office.verifier.unlock_keys.unwrap(row.wrapped, VM, NEW, row.version)
    assert attacker.keys(attacker.send(parts)) == {NEW: kept}


def test_a_volume_that_the_vm_has_gets_no_key_by_an_enrolment(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """Never an existing key, nor another one in its place."""
    attacker = prey.attacker()
    made = code()
    for volumes in ([UUID], [], [NEW, NEW], [NEW, UUID]):
        told = attacker.send(parts_of(attacker, made, volumes=volumes))
        refused(prey.office, told, "vm.volumes")


@pytest.mark.parametrize("purpose", ["unlock", "dry-run"])
def test_a_proof_belongs_to_an_enrolment_alone(
    prey: Prey, code: Callable[..., EnrolCode], purpose: str
) -> None:
    """Nothing else takes it, and an enrolment without it is none."""
    attacker = prey.attacker()
    parts = parts_of(attacker, code(), UUID, purpose=purpose)
    refused(prey.office, attacker.send(parts), "evidence.parts")
    bare = parts_of(attacker, code())
    del bare["enrol_proof"]
    refused(prey.office, attacker.send(bare), "evidence.parts")


def test_a_proof_that_was_changed_on_its_way_spends_no_code(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """A host can spoil an attempt; the operator types the same code again."""
    made, attacker = code(), prey.attacker()
    parts = parts_of(attacker, made)
    spoilt = bytes([parts["enrol_proof"][0] ^ 1]) + parts["enrol_proof"][1:]
    judged(attacker, attacker.send(parts | {"enrol_proof": spoilt}), "enrol.proof")
    assert enrolled(attacker, made)


def test_a_newer_code_ends_an_older_one_and_time_ends_both(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """One code is good at a time."""
    older, newer, attacker = code(), code(), prey.attacker()
    judged(attacker, attacker.send(parts_of(attacker, older)), "enrol.proof")
    prey.office.move_clock(DAY_S + 1)
    judged(attacker, attacker.send(parts_of(attacker, newer)), "enrol.code")


def test_nobody_enrols_on_a_machine_that_the_owner_refuses(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """A code stands in for no rule about chip and firmware, and is not spent by a refusal."""
    made = code()
    prey.office.change_vm(VM, chips=["77" * 64])
    attacker = prey.attacker()
    judged(attacker, attacker.send(parts_of(attacker, made)), "chip.allowed")
    prey.office.change_vm(VM, chips=[prey.machine.chip_id.hex()])
    assert enrolled(attacker, made)


def test_a_vm_that_is_not_given_the_purpose_may_not_enrol(prey: Prey, code: Callable[..., EnrolCode]) -> None:
    """Whatever code it has."""
    made = code()
    prey.office.change_vm(VM, purposes=["unlock", "dry-run"])
    attacker = prey.attacker()
    refused(prey.office, attacker.send(parts_of(attacker, made)), "vm.purpose")


def test_what_a_boot_that_nothing_explains_has_enrolled_waits_for_the_owner(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """The host boots its own system, and the owner types the code there: the good system does not open its disk later."""
    with Vtpm.start(prey.office.directory / "evil") as vtpm:
        vtpm.play(measured_boot.grub(kernel=pe.image({".text": b"the host's own kernel"})))
        evil = Prey(prey.office, prey.machine, type(prey.monitor)(prey.machine, vtpm), vtpm)
        with evil.stack:
            attacker = evil.attacker()
            told, payload = enrolled(attacker, code())
            assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    assert states(prey.office)[NEW] == "waiting"
    line = prey.office.ledger(told.session)[0]
    assert any("not explained" in check["found"] for check in line.body["checks"])
    prey.machine.reboot()
    good = prey.attacker()
    judged(good, good.send(good.evidence(good.hello(volumes=[NEW]))), "volume.accepted")
    with prey.office.verifier.store.write() as txn:
        waiting = enrolling.waiting_of(txn, told.session)
        assert [row.uuid for row in enrolling.accept(txn, waiting, 0, None)] == [NEW]
    later = prey.attacker()
    key = payload.volumes[0].unlock_key
    assert later.keys(later.send(later.evidence(later.hello(volumes=[NEW])))) == {NEW: key}


def test_a_command_line_with_doors_makes_the_volume_wait(prey: Prey, code: Callable[..., EnrolCode]) -> None:
    """What a host could reach before the enrolment is told to the owner, not taken for known."""
    prey.office.change_policy("grub", command_lines=[], accepted_doors=[])
    with Vtpm.start(prey.office.directory / "open") as vtpm:
        vtpm.play(measured_boot.grub(cmdline="root=/dev/mapper/cryptroot ro"))
        opened = Prey(prey.office, prey.machine, type(prey.monitor)(prey.machine, vtpm), vtpm)
        with opened.stack:
            attacker = opened.attacker()
            told, payload = enrolled(attacker, code())
            assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    assert states(prey.office)[NEW] == "waiting"
    (check,) = (
        one for one in prey.office.ledger(told.session)[0].body["checks"] if one["id"] == "cmdline.doors"
    )
    assert check["ok"]
    assert "resume" in check["found"]


def test_keys_that_were_not_added_are_dropped(prey: Prey, code: Callable[..., EnrolCode]) -> None:
    """``failed`` takes them back, and nothing brings them back after that."""
    attacker = prey.attacker()
    told, payload = enrolled(attacker, code())
    assert attacker.send_confirm(attacker.confirm(told, payload, "failed")) == "failed"
    assert states(prey.office) == {UUID: "active"}
    assert attacker.send_confirm(attacker.confirm(told, payload, "opened")) == "not-authentic"
    assert prey.office.events(told.session) == ["released", "enrol-dropped", "confirmed-failed"]


def test_a_key_that_nobody_has_confirmed_gives_way_to_the_next_enrolment_and_to_time(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """An agent that died before its Confirm is no reason to be locked out of enrolling."""
    attacker = prey.attacker()
    first, lost = enrolled(attacker, code())
    _, payload = enrolled(attacker, code())
    assert payload.volumes[0].unlock_key != lost.volumes[0].unlock_key
    assert attacker.send_confirm(attacker.confirm(first, lost)) == "not-authentic"
    assert prey.office.refusals()[0].code == "confirm.order"
    prey.office.move_clock(enrolling.STAGED_S + 1)
    code()
    assert states(prey.office) == {UUID: "active"}


def test_the_host_may_know_a_volume_key_until_the_volume_was_reencrypted(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """Every verdict says so, and none is a no because of it."""
    attacker = prey.attacker()
    told, payload = enrolled(attacker, code())
    attacker.send_confirm(attacker.confirm(told, payload))

    def said() -> str:
        asked = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run", volumes=[NEW])))
        verdict = attacker.verdict(asked)
        assert verdict.allowed
        return next(check.found for check in verdict.checks if check.id == "volume.provenance")

    assert "the host may know" in said()
    assert provenance(prey.office)[NEW] == "unknown"
    assert attacker.send_confirm(attacker.confirm(told, payload, "reencrypted")) == "reencrypted"
    assert "made in this VM" in said()
    assert provenance(prey.office)[NEW] == "attested-vm"
    assert attacker.send_confirm(attacker.confirm(told, payload, "failed")) == "not-authentic"


def test_a_boot_that_has_enrolled_gets_no_key_by_an_unlock(
    prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """An installed system without an agent in its initramfs is not capped; nothing in it may ask for what it enrolled."""
    attacker = prey.attacker()
    told, payload = enrolled(attacker, code())
    attacker.send_confirm(attacker.confirm(told, payload))
    judged(attacker, attacker.send(attacker.evidence(attacker.hello(volumes=[NEW]))), "boot.unopened")


def test_a_vm_without_a_tpm_enrols_by_its_measurement(
    direct_prey: Prey, code: Callable[..., EnrolCode]
) -> None:
    """There is nothing left unexplained, and its one grant of this boot is for an unlock."""
    attacker = direct_prey.attacker()
    told, payload = enrolled(attacker, code())
    assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    assert states(direct_prey.office)[NEW] == "active"
    bare = parts_of(attacker, code(), DATA)
    del bare["enrol_proof"]
    refused(direct_prey.office, attacker.send(bare), "evidence.parts")
