"""A lost reply costs another request, not another report: the same evidence gets the same answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from kagimori_agent import attempt, exchange
from kagimori_agent.budget import Budget
from kagimori_agent.config import Limits
from kagimori_agent.exchange import Endpoint, Reply
from kagimori_protocol import messages
from kagimori_protocol.errors import KagimoriError, NetworkError, Refused

EVIDENCE = b"evidence"
LIMITS = Limits(backoff_min_s=0.01, backoff_max_s=0.01)
SEALED = messages.encode(messages.Sealed(version=1, session=b"token", sealed=b"sealed"))
DENIAL = messages.encode(messages.Denial(version=1, session=b"token", code="not-authentic"))
STALE = messages.encode(messages.Denial(version=1, session=b"token", code="stale-session"))
LOST = None
"""In place of a reply."""
LATE = b""
"""In place of a reply: the time of the boot is over before the question is asked."""


class _Verifiers:
    """Replies of verifiers by name, one for each request; the last one for all that follow."""

    def __init__(self, expires_in: int = 300, **replies: list[bytes | None]) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self._replies: dict[str, Iterator[bytes | None]] = {
            name: _and_so_on(each) for name, each in replies.items()
        }
        self.challenged = [
            attempt._Challenged(
                Endpoint(name, ("http://verifier",), (bytes(32),)),
                bytes(32),
                b"challenge",
                messages.Challenge(
                    version=1,
                    session=b"token",
                    nonce=bytes(32),
                    expires_in=expires_in,
                    pcr_selection=bytes(4),
                ),
            )
            for name in replies
        ]

    def post(self, endpoint: Endpoint, _path: str, body: bytes, **_: object) -> Reply:
        self.asked.append((endpoint.name, body))
        reply = next(self._replies[endpoint.name])
        if reply is LATE:
            raise Budget(0).spent()
        if reply is LOST:
            raise NetworkError(f"{endpoint.name}: no answer in time.", code="network.timeout")
        return Reply(reply, bytes(32), "http://verifier", 200)


def _and_so_on(replies: list[bytes | None]) -> Iterator[bytes | None]:
    yield from replies
    while True:
        yield replies[-1]


def _answer(
    monkeypatch: pytest.MonkeyPatch, verifiers: _Verifiers, budget_s: float = math.inf, *, once: bool = False
) -> str | KagimoriError:
    """Ask; give the name of who answered, or the error."""
    monkeypatch.setattr(exchange, "post", verifiers.post)
    try:
        one, _ = attempt._answer(
            verifiers.challenged, EVIDENCE, LIMITS, Budget(budget_s), lambda _: None, once=once
        )
    except KagimoriError as error:
        return error
    return one.endpoint.name


def test_a_lost_reply_is_asked_for_again_with_the_same_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a TPM, other evidence would find this boot's one answer given away."""
    verifiers = _Verifiers(home=[LOST, LOST, SEALED])
    assert _answer(monkeypatch, verifiers) == "home"
    assert verifiers.asked == [("home", EVIDENCE)] * 3


def test_a_verifier_that_stays_away_is_given_up_before_the_whole_budget_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another verifier may be back by now, and only a new attempt would ask it."""
    verifiers = _Verifiers(home=[LOST])
    error = _answer(monkeypatch, verifiers)
    assert isinstance(error, NetworkError)
    assert len(verifiers.asked) == attempt.SENDINGS


def test_only_who_was_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A no stays a no."""
    verifiers = _Verifiers(home=[DENIAL], work=[LOST, SEALED])
    assert _answer(monkeypatch, verifiers) == "work"
    assert [name for name, _ in verifiers.asked] == ["home", "work", "work"]


@pytest.mark.parametrize(("reply", "kind"), [(DENIAL, Refused), (STALE, NetworkError)])
def test_a_signed_no_and_a_stale_challenge_are_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, reply: bytes, kind: type[KagimoriError]
) -> None:
    """The same evidence would be told the same; a stale challenge wants a new one."""
    verifiers = _Verifiers(home=[reply])
    assert isinstance(_answer(monkeypatch, verifiers), kind)
    assert len(verifiers.asked) == 1


def test_nothing_is_sent_again_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that nothing can follow is not begun."""
    verifiers = _Verifiers(home=[LOST])
    assert isinstance(_answer(monkeypatch, verifiers, budget_s=0), NetworkError)
    assert len(verifiers.asked) == 1


def test_who_runs_out_of_time_is_told_what_failed_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told only "found: none", nobody would look for the cable that is not plugged in."""
    error = _answer(monkeypatch, _Verifiers(home=[LOST, LATE]), budget_s=60)
    assert isinstance(error, NetworkError)
    assert error.code == "budget.spent"
    assert "home: no answer in time." in str(error.found)
    late_at_once = _answer(monkeypatch, _Verifiers(home=[LATE]), budget_s=60)
    assert isinstance(late_at_once, NetworkError)
    assert late_at_once.found == "none"


def test_the_last_attempt_tells_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time ends where nothing has been asked yet."""
    ends: Iterator[NetworkError] = iter(
        [NetworkError("home: no answer in time.", code="network.timeout"), Budget(0).spent()]
    )

    def fail(*_: object) -> attempt.Answered:
        raise next(ends)

    monkeypatch.setattr(attempt, "_attempt", fail)
    config = SimpleNamespace(limits=LIMITS)
    with pytest.raises(NetworkError) as caught:
        attempt.attest(config, None, "unlock", Budget(60), lambda _: None)  # type: ignore[arg-type]  # only its limits are read
    assert caught.value.code == "budget.spent"
    assert "home: no answer in time." in str(caught.value.found)


def test_an_enrolments_evidence_is_sent_as_long_as_its_session_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is spent with the first that arrived: other evidence finds it used, and the same is answered still."""
    many: list[bytes | None] = [LOST] * (3 * attempt.SENDINGS)
    verifiers = _Verifiers(home=[*many, SEALED])
    assert _answer(monkeypatch, verifiers, once=True) == "home"
    assert verifiers.asked == [("home", EVIDENCE)] * (len(many) + 1)


def test_a_session_that_has_ended_and_a_budget_that_is_spent_end_an_enrolments_sendings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing would be answered any more."""
    verifiers = _Verifiers(expires_in=1, home=[LOST])
    error = _answer(monkeypatch, verifiers, once=True)
    assert isinstance(error, NetworkError)
    assert error.code == "network.timeout"
    assert len(verifiers.asked) > attempt.SENDINGS
    verifiers = _Verifiers(home=[LOST, STALE])
    error = _answer(monkeypatch, verifiers, once=True)
    assert isinstance(error, NetworkError)
    assert len(verifiers.asked) == 2
    verifiers = _Verifiers(home=[LOST])
    assert isinstance(_answer(monkeypatch, verifiers, budget_s=0.2, once=True), NetworkError)
