"""Two verifiers in two processes on one database: whoever asks both at once gets what it would have got from one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import requests
from tests.attacks.attacker import UNLOCK_KEY, UUID, Told

from kagimori_protocol import messages, signature
from kagimori_protocol.messages import Evidence

if TYPE_CHECKING:
    from tests.attacks.attacker import Attacker, Prey
    from tests.worlds import Owner

pytestmark = pytest.mark.slow  # each starts two verifiers as processes

RACERS = 12
WAIT_S = 60


@contextlib.contextmanager
def process(office: Owner) -> Iterator[str]:
    """Start ``serve`` as a process of its own; gives its URL."""
    command = [sys.executable, "-m", "kagimori_verifier"]
    command += ["--config", str(office.directory / "verifier.toml"), "serve", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        try:
            yield json.loads(running.stdout.readline())["url"]
        finally:
            running.terminate()
            running.wait(WAIT_S)


def race(office: Owner, urls: tuple[str, str], bodies: list[bytes]) -> list[Told]:
    """Send all at once, in turn to one process and the other, and hold each reply to its signature."""
    start = threading.Barrier(len(bodies))

    def one(index: int) -> Told:
        body = bodies[index]
        with requests.Session() as session:
            session.trust_env = False
            start.wait(WAIT_S)
            reply = session.post(urls[index % 2] + messages.PATH_RELEASE, data=body, timeout=WAIT_S)
        signature.verify([office.public_key], reply.headers.get(signature.HEADER), body, reply.content)
        return Told(body, reply.content)

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(one, range(len(bodies))))


def encoded(attacker: Attacker, *drawn: object) -> bytes:
    """Collect evidence and encode it."""
    return messages.encode(Evidence(**attacker.evidence(*drawn)))  # type: ignore[arg-type]  # a Hello and its challenge


def test_one_token_is_redeemed_once_by_two_processes(prey: Prey) -> None:
    """T8: evidence was collected many times under one token; half of it goes to each process at the same moment."""
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    each = [encoded(attacker, hello, challenge) for _ in range(RACERS)]
    with process(prey.office) as first, process(prey.office) as second:
        told = race(prey.office, (first, second), each)
    winners = [one for one in told if one.denial is None]
    assert [one.denial for one in told if one.denial is not None] == ["used-session"] * (RACERS - 1)
    assert attacker.keys(winners[0]) == {UUID: UNLOCK_KEY}
    assert prey.office.events() == ["released"]


def test_the_same_evidence_gets_the_same_bytes_from_two_processes(prey: Prey) -> None:
    """T8: a retry that reaches another node while the first is still at work makes no second answer."""
    attacker = prey.attacker()
    with process(prey.office) as first, process(prey.office) as second:
        told = race(prey.office, (first, second), [encoded(attacker)] * RACERS)
    assert len({one.body for one in told}) == 1
    assert attacker.keys(told[0]) == {UUID: UNLOCK_KEY}
    assert prey.office.events() == ["released"]


def test_one_boot_without_a_tpm_gets_one_key_from_two_processes(direct_prey: Prey) -> None:
    """T4: root of a booted VM without a TPM opens many sessions, with both nodes, and redeems them all at once."""
    attackers = [direct_prey.attacker() for _ in range(RACERS)]
    bodies = [encoded(one) for one in attackers]
    with process(direct_prey.office) as first, process(direct_prey.office) as second:
        told = race(direct_prey.office, (first, second), bodies)
    payloads = [attacker.open(one) for attacker, one in zip(attackers, told, strict=True)]
    assert sum(isinstance(payload, messages.Keys) for payload in payloads) == 1
    assert sorted(direct_prey.office.events()) == ["refused"] * (RACERS - 1) + ["released"]


def test_a_token_of_one_process_is_good_at_the_other_and_only_once(prey: Prey) -> None:
    """T8: nodes share the token's key, so a token can be redeemed at any of them; and the database knows of it at all."""
    attacker = prey.attacker()
    hello = attacker.hello()
    with process(prey.office) as first, process(prey.office) as second:
        with requests.Session() as session:
            session.trust_env = False
            drawn = session.post(first + messages.PATH_CHALLENGE, data=hello, timeout=WAIT_S).content
        challenge = messages.SignedChallenge(key=prey.office.public_key, challenge=drawn)
        (told,) = race(prey.office, (second, first), [encoded(attacker, hello, challenge)])
        (again,) = race(prey.office, (first, second), [encoded(attacker, hello, challenge)])
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}
    assert again.denial == "used-session"
