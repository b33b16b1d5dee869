"""Step 10: one session, one answer; one boot, one key; and the ledger tells of each before anything leaves."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import requests
from tests.attacks.attacker import UNLOCK_KEY, UUID, Told, denied, judged
from tests.worlds import VM

from kagimori_protocol import messages, signature
from kagimori_protocol.messages import Evidence

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker, Prey
    from tests.worlds import Owner

TWIN, TWINS_UUID = "web2", "99999999-2222-4333-8444-555555555555"
RACERS = 8


def opened(attacker: Attacker) -> Told:
    """Unlock once, down to the Confirm, and do not cap."""
    told = attacker.send(attacker.evidence())
    payload = attacker.open(told)
    assert attacker.send_confirm(attacker.confirm(told, payload)) == "opened"
    return told


def test_the_same_evidence_twice_gets_the_same_bytes(prey: Prey) -> None:
    """A lost reply must not brick a boot; and a thief who repeats the evidence gets nothing that he had not seen."""
    attacker = prey.attacker()
    first = attacker.send(attacker.evidence())
    assert attacker._post(messages.PATH_RELEASE, first.request) == first.body
    assert prey.office.events() == ["released"]


def test_a_second_redemption_with_other_evidence_is_refused(prey: Prey) -> None:
    """T8: the attacker keeps a used token and brings new evidence under it, honest in every part."""
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    assert attacker.keys(attacker.send(attacker.evidence(hello, challenge))) == {UUID: UNLOCK_KEY}
    told = attacker.send(attacker.evidence(hello, challenge))
    assert told.denial == "used-session"
    refusal = prey.office.refusals()[0]
    assert (refusal.code, refusal.session) == ("session.unused", told.session)
    assert prey.office.events() == ["released"]


def test_a_refused_session_is_used_up_as_well(prey: Prey) -> None:
    """T8: the attacker mends what a verdict complained of, and sends it under the same token."""
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    prey.machine.policy |= 1 << 19
    judged(attacker, attacker.send(attacker.evidence(hello, challenge)), "policy.allowed")
    prey.machine.policy &= ~(1 << 19)
    assert attacker.send(attacker.evidence(hello, challenge)).denial == "used-session"
    assert prey.office.events() == ["refused"]


def test_a_refusal_is_not_undone_by_a_change_of_policy(prey: Prey) -> None:
    """T19: the owner relaxes the policy; evidence judged under the old one keeps its answer, byte for byte."""
    prey.machine.platform_info |= 1 << 3
    prey.office.change_policy("grub", platform_allowed=["SMT_EN", "ECC_EN", "ALIAS_CHECK_COMPLETE"])
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    judged(attacker, told, "platform.allowed")
    prey.office.change_policy("grub", platform_required=["RAPL_DIS"])
    assert attacker._post(messages.PATH_RELEASE, told.request) == told.body
    assert prey.office.events() == ["refused"]


def test_a_boot_that_has_opened_its_volumes_gets_no_second_key(prey: Prey) -> None:
    """T4: root of a booted VM that somehow was not capped asks again; the verifier remembers the boot.

    The host launches the VM again, and then it is another boot.
    """
    attacker = prey.attacker()
    opened(attacker)
    judged(attacker, attacker.send(attacker.evidence()), "boot.unopened")
    prey.machine.reboot()
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}


def test_an_answer_that_was_lost_does_not_lock_a_vm_with_a_tpm_out(prey: Prey) -> None:
    """The cap guards here: as long as nobody confirmed, the same uncapped boot may try once more."""
    attacker = prey.attacker()
    attacker.send(attacker.evidence())
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}


def test_a_vm_without_a_tpm_gets_one_answer_for_each_boot_even_as_another_vm(direct_prey: Prey) -> None:
    """T4: root of a booted VM without a TPM asks again, as itself or as the VM that its image was given to since.

    The measurement cannot tell them apart and there is no cap, so the boot's REPORT_ID is spent with one answer.
    """
    office = direct_prey.office
    attacker = direct_prey.attacker()
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}
    judged(attacker, attacker.send(attacker.evidence()), "boot.ungranted")
    office.enrol_profile("elsewhere", "direct", "snp-direct", bytes(48))
    office.change_vm(VM, profile="elsewhere")
    office.enrol_vm(TWIN, "direct")
    office.enrol_volume(TWIN, TWINS_UUID, bytes(range(32)))
    as_twin = attacker.hello(vm_id=TWIN, volumes=[TWINS_UUID])
    judged(attacker, attacker.send(attacker.evidence(as_twin)), "boot.ungranted")
    direct_prey.machine.reboot()
    assert attacker.keys(attacker.send(attacker.evidence(as_twin))) == {TWINS_UUID: bytes(range(32))}
    judged(attacker, attacker.send(attacker.evidence(as_twin)), "boot.ungranted")


def test_a_dry_run_spends_nothing(direct_prey: Prey) -> None:
    """A verdict is no key: an owner may look at a boot before it unlocks."""
    attacker = direct_prey.attacker()
    assert attacker.verdict(attacker.send(attacker.evidence(attacker.hello(purpose="dry-run")))).allowed
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}


def race(owner: Owner, requests_: list[bytes]) -> list[Told]:
    """Send all at once over HTTP, and hold each reply to its signature."""
    start = threading.Barrier(len(requests_))

    def one(request: bytes) -> Told:
        start.wait(10)
        reply = requests.post(owner.url + messages.PATH_RELEASE, data=request, timeout=30)
        signature.verify([owner.public_key], reply.headers[signature.HEADER], request, reply.content)
        return Told(request, reply.content)

    with ThreadPoolExecutor(len(requests_)) as threads:
        return list(threads.map(one, requests_))


def test_redeemers_racing_with_the_same_evidence_get_one_answer(prey: Prey, owner: Owner) -> None:
    """T8: the attacker sends one piece of evidence through many connections at once, to get more than one answer."""
    attacker = prey.attacker()
    request = messages.encode(Evidence(**attacker.evidence()))
    told = race(owner, [request] * RACERS)
    assert len({one.body for one in told}) == 1
    assert attacker.keys(told[0]) == {UUID: UNLOCK_KEY}
    assert owner.events() == ["released"]


def test_redeemers_racing_with_different_evidence_have_one_winner(prey: Prey, owner: Owner) -> None:
    """T8: the attacker collects evidence many times for one token and redeems all of it at the same moment."""
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    each = [messages.encode(Evidence(**attacker.evidence(hello, challenge))) for _ in range(RACERS)]
    told = race(owner, each)
    winners = [one for one in told if one.denial is None]
    assert [one.denial for one in told if one.denial is not None] == ["used-session"] * (RACERS - 1)
    assert attacker.keys(winners[0]) == {UUID: UNLOCK_KEY}
    assert owner.events() == ["released"]


def test_boots_racing_without_a_tpm_have_one_winner(direct_prey: Prey, owner: Owner) -> None:
    """T4: one boot without a TPM opens many sessions and redeems them all at once; REPORT_ID is spent once."""
    attackers = [direct_prey.attacker() for _ in range(RACERS)]
    told = race(owner, [messages.encode(Evidence(**one.evidence())) for one in attackers])
    payloads = [attacker.open(one) for attacker, one in zip(attackers, told, strict=True)]
    assert sum(isinstance(payload, messages.Keys) for payload in payloads) == 1
    assert sorted(owner.events()) == ["refused"] * (RACERS - 1) + ["released"]


def test_evidence_relayed_to_another_verifier_gets_nothing_there(prey: Prey, neighbour: Owner) -> None:
    """T7: the owner of another verifier, who knows a VM of this name and image, is sent this one's evidence.

    It was made for a challenge of the first; the second finds none of its own in it.
    """
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    attacker = prey.attacker(neighbour)
    relayed = Told(told.request, attacker._post(messages.PATH_RELEASE, told.request))
    denied(neighbour, relayed, "stale-session", "session.token")
    assert prey.office.events() == ["released"]


def test_an_answer_belongs_to_the_hello_that_asked_for_it(prey: Prey) -> None:
    """T9: two agents of one VM, with the same TPM; neither opens what is sealed for the other's HPKE key."""
    from kagimori_protocol.errors import NotAuthentic

    first = prey.attacker()
    told = first.send(first.evidence())
    second = prey.attacker()
    second.send(second.evidence())
    with pytest.raises(NotAuthentic):
        second.open(told)


@pytest.mark.parametrize("lie", ["outcome", "mac", "session", "answer of another session"])
def test_a_confirm_that_nobody_could_make_is_refused(prey: Prey, lie: str) -> None:
    """T4, T9: the host confirms for the VM, or bends the VM's own Confirm, so that the owner believes something else."""
    attacker = prey.attacker()
    first = attacker.send(attacker.evidence())
    told = attacker.send(attacker.evidence())
    payload = attacker.open(told)
    confirm = messages.decode(messages.Confirm, attacker.confirm(told, payload, "received"))
    foreign = attacker.confirm(first, payload, "opened")
    from msgspec.structs import replace

    bent = {
        "outcome": messages.encode(replace(confirm, outcome="opened")),
        "mac": messages.encode(replace(confirm, mac=bytes(32))),
        "session": messages.encode(
            replace(confirm, session=messages.decode(messages.Sealed, first.body).session)
        ),
        "answer of another session": foreign,
    }[lie]
    assert attacker.send_confirm(bent) == "not-authentic"
    assert prey.office.refusals()[0].code == "confirm.mac"
    assert prey.office.events() == ["released", "released"]


def test_a_confirm_for_a_session_without_an_answer_is_refused(prey: Prey) -> None:
    """T9: a token that was never redeemed, or is none, has nothing to confirm."""
    attacker = prey.attacker()
    challenge = messages.decode(messages.Challenge, attacker.challenge(attacker.hello()).challenge)
    for session in (challenge.session, b"no session"):
        body = messages.encode(messages.Confirm(version=1, session=session, outcome="opened", mac=bytes(32)))
        assert attacker.send_confirm(body) == "not-authentic"
        assert prey.office.refusals()[0].code == "confirm.session"
    assert prey.office.events() == []


def test_a_confirm_replayed_changes_nothing_and_a_later_one_does_not_undo_it(prey: Prey) -> None:
    """T9: the host keeps ``received`` and ``failed`` of a VM and plays them after its ``opened``.

    The same one again gets its receipt, since a receipt may be lost; what was final stays.
    """
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    payload = attacker.open(told)
    received, final, failed = (
        attacker.confirm(told, payload, outcome) for outcome in ("received", "opened", "failed")
    )
    assert attacker.send_confirm(received) == "received"
    assert attacker.send_confirm(final) == "opened"
    assert attacker.send_confirm(final) == "opened"
    assert attacker.send_confirm(received) == "not-authentic"
    assert attacker.send_confirm(failed) == "not-authentic"
    assert prey.office.refusals()[0].code == "confirm.order"
    assert prey.office.events() == ["released", "confirmed-received", "confirmed-opened"]


def test_a_refused_vm_cannot_claim_to_have_opened_anything(prey: Prey) -> None:
    """T9: who got a verdict holds a confirm key too; it is good for "received" and for no more."""
    prey.office.change_vm(VM, chips=[])
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    verdict = attacker.verdict(told)
    assert attacker.send_confirm(attacker.confirm(told, verdict, "opened")) == "not-authentic"
    assert attacker.send_confirm(attacker.confirm(told, verdict, "received")) == "received"
    assert prey.office.events() == ["refused", "confirmed-received"]
