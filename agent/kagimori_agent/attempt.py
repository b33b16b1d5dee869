"""One attempt at an answer: hello, challenges, one report and one quote for all of them, an answer that only we open.

PROTOCOL.md sections 3 to 5. ``attest`` repeats attempts within one budget, each with fresh keys, as long as what failed
may get better by itself: a verifier that is away, a challenge that has grown old.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from msgspec import UNSET

from kagimori_agent import VERSION, exchange
from kagimori_agent.budget import Backoff, Budget
from kagimori_protocol import messages, sealing, transcript
from kagimori_protocol.errors import HardwareError, KagimoriError, NetworkError, PeerError, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_agent.collect import Attester
    from kagimori_agent.config import Config, Limits
    from kagimori_agent.exchange import Endpoint, Reply
    from kagimori_protocol.messages import Challenge, Outcome, Payload, Purpose

OWN_ENTROPY_BYTES: Final = 64
SENDINGS: Final = 4
"""How often one evidence is sent, unless no other can be: a lost reply costs no new one, and a verifier that is gone not the whole budget."""
PROMPT_S: Final = 10.0
"""Seconds in which a host that does not throttle gives a report many times over."""
_STALE: Final = frozenset({"stale-session", "used-session"})
"""Denials that a new challenge cures."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An opened answer. ``evidence`` and ``hello`` are the bytes that were sent."""

    payload: Payload | None = field(repr=False)
    endpoint: Endpoint
    session: bytes
    binding: bytes
    confirm_key: bytes = field(repr=False)
    hello: bytes = field(repr=False)
    evidence: bytes = field(repr=False)

    def without_payload(self) -> Answered:
        """Keep what a Confirm needs; the keys go as their last reference goes."""
        return replace(self, payload=None)

    def confirm(self, outcome: Outcome) -> bytes:
        """Make the Confirm that tells what became of this answer."""
        mac = sealing.confirm_mac(self.confirm_key, self.binding, outcome)
        return messages.encode(
            messages.Confirm(version=messages.VERSION, session=self.session, outcome=outcome, mac=mac)
        )


@dataclass(frozen=True, slots=True)
class _Challenged:
    endpoint: Endpoint
    key: bytes
    body: bytes
    challenge: Challenge


class _StaleError(NetworkError):
    """A challenge has grown old, or was used up: worth another attempt, and counted as "away" when there is none."""

    default_code = "answer.stale"


def attest(  # noqa: PLR0913 - what is asked, by whom, how long, and what an enrolment adds
    config: Config,
    attester: Attester,
    purpose: Purpose,
    budget: Budget,
    say: Callable[[str], None],
    prove: Callable[[bytes], bytes] | None = None,
) -> Answered:
    """Get an answer from one of the verifiers, or raise the reason why none can be had.

    ``prove`` makes the proof of an enrolment's code for a T0; other purposes have none.
    Raises NetworkError once the budget is spent, Refused or PeerError for an answer that is no, and the devices'
    ImageError and HardwareError.
    """
    backoff = Backoff(config.limits.backoff_min_s, config.limits.backoff_max_s)
    last: NetworkError | None = None
    while True:
        left_s = budget.remaining_s()
        try:
            return _attempt(config, attester, purpose, budget, say, prove)
        except HardwareError as error:
            # A door that gave a report in this boot before, and then had seconds only, is not what ended the boot.
            if error.code == "report.stalled" and last is not None and left_s < PROMPT_S:
                raise budget.spent(last) from None
            raise
        except NetworkError as error:
            if error.code == "budget.spent":
                raise _spent(budget, error, last) from None
            budget.require(error)
            last = error
            wait_s = min(backoff.next_s(), budget.remaining_s())
            say(f"{error.what} Trying again in {wait_s:.0f} s.")
            time.sleep(wait_s)


def endpoints(config: Config) -> tuple[Endpoint, ...]:
    """Give the verifiers of agent.toml as the exchange wants them."""
    return tuple(
        exchange.Endpoint(
            name=verifier.name, urls=tuple(verifier.urls), keys=tuple(verifier.keys), ca_file=verifier.ca_file
        )
        for verifier in config.verifiers
    )


def _attempt(  # noqa: PLR0913 - as above
    config: Config,
    attester: Attester,
    purpose: Purpose,
    budget: Budget,
    say: Callable[[str], None],
    prove: Callable[[bytes], bytes] | None,
) -> Answered:
    prepared = attester.prepare()
    key = sealing.ResponseKey([os.urandom(OWN_ENTROPY_BYTES), *prepared.entropy])
    try:
        hello = messages.encode(
            messages.Hello(
                version=messages.VERSION,
                vm_id=config.vm_id,
                purpose=purpose,
                kind=attester.kind,
                hpke_public_key=key.public,
                ek_public=UNSET if prepared.ek_public is None else prepared.ek_public,
                ak_public=UNSET if prepared.ak_public is None else prepared.ak_public,
                volumes=[volume.uuid for volume in config.volumes],
                agent=f"kagimori-agent {VERSION}",
            )
        )
        challenged = _challenges(config, hello, budget, say)
        t0 = transcript.t0(hello, [(one.key, one.body) for one in challenged])
        evidence = messages.encode(
            messages.Evidence(
                version=messages.VERSION,
                hello=hello,
                challenges=[messages.SignedChallenge(key=one.key, challenge=one.body) for one in challenged],
                **attester.collect(
                    t0, challenged[0].challenge.pcr_selection, budget.attempt_s(config.limits.boot_budget_s)
                ),
                enrol_proof=UNSET if prove is None else prove(t0),
            )
        )
        say("evidence collected, asking for the answer")
        one, sealed = _answer(challenged, evidence, config.limits, budget, say, once=prove is not None)
        binding = transcript.answer_binding(t0, one.body, evidence)
        payload = _open(key, attester, sealed, binding)
        return Answered(payload, one.endpoint, sealed.session, binding, payload.confirm_key, hello, evidence)
    finally:
        key.forget()


def _challenges(
    config: Config, hello: bytes, budget: Budget, say: Callable[[str], None]
) -> list[_Challenged]:
    """Ask all verifiers at once; keep those who want the same PCRs as the first, since one quote serves all."""
    limits = config.limits

    def ask() -> list[tuple[Endpoint, Reply | NetworkError]]:
        return exchange.ask_all(
            endpoints(config),
            messages.PATH_CHALLENGE,
            hello,
            gather_s=limits.gather_s,
            attempt_s=limits.attempt_s,
            connect_s=limits.connect_s,
            budget=budget,
            say=say,
        )

    backoff = Backoff(limits.backoff_min_s, limits.backoff_max_s)
    replies = exchange.until_answered(ask, budget, backoff, say)
    challenged: list[_Challenged] = []
    errors: list[KagimoriError] = []
    for endpoint, reply in replies:
        if isinstance(reply, NetworkError):
            errors.append(reply)
            continue
        try:
            message = messages.decode_challenge_reply(reply.body)
        except PeerError as error:
            errors.append(error)
            continue
        if isinstance(message, messages.Challenge):
            challenged.append(_Challenged(endpoint, reply.key, reply.body, message))
        else:
            errors.append(signed_no(endpoint, message))
    agreed = [
        one for one in challenged if one.challenge.pcr_selection == challenged[0].challenge.pcr_selection
    ]
    for one in challenged:
        if one not in agreed:
            say(
                f"{one.endpoint.name}: wants other PCRs than {challenged[0].endpoint.name}, so it is not asked"
            )
    if not agreed:
        raise _worst(errors)
    return agreed


def _answer(  # noqa: PLR0913 - as post, and what other evidence would cost
    challenged: list[_Challenged],
    evidence: bytes,
    limits: Limits,
    budget: Budget,
    say: Callable[[str], None],
    *,
    once: bool = False,
) -> tuple[_Challenged, messages.Sealed]:
    """Ask the verifiers in turn until one gives an answer that is sealed to us.

    Who was away is sent the same evidence again: if only its reply was lost, it gives the same answer, whereas other
    evidence costs another report, and without a TPM finds the one answer of this boot given away. ``once`` says that other
    evidence would get no answer if this one has arrived, as of an enrolment, whose code it has used: it is sent as long as its
    session lives.
    """
    until = time.monotonic() + min(one.challenge.expires_in for one in challenged)
    errors: list[KagimoriError] = []
    backoff = Backoff(limits.backoff_min_s, limits.backoff_max_s)
    waiting = challenged
    for sent in itertools.count(1):
        away: list[_Challenged] = []
        for one in waiting:
            try:
                return one, _ask(one, evidence, limits, budget, say)
            except KagimoriError as error:
                if error.code == "budget.spent":
                    raise _spent(budget, error, _worst(errors) if errors else None) from None
                errors.append(error)
                if isinstance(error, NetworkError) and not isinstance(error, _StaleError):
                    away.append(one)
        wait_s = backoff.next_s()
        is_last = time.monotonic() + wait_s >= until if once else sent >= SENDINGS
        if not away or is_last or wait_s >= budget.remaining_s():
            break
        say(f"no answer, sending the same evidence again in {wait_s:.1f} s")
        time.sleep(wait_s)
        waiting = away
    raise _worst(errors)


def _ask(
    one: _Challenged, evidence: bytes, limits: Limits, budget: Budget, say: Callable[[str], None]
) -> messages.Sealed:
    """Ask one verifier; wait where a person has to approve. Raises NetworkError for away, anything else for no."""
    until = time.monotonic() + one.challenge.expires_in
    while True:
        reply = exchange.post(
            one.endpoint,
            messages.PATH_RELEASE,
            evidence,
            attempt_s=limits.attempt_s,
            connect_s=limits.connect_s,
            budget=budget,
        )
        message = messages.decode_answer(reply.body)
        if isinstance(message, messages.Sealed):
            return message
        if not isinstance(message, messages.Pending):
            raise signed_no(one.endpoint, message)
        if time.monotonic() + message.retry_after > until:
            raise _StaleError(f"{one.endpoint.name}: nobody has approved yet.")
        say(
            f"{one.endpoint.name}: waits for a person ({message.approval}), next look in {message.retry_after} s"
        )
        time.sleep(min(message.retry_after, budget.remaining_s()))
        budget.require()


def _open(key: sealing.ResponseKey, attester: Attester, sealed: messages.Sealed, binding: bytes) -> Payload:
    """Open both layers; the credential only after HPKE has shown that the answer is for this exchange."""
    inner = key.open(sealed.sealed, binding)
    secret = attester.open_credential(None if sealed.credential is UNSET else sealed.credential)
    return messages.decode_payload(inner if secret is None else sealing.open_inner(inner, binding, secret))


def signed_no(endpoint: Endpoint, message: object) -> KagimoriError:
    """Turn a signed no into the error that it is."""
    if isinstance(message, messages.VersionsSpoken):
        return PeerError(
            f"{endpoint.name}: speaks another version of the protocol.",
            code="unsupported-version",
            expected=str(messages.VERSION),
            found=", ".join(map(str, message.versions)),
            todo="Update the older of the two sides.",
        )
    if not isinstance(message, messages.Denial):
        return PeerError(
            f"{endpoint.name}: gave an answer that does not belong here.",
            code="answer.unexpected",
            expected="a challenge or an answer",
            found=type(message).__name__.lower(),
        )
    if message.code in _STALE:
        return _StaleError(f"{endpoint.name}: the challenge is no longer good ({message.code}).")
    explain = "`kagimori-verifier ledger refusals`"
    if message.session:
        explain = f"`kagimori-verifier explain {transcript.session_id(message.session)}`"
    return Refused(
        f"{endpoint.name}: denies this VM, or does not believe its evidence.",
        code=f"denied.{message.code}",
        expected="an answer",
        found=message.code,
        todo=f"The owner sees the reason: {explain}.",
    )


def _spent(budget: Budget, error: KagimoriError, last: KagimoriError | None) -> KagimoriError:
    """Tell what failed until the time was over, which whoever noticed its end may not know."""
    return error if error.__cause__ is not None or last is None else budget.spent(last)


def _worst(errors: list[KagimoriError]) -> KagimoriError:
    """Choose what to tell: a verifier that is merely away may still say yes, so that comes before any no."""
    away = [error for error in errors if isinstance(error, NetworkError)]
    return (away or errors)[0]
