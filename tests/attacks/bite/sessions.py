"""Stories of steps 1, 2, 10 and 11: messages, tokens, the owner's books, sessions, Confirms, what is learned."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.attacks import lies
from tests.attacks.attacker import SoftwareAk, recoded, t1_of
from tests.attacks.bite.story import Stopped, Story, ask_as_the_vm_does, loot, named, sent, steal
from tests.worlds import VM

from kagimori_protocol import messages, sealing
from kagimori_protocol.messages import Challenge, Confirm, Evidence, Sealed, SignedChallenge
from kagimori_simulator import faults, measured_boot
from kagimori_verifier import learning, ledger, release, token
from kagimori_verifier.release import Release
from kagimori_verifier.store import StoreUnavailable, redemptions

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker, Told
    from tests.attacks.bite.story import Scene

    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.redemptions import Redemption

TWIN, TWINS_UUID = "web2", "99999999-2222-4333-8444-555555555555"
TWINS_KEY = b"the twin's unlock key ..........".ljust(32, b".")
WEEK_S = 7 * 86_400


# Steps 1 and 2


def with_a_field_too_many(scene: Scene) -> None:
    """One reader knows a field of which the other has never heard."""
    attacker = scene.attacker()
    body = messages.encode(Evidence(**attacker.evidence()))[:-1] + b',"debug":true}'
    with named():
        told = attacker.send_bytes(body)
    assert loot(attacker, told)


def with_a_token_of_its_own(scene: Scene) -> None:
    """The attacker writes itself a challenge, with a nonce of its choice, and needs the verifier for nothing but the key."""
    attacker = scene.attacker()
    hello = attacker.hello()
    drawn = messages.decode(Challenge, attacker.challenge(hello).challenge)
    unbound = msgspec.structs.replace(drawn, nonce=bytes(32), session=b"")
    written = token.Session(
        scene.office.now_s(), unbound.nonce, hashlib.sha256(hello).digest(), token.unbound_sha256(unbound)
    )
    session = written.issued.to_bytes(8, "big") + b"".join(written[1:])
    steal(
        attacker, attacker.evidence(hello, signed(scene, msgspec.structs.replace(unbound, session=session)))
    )


def with_a_dry_runs_token(scene: Scene) -> None:
    """The token was drawn for a dry-run; Hello is rewritten before the report is made."""
    attacker = scene.attacker()
    challenge = attacker.challenge(attacker.hello(purpose="dry-run"))
    steal(attacker, attacker.evidence(attacker.hello(), challenge))


def with_a_nonce_of_its_own(scene: Scene) -> None:
    """The token is genuine, and the nonce beside it the attacker's: report and quote may be of any time."""
    attacker = scene.attacker()
    hello = attacker.hello()
    drawn = attacker.challenge(hello)
    rewritten = SignedChallenge(key=drawn.key, challenge=recoded(drawn.challenge, Challenge, nonce=bytes(32)))
    steal(attacker, attacker.evidence(hello, rewritten))


def a_week_later(scene: Scene) -> None:
    """The attacker keeps the evidence of a good moment."""
    attacker = scene.attacker()
    parts = attacker.evidence()
    scene.office.move_clock(WEEK_S)
    try:
        steal(attacker, parts)
    finally:
        scene.office.move_clock(-WEEK_S)


def after_the_owner_pulled_the_plug(scene: Scene) -> None:
    """The VM is disabled while its token is still good."""
    attacker = scene.attacker()
    parts = attacker.evidence()
    scene.office.change_vm(VM, enabled=False)
    try:
        steal(attacker, parts)
    finally:
        scene.office.change_vm(VM, enabled=True)


def only_dry_runs(scene: Scene) -> None:
    """The owner lets this VM be looked at, and nothing else."""
    scene.office.change_vm(VM, purposes=["dry-run"])


def enrol_twin(scene: Scene) -> None:
    """A second VM of the same owner, with a volume of its own."""
    scene.office.enrol_vm(TWIN, "grub")
    scene.office.enrol_volume(TWIN, TWINS_UUID, TWINS_KEY)


def the_twins_volume(scene: Scene) -> None:
    """A VM asks for the volume of another."""
    attacker = scene.attacker()
    told = sent(attacker, attacker.evidence(attacker.hello(volumes=[TWINS_UUID])))
    assert loot(attacker, told) == {TWINS_UUID: TWINS_KEY}


# Step 10: sessions and boots


def opened_already(scene: Scene) -> None:
    """The agent of this boot has opened its volumes, and something kept the cap from it."""
    attacker = scene.attacker()
    told = attacker.send(attacker.evidence())
    assert attacker.send_confirm(attacker.confirm(told, attacker.open(told))) == "opened"


def asked_already(scene: Scene) -> None:
    """The agent of this boot has its answer."""
    ask_as_the_vm_does(scene)


def redeemed_twice(scene: Scene) -> None:
    """Two pieces of evidence under one token; the goal is a second release.

    Where there is a TPM, the record of what was seen stands in the way as well (``store.conflict``); here there is none.
    """
    scene.machine.reboot()
    attacker = scene.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    steal(attacker, attacker.evidence(hello, challenge))
    steal(attacker, attacker.evidence(hello, challenge))


def under_a_policy_that_has_changed(scene: Scene) -> None:
    """The verifier died between ledger and answer, and the owner has taken the chip off the list since."""
    attacker = scene.attacker()
    parts = attacker.evidence()
    unanswered(attacker, parts)
    scene.office.change_vm(VM, chips=["77" * 64])
    try:
        steal(attacker, parts)
    finally:
        scene.office.change_vm(VM, chips=[scene.machine.chip_id.hex()])


def judged_once(patch: pytest.MonkeyPatch) -> None:
    """Take the old line in the ledger for a permission, whatever the policy says by now."""
    patch.setattr(release, "Deny", type("Never", (), {}))


def unanswered(attacker: Attacker, parts: dict[str, Any]) -> bytes:
    """Let the verifier die between the ledger and the answer; gives the request."""

    def die(*_: object) -> bytes:
        raise StoreUnavailable("The database is gone.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Release, "_make_answer", die)
        with pytest.raises(StoreUnavailable):
            attacker.send(parts)
    return messages.encode(Evidence(**parts))


# Confirms, and what is learned


def confirmed_blindly(scene: Scene) -> None:
    """A software AK quotes a boot that never was and confirms without a key; the goal is that its words are learned."""
    attacker = scene.attacker()
    told = attacker.send(unheard_of(attacker))
    confirm(attacker, told, bytes(32))
    assert learned(scene, told) == {"vm", "profile"}


def learned_without_a_confirm(scene: Scene) -> None:
    """The same, and nobody has confirmed anything."""
    attacker = scene.attacker()
    assert learned(scene, attacker.send(unheard_of(attacker))) == {"vm", "profile"}


def confirmed_without_an_answer(scene: Scene) -> None:
    """The verifier died before it made an answer, so no confirm key exists; the attacker uses an empty one."""
    attacker = scene.attacker()
    parts = unheard_of(attacker)
    request = unanswered(attacker, parts)
    session = messages.decode(Challenge, parts["challenges"][0].challenge).session
    mac = sealing.confirm_mac(bytes(32), attacker.binding_of(request), "received")
    body = messages.encode(Confirm(version=1, session=session, outcome="received", mac=mac))
    accepted(attacker, attacker.send_confirm(body))


def undone(scene: Scene) -> None:
    """The host plays ``failed`` of a VM after its ``opened``, so that the ledger ends with it."""
    attacker = scene.attacker()
    scene.machine.reboot()
    told = attacker.send(attacker.evidence())
    payload = attacker.open(told)
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, payload, "opened")))
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, payload, "failed")))
    assert scene.office.events(told.session)[-1] == "confirmed-failed"


def opened_by_a_verdict(scene: Scene) -> None:
    """Who got a verdict claims to have opened its volumes."""
    attacker = scene.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, attacker.open(told), "opened")))
    assert scene.office.events(told.session) == ["judged", "confirmed-opened"]


def everything_is_keys(patch: pytest.MonkeyPatch) -> None:
    """Forget what was decided, and take every session for one that has keys."""
    found = redemptions.find

    def find(txn: Txn, session: bytes) -> Redemption | None:
        row = found(txn, session)
        return None if row is None else replace(row, decision="keys")

    patch.setattr(redemptions, "find", find)


def behind_debug(scene: Scene) -> None:
    """The host of a guest with DEBUG writes the SVSM's memory, so even its Confirm proves nothing; it is to be learned."""
    attacker = scene.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, attacker.open(told), "received")))
    assert learned(scene, told) == {"vm", "profile"}


def worth_learning(patch: pytest.MonkeyPatch) -> None:
    """Keep what every machine showed."""
    patch.setattr(release, "_is_worth_learning", lambda _decision: True)


def for_another_profile(scene: Scene) -> None:
    """What a VM showed under one profile's policy is to become the reference of another profile."""
    attacker = scene.attacker()
    told = attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))
    accepted(attacker, attacker.send_confirm(attacker.confirm(told, attacker.open(told), "received")))
    scene.office.change_vm(VM, profile="other")
    try:
        assert learned(scene, told) == {"vm", "profile"}
    finally:
        scene.office.change_vm(VM, profile="grub")


def an_initramfs_for_all(scene: Scene) -> None:
    """An owner is talked into keeping one VM's initramfs in the profile that all VMs share."""
    with scene.office.verifier.store.read() as txn:
        policy = learning.policy_of(txn, "profile", "grub")
    pcrs = {"9": {"digest": "5a" * 32, "events": []}}
    with named():
        state = learning.boot_state(policy, "profile", "grub", "shared", pcrs, [9], "a friend", 0)
    assert set(state.pcrs) == {"9"}


def history_rewritten(scene: Scene) -> None:
    """Whoever has the database takes the VM's name off a release, and the owner is to believe what is left."""
    ask_as_the_vm_does(scene)
    with closing(sqlite3.connect(scene.office.directory / "verifier.db")) as database, database:
        database.execute("DROP TRIGGER IF EXISTS ledger_no_update")
        database.execute("UPDATE ledger SET vm_id = 'nobody'")
    with scene.office.verifier.store.read() as txn, named():
        ledger.verify(txn)


def unheard_of(attacker: Attacker) -> dict[str, Any]:
    """Make evidence of a boot that nobody knows, quoted by a software AK: refused for its PCRs alone, so learnable."""
    ak = SoftwareAk()
    parts = attacker.evidence(attacker.hello(ak_public=ak.public, purpose="dry-run"))
    boot = measured_boot.grub(initramfs=b"an attacker's initramfs")
    values = {index: boot.pcr(index) for index in (*lies.GOVERNED, 15)}
    return parts | ak.quote(t1_of(parts), values) | {"event_log": boot.event_log()}


def confirm(attacker: Attacker, told: Told, key: bytes) -> None:
    """Confirm with a key."""
    assert isinstance(told.message, Sealed)
    mac = sealing.confirm_mac(key, attacker.binding(told), "received")
    body = messages.encode(Confirm(version=1, session=told.message.session, outcome="received", mac=mac))
    accepted(attacker, attacker.send_confirm(body))


def accepted(attacker: Attacker, said: str) -> None:
    """Go on if a Confirm was taken."""
    if said not in ("received", "opened", "failed", "reencrypted"):
        raise Stopped(attacker.office.refusals()[0].code)


def learned(scene: Scene, told: Told) -> set[str]:
    """Accept a session as the owner does; gives whose reference values it would change."""
    with scene.office.verifier.store.read() as txn, named():
        return {row.owner_kind for row, _ in learning.proposal(txn, told.session, "learned", 0).states}


def signed(scene: Scene, challenge: Challenge) -> SignedChallenge:
    """Say that this verifier has signed a challenge: its key is public, and the signature does not travel back."""
    return SignedChallenge(key=scene.office.public_key, challenge=messages.encode(challenge))


def debug(scene: Scene) -> None:
    """Launch the guest so that the host may write its memory."""
    faults.debug_policy(scene.machine)


def another_profile(scene: Scene) -> None:
    """The owner has a second profile."""
    scene.office.enrol_profile("other", "grub", "svsm-vtpm", b"\x66" * 48)


STORIES: tuple[Story, ...] = (
    Story("T22: a message with a field too many", ("message.decode",), with_a_field_too_many),
    Story("T8: a token that nobody made", ("session.token",), with_a_token_of_its_own),
    Story("T4: a dry-run's token for an unlock", ("session.hello",), with_a_dry_runs_token),
    Story("T8: a nonce of the attacker's choice", ("session.challenge",), with_a_nonce_of_its_own),
    Story("T8: evidence kept for a week", ("session.fresh",), a_week_later),
    Story("T19: a VM that was disabled", ("vm.enabled",), after_the_owner_pulled_the_plug),
    Story("T19: a VM that may only be looked at", ("vm.purpose",), ask_as_the_vm_does, prepare=only_dry_runs),
    Story(
        "T19: another VM's volume",
        ("vm.volumes", "volume.removed", "box.broken"),
        the_twins_volume,
        prepare=enrol_twin,
    ),
    Story("T4: a boot that is open", ("boot.unopened",), ask_as_the_vm_does, prepare=opened_already),
    Story(
        "T4: a boot without a TPM that has its key",
        ("boot.ungranted",),
        ask_as_the_vm_does,
        "direct",
        asked_already,
    ),
    Story("T8: one token, two releases", ("session.unused", "session.raced"), redeemed_twice, "direct"),
    Story(
        "T19: an old line in the ledger for a permission",
        ("session.unused",),
        under_a_policy_that_has_changed,
        twins={"session.unused": judged_once},
    ),
    Story("T9: a Confirm that nobody could make", ("confirm.mac",), confirmed_blindly),
    Story("T9: a Confirm of an answer that never was", ("confirm.session",), confirmed_without_an_answer),
    Story("T9: a Confirm that undoes another", ("confirm.order",), undone),
    Story(
        "T9: a verdict that opens a disk",
        ("confirm.order",),
        opened_by_a_verdict,
        twins={"confirm.order": everything_is_keys},
    ),
    Story("T9, T20: a software AK that is learned from", ("accept.unconfirmed",), learned_without_a_confirm),
    Story(
        "T14, T20: a boot behind DEBUG that is learned from",
        ("accept.unconfirmed",),
        behind_debug,
        prepare=debug,
        twins={"accept.unconfirmed": worth_learning},
    ),
    Story(
        "T20: one profile's boot for another's",
        ("accept.profile",),
        for_another_profile,
        prepare=another_profile,
    ),
    Story("T19, T20: one VM's initramfs for all", ("reference.vm-owned",), an_initramfs_for_all),
    Story("T20: a ledger that was rewritten", ("ledger.broken",), history_rewritten),
)
