"""Stories of enrolments (ADR 9): codes that are missing, stolen, old or another's, and volumes that wait for their owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.attacks.attacker import UUID, t0_of
from tests.attacks.bite.sessions import accepted
from tests.attacks.bite.story import Stopped, Story, loot, named, sent, steal
from tests.worlds import VM

from kagimori_protocol.enrol_code import EnrolCode
from kagimori_verifier import enrolling, release
from kagimori_verifier.store import vms

if TYPE_CHECKING:
    from typing import Any

    import pytest
    from tests.attacks.attacker import Attacker
    from tests.attacks.bite.story import Scene

NEW: Final = "77777777-2222-4333-8444-555555555555"
TWIN: Final = "web2"


def made(scene: Scene, vm_id: str = VM, life_s: int = enrolling.CODE_S) -> EnrolCode:
    """Make a code, as the owner does."""
    with scene.office.verifier.store.write() as txn:
        return enrolling.make_code(txn, vm_id, scene.office.now_s(), life_s)[0]


def asked(attacker: Attacker, code: EnrolCode) -> dict[str, Any]:
    """Collect the evidence of an enrolment, with the proof of a code."""
    parts = attacker.evidence(attacker.hello(purpose="enrol", volumes=[NEW]))
    return parts | {"enrol_proof": code.prove(t0_of(parts))}


def enrolled(scene: Scene, parts: dict[str, Any], attacker: Attacker) -> None:
    """Send it; the goal is a key that the verifier keeps for this VM."""
    assert set(loot(attacker, sent(attacker, parts))) == {NEW}
    with scene.office.verifier.store.read() as txn:
        assert [row.uuid for row in vms.volumes(txn, VM, state="staged")] == [NEW]


def without_a_code(scene: Scene) -> None:
    """Nobody has given this VM a code; the attacker makes one up."""
    attacker = scene.attacker()
    code = EnrolCode(bytes(16), bytes(10))
    enrolled(scene, asked(attacker, code), attacker)


def by_guessing(scene: Scene) -> None:
    """The VM has a code, and the attacker another."""
    made(scene)
    attacker = scene.attacker()
    enrolled(scene, asked(attacker, EnrolCode(bytes(16), bytes(10))), attacker)


def by_a_recorded_proof(scene: Scene) -> None:
    """The host has kept back the VM's own evidence, and puts its proof beside evidence of its own."""
    code = made(scene)
    kept = asked(scene.attacker(), code)["enrol_proof"]
    attacker = scene.attacker()
    enrolled(scene, asked(attacker, code) | {"enrol_proof": kept}, attacker)


def by_another_vms_code(scene: Scene) -> None:
    """A code for the owner's other VM was seen on a screen."""
    made(scene)
    attacker = scene.attacker()
    enrolled(scene, asked(attacker, made(scene, TWIN)), attacker)


def twice(scene: Scene) -> None:
    """The code was typed where somebody looked, and has been used by who it was for."""
    code = made(scene)
    first = scene.attacker()
    enrolled(scene, asked(first, code), first)
    attacker = scene.attacker()
    enrolled(scene, asked(attacker, code), attacker)


def a_day_later(scene: Scene) -> None:
    """The code lies in a terminal's history."""
    code = made(scene, life_s=60)
    scene.office.move_clock(120)
    try:
        attacker = scene.attacker()
        enrolled(scene, asked(attacker, code), attacker)
    finally:
        scene.office.move_clock(-120)


def from_a_system_of_its_own(scene: Scene) -> None:
    """An owner typed the code into a system that the host had booted. Its volume waits, and is to be opened by the good one."""
    attacker = scene.attacker()
    steal(attacker, attacker.evidence())


def a_volume_that_waits(scene: Scene) -> None:
    """The VM's volume came from a boot that nothing explains."""
    with scene.office.verifier.store.write() as txn:
        vms.set_volume_state(txn, VM, UUID, 1, "waiting")


def any_state(patch: pytest.MonkeyPatch) -> None:
    """Give a volume's key whatever its state is."""
    found = vms.volumes
    patch.setattr(vms, "volumes", lambda txn, vm_id, **_: found(txn, vm_id, state=None))


def a_new_volume_key_in_words(scene: Scene) -> None:
    """Who has unlocked says that the volume was reencrypted, so that no verdict tells of the host any more."""
    scene.machine.reboot()
    attacker = scene.attacker()
    told = attacker.send(attacker.evidence())
    payload = attacker.open(told)
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, payload, "opened")))
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, payload, "reencrypted")))
    assert scene.office.events(told.session)[-1] == "confirmed-reencrypted"


def anything_follows(patch: pytest.MonkeyPatch) -> None:
    """Let any outcome come after any other."""
    patch.setattr(release, "_may_follow", lambda _known, _outcome: True)


def a_twin(scene: Scene) -> None:
    """The owner has a second VM."""
    scene.office.enrol_vm(TWIN, "grub")
    may_enrol(scene)
    scene.office.change_vm(TWIN, purposes=["enrol"])


def may_enrol(scene: Scene) -> None:
    """The VM may enrol."""
    scene.office.change_vm(VM, purposes=["unlock", "dry-run", "enrol"])


def dropped(scene: Scene) -> None:
    """The owner has undone an enrolment; its agent's late Confirm is to bring the key back."""
    code = made(scene)
    scene.machine.reboot()
    attacker = scene.attacker()
    told = sent(attacker, asked(attacker, code))
    payload = attacker.open(told)
    with scene.office.verifier.store.write() as txn, named():
        for row in vms.volumes(txn, VM, state="staged"):
            enrolling.undo(txn, row, scene.office.now_s())
    said = attacker.send_confirm(attacker.confirm(told, payload, "opened"))
    if said != "opened":
        raise Stopped(scene.office.refusals()[0].code)
    assert scene.office.events(told.session)[-1] == "confirmed-opened"


def nothing_is_gone(patch: pytest.MonkeyPatch) -> None:
    """Take a Confirm for keys that are gone."""
    patch.setattr(enrolling, "confirmed", lambda *_: None)


STORIES: tuple[Story, ...] = (
    Story(
        "T20: an enrolment that nobody allowed",
        ("enrol.code", "enrol.proof"),
        without_a_code,
        prepare=may_enrol,
    ),
    Story("T20: a code that was guessed", ("enrol.proof",), by_guessing, prepare=may_enrol),
    Story("T20: a proof from another exchange", ("enrol.proof",), by_a_recorded_proof, prepare=may_enrol),
    Story("T20: another VM's code", ("enrol.proof",), by_another_vms_code, prepare=a_twin),
    Story("T20: a code that was used", ("enrol.code",), twice, prepare=may_enrol),
    Story("T20: a code of yesterday", ("enrol.code",), a_day_later, prepare=may_enrol),
    Story(
        "T18, T20: a volume that a system of the host's enrolled",
        ("volume.accepted", "volume.removed"),
        from_a_system_of_its_own,
        prepare=a_volume_that_waits,
        twins={"volume.removed": any_state},
    ),
    Story(
        "T20: a new volume key that there is not",
        ("confirm.order",),
        a_new_volume_key_in_words,
        twins={"confirm.order": anything_follows},
    ),
    Story(
        "T20: an enrolment that its owner has undone",
        ("confirm.order",),
        dropped,
        prepare=may_enrol,
        twins={"confirm.order": nothing_is_gone},
    ),
)
