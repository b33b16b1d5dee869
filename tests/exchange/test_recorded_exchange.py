"""One honest exchange, recorded; then every byte of it is changed on its way, and nobody falls for it.

An answer to changed evidence is refused outright, with two exceptions that the protocol names: bytes of the event log that
no digest covers, and certificates, which are candidates only. Whoever changes those gets an answer that is bound to what
was changed, so the agent, which sent something else, cannot open it.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete
from tests.attacks.attacker import UNLOCK_KEY, UUID, Attacker, Prey, Told, closing
from tests.worlds import CHIP_ID, DIRECT, SVSM, Owner, enrol_direct_vm, enrol_grub_vm

from kagimori_agent import exchange
from kagimori_agent.exchange import Endpoint
from kagimori_agent.line import Received
from kagimori_protocol import messages
from kagimori_protocol.errors import NetworkError, NotAuthentic
from kagimori_protocol.messages import Denial, Evidence, Sealed, VersionsSpoken
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm
from kagimori_verifier.service import Reply
from kagimori_verifier.store import schema

pytestmark = pytest.mark.slow  # the quick suite has three minutes

replace = msgspec.structs.replace
_DIGEST = 32


@dataclass(frozen=True)
class Region:
    """A named part of an Evidence: how to take its bytes out, and how to put others in."""

    take: Callable[[Any], bytes]
    put: Callable[[Any, bytes], Evidence]
    authenticated: bool = True


def _in_challenge(evidence: Evidence, **changes: bytes) -> Evidence:
    return replace(evidence, challenges=[replace(evidence.challenges[0], **changes)])


def _in_quote(evidence: Evidence, **changes: bytes) -> Evidence:
    assert isinstance(evidence.quote, messages.Quote)
    return replace(evidence, quote=replace(evidence.quote, **changes))


def _in_pcrs(evidence: Evidence, content: bytes) -> Evidence:
    assert isinstance(evidence.pcrs, list)
    digests = [content[at : at + _DIGEST] for at in range(0, len(content), _DIGEST)]
    numbers = [*(value.index for value in evidence.pcrs), 23]
    pairs = zip(numbers, digests, strict=False)
    return replace(evidence, pcrs=[messages.PcrValue(index=index, digest=digest) for index, digest in pairs])


DIRECT_REGIONS = {
    "hello": Region(lambda e: e.hello, lambda e, new: replace(e, hello=new)),
    "challenge": Region(lambda e: e.challenges[0].challenge, lambda e, new: _in_challenge(e, challenge=new)),
    "challenge key": Region(lambda e: e.challenges[0].key, lambda e, new: _in_challenge(e, key=new)),
    "report": Region(lambda e: e.report, lambda e, new: replace(e, report=new)),
    "certificates": Region(
        lambda e: e.certificates, lambda e, new: replace(e, certificates=new), authenticated=False
    ),
}
TPM_REGIONS = {
    "manifest": Region(lambda e: e.manifest, lambda e, new: replace(e, manifest=new)),
    "quote": Region(lambda e: e.quote.attest, lambda e, new: _in_quote(e, attest=new)),
    "quote signature": Region(lambda e: e.quote.signature, lambda e, new: _in_quote(e, signature=new)),
    "PCR values": Region(lambda e: b"".join(value.digest for value in e.pcrs), _in_pcrs),
    "event log": Region(lambda e: e.event_log, lambda e, new: replace(e, event_log=new), authenticated=False),
}
ALL_REGIONS = DIRECT_REGIONS | TPM_REGIONS

CHANGES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "changed": lambda raw, at, mask: raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :],
    "dropped": lambda raw, at, _: raw[:at] + raw[at + 1 :],
    "doubled": lambda raw, at, _: raw[: at + 1] + raw[at:],
}
"""What happens to one byte on its way."""


class Recorded:
    """An honest exchange up to the evidence, which nobody has redeemed yet, and the verifier that waits for it."""

    def __init__(self, owner: Owner, attacker: Attacker) -> None:
        self.owner = owner
        self.attacker = attacker
        self.service = owner.verifier.service
        self.hello = attacker.hello()
        self.challenge = self.service.challenge(self.hello, "recorded")
        signed = messages.SignedChallenge(key=owner.public_key, challenge=self.challenge.body)
        self.evidence = messages.encode(Evidence(**attacker.evidence(self.hello, signed)))
        self.binding = attacker.binding(Told(self.evidence, b""))

    def regions(self) -> dict[str, Region]:
        return DIRECT_REGIONS if self.attacker.vtpm is None else ALL_REGIONS

    @functools.cached_property
    def replies(self) -> dict[str, tuple[bytes, Reply]]:
        """What the verifier signed: each kind of reply, with the request that it is for."""
        answer = self.service.release(self.evidence, "honest")
        told = Told(self.evidence, answer.body)
        confirm = self.attacker.confirm(told, self.attacker.open(told))
        signed = {
            "challenge": (self.hello, self.challenge),
            "answer": (self.evidence, answer),
            "receipt": (confirm, self.service.confirm(confirm, "honest")),
        }
        self.forget()
        return signed

    def forget(self) -> None:
        """Let the verifier forget that the session was redeemed, so that the next change meets it unused."""
        with self.owner.verifier.store.write() as txn:
            for table in (schema.redemption, schema.observation, schema.direct_grant, schema.opened_boot):
                txn.execute(delete(table))

    def require_useless(self, changed: bytes, *, authenticated: bool) -> None:
        """Send changed evidence: it is denied, or, where it is not authenticated, its answer does not open."""
        assert changed != self.evidence
        message = messages.decode_answer(self.service.release(changed, "changed").body)
        if isinstance(message, Denial | VersionsSpoken):  # the latter where the version was changed
            return
        try:
            assert isinstance(message, Sealed), message
            assert not authenticated, "an answer to changed evidence"
            with pytest.raises(NotAuthentic):
                self.attacker.key.open(message.sealed, self.binding)
        finally:
            self.forget()


@pytest.fixture(scope="module", params=["svsm-vtpm", "snp-direct"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_verifier: Path, amd: AmdRoot
) -> Iterator[Recorded]:
    """Record one honest exchange of each kind."""
    directory = tmp_path_factory.mktemp("recorded")
    shutil.copytree(new_verifier, directory / "owner")
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(Owner.opened(directory / "owner", amd))
        if request.param == "snp-direct":
            enrol_direct_vm(owner, UUID, UNLOCK_KEY)
            machine = SnpMachine(amd, chip_id=CHIP_ID, measurement=DIRECT, report_version=3)
            prey = Prey(owner, machine)
        else:
            enrol_grub_vm(owner, UUID, UNLOCK_KEY)
            machine = SnpMachine(amd, chip_id=CHIP_ID, svsm=True, measurement=SVSM, report_version=3)
            vtpm = stack.enter_context(Vtpm.start(directory / "securityfs"))
            vtpm.play(measured_boot.grub())
            prey = Prey(owner, machine, Svsm(machine, vtpm), vtpm)
        stack.enter_context(closing(prey))
        yield Recorded(owner, prey.attacker())


def test_the_recorded_evidence_itself_gets_the_key(recorded: Recorded) -> None:
    """What the changes below break is whole before them, and the same exchange is looked at each time."""
    for _ in range(2):
        told = Told(recorded.evidence, recorded.service.release(recorded.evidence, "honest").body)
        assert recorded.attacker.keys(told) == {UUID: UNLOCK_KEY}
        recorded.forget()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(
    ("recorded", "region"),
    [("svsm-vtpm", region) for region in ALL_REGIONS] + [("snp-direct", region) for region in DIRECT_REGIONS],
    indirect=["recorded"],
)
def test_the_ends_of_every_region_count(recorded: Recorded, region: str, place: str, change: str) -> None:
    """Every named region is hit, at its first byte, in its middle, and at its last."""
    evidence, part = messages.decode(Evidence, recorded.evidence), ALL_REGIONS[region]
    raw = part.take(evidence)
    at = {"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}[place]
    changed = messages.encode(part.put(evidence, CHANGES[change](raw, at, 1)))
    if changed != recorded.evidence:  # a doubled byte may be dropped again by the form of a list
        recorded.require_useless(changed, authenticated=part.authenticated)


@settings(max_examples=200)
@given(data=st.data(), mask=st.integers(1, 255), change=st.sampled_from(sorted(CHANGES)))
def test_any_byte_of_any_region_counts(
    recorded: Recorded, data: st.DataObject, mask: int, change: str
) -> None:
    """Changing, dropping or doubling any byte of report, manifest, quote, PCRs, log, Hello or Challenge is useless."""
    region = data.draw(st.sampled_from(sorted(recorded.regions())))
    evidence, part = messages.decode(Evidence, recorded.evidence), ALL_REGIONS[region]
    raw = part.take(evidence)
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = messages.encode(part.put(evidence, CHANGES[change](raw, at, mask)))
    if changed != recorded.evidence:
        recorded.require_useless(changed, authenticated=part.authenticated)


@settings(max_examples=100)
@given(data=st.data(), mask=st.integers(1, 255), change=st.sampled_from(sorted(CHANGES)))
def test_any_byte_of_the_body_counts(recorded: Recorded, data: st.DataObject, mask: int, change: str) -> None:
    """The same on the wire, where the changed byte is one of JSON or base64."""
    at = data.draw(st.integers(0, len(recorded.evidence) - 1))
    changed = CHANGES[change](recorded.evidence, at, mask)
    if changed != recorded.evidence:
        recorded.require_useless(changed, authenticated=False)


def taken(recorded: Recorded, request: bytes, body: bytes, signature: str) -> bytes:
    """Let the agent judge a reply; returns its body."""
    endpoint = Endpoint("home", ("http://192.0.2.1",), (recorded.owner.public_key,))
    return exchange._verified(endpoint, endpoint.urls[0], request, Received(200, signature, body)).body


@settings(max_examples=60)
@given(data=st.data(), mask=st.integers(1, 255), change=st.sampled_from(sorted(CHANGES)))
def test_any_byte_of_a_reply_counts(recorded: Recorded, data: st.DataObject, mask: int, change: str) -> None:
    """Challenge, answer and receipt are taken as they were signed, or not at all; the request counts too."""
    for request, reply in recorded.replies.values():
        assert taken(recorded, request, reply.body, reply.signature) == reply.body
        header = reply.signature.encode()
        parts = {"request": request, "body": reply.body, "header": header}
        which = data.draw(st.sampled_from(sorted(parts)))
        at = data.draw(st.integers(0, len(parts[which]) - 1))
        changed = CHANGES[change](parts[which], at, mask)
        if changed == parts[which]:
            continue
        parts[which] = changed
        with pytest.raises(NetworkError):
            taken(recorded, parts["request"], parts["body"], parts["header"].decode("latin-1"))


@pytest.mark.parametrize("kind", ["challenge", "answer", "receipt"])
def test_every_character_of_a_signature_header_counts(recorded: Recorded, kind: str) -> None:
    """Not one character of the header can be another: no looseness in hex, base64, blanks or case."""
    request, reply = recorded.replies[kind]
    for at, character in enumerate(reply.signature):
        for other in {character.swapcase(), chr(ord(character) ^ 1), " ", "="} - {character}:
            with pytest.raises(NetworkError):
                taken(recorded, request, reply.body, reply.signature[:at] + other + reply.signature[at + 1 :])


def test_a_reply_cannot_pass_for_the_reply_to_another_request(recorded: Recorded) -> None:
    """Each signed reply is played in answer to each of the other requests."""
    kept = recorded.replies
    for kind, (request, _) in kept.items():
        for other, (_, reply) in kept.items():
            if kind != other:
                with pytest.raises(NetworkError):
                    taken(recorded, request, reply.body, reply.signature)
