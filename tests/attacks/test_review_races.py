"""Many hands at once: one session is used once, whoever is faster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
from tests.attacks.attacker import UNLOCK_KEY, UUID, in_process

from kagimori_protocol import messages
from kagimori_protocol.messages import Denial, Evidence

if TYPE_CHECKING:
    from tests.attacks.attacker import Prey

HANDS = 8


def test_the_same_evidence_from_many_hands_at_once_gets_one_answer_and_one_line(prey: Prey) -> None:
    """A retry that overtakes the first request must not make a second answer, nor a second line in the ledger."""
    attacker = prey.attacker()
    request = messages.encode(Evidence(**attacker.evidence()))
    post = in_process(prey.office)
    with ThreadPoolExecutor(HANDS) as hands:
        answers = set(hands.map(lambda _: post(messages.PATH_RELEASE, request), range(HANDS)))
    assert len(answers) == 1
    assert prey.office.events() == ["released"]
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}


def test_of_different_evidence_for_one_session_only_one_is_ever_answered(prey: Prey) -> None:
    """Each is authentic in itself: the same challenge, a report and a quote of its own."""
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    requests = [messages.encode(Evidence(**attacker.evidence(hello, challenge))) for _ in range(HANDS)]
    assert len(set(requests)) == HANDS
    post = in_process(prey.office)
    with ThreadPoolExecutor(HANDS) as hands:
        replies = [
            messages.decode_answer(body)
            for body in hands.map(lambda body: post(messages.PATH_RELEASE, body), requests)
        ]
    assert [getattr(reply, "code", "answered") for reply in replies].count("answered") == 1
    assert {reply.code for reply in replies if isinstance(reply, Denial)} == {"used-session"}
    assert prey.office.events() == ["released"]


def test_many_sessions_of_one_boot_without_a_tpm_get_one_answer_with_keys(direct_prey: Prey) -> None:
    """T4: root of a booted VM races its own agent; the claim on the boot is made in the transaction that redeems."""
    attacker = direct_prey.attacker()
    requests = [messages.encode(Evidence(**attacker.evidence())) for _ in range(HANDS)]
    post = in_process(direct_prey.office)
    with ThreadPoolExecutor(HANDS) as hands:
        list(hands.map(lambda body: post(messages.PATH_RELEASE, body), requests))
    assert sorted(direct_prey.office.events()) == ["refused"] * (HANDS - 1) + ["released"]


def test_a_sender_cannot_fill_the_owners_disk_or_drive_the_owners_terminal_with_what_is_refused(
    prey: Prey,
) -> None:
    """T22: an unknown field's name is quoted in the reason, and may be a megabyte of anything."""
    name = "\x1b]0;owned\x07" + "x" * 900_000
    body = msgspec.json.encode({"type": "hello", "version": 1, name: 1})
    assert prey.attacker().refused_challenge(body) == "malformed"
    kept = prey.office.refusals()[0]
    assert len(kept.found) + len(kept.expected) <= 2000
    assert kept.found.isprintable()
