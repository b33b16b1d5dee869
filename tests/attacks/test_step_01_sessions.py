"""Step 1: sizes, strict decoding, and a token that binds this Hello and this Challenge to this verifier and this moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select
from tests.attacks.attacker import UNLOCK_KEY, UUID, denied, in_process, recoded
from tests.worlds import VM

from kagimori_protocol import messages, sealing, tpm
from kagimori_protocol.messages import Challenge, Denial, Evidence, Hello, SignedChallenge, VersionsSpoken
from kagimori_verifier.store import schema

if TYPE_CHECKING:
    from tests.attacks.attacker import Prey
    from tests.worlds import Owner


def own_challenge(parts: dict[str, Any], **changes: object) -> list[SignedChallenge]:
    """Change the Challenge that evidence answers."""
    signed: SignedChallenge = parts["challenges"][0]
    return [SignedChallenge(key=signed.key, challenge=recoded(signed.challenge, Challenge, **changes))]


def rows(office: Owner) -> dict[str, int]:
    """Count what the database holds."""
    with office.verifier.store.read() as txn:
        return {
            name: txn.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in schema.metadata.tables.items()
        }


def test_what_the_attacker_can_do_honestly_works(prey: Prey) -> None:
    """Without a lie there is a key: so each refusal in these stories comes from its lie alone."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}
    assert prey.office.events(told.session) == ["released"]


@pytest.mark.parametrize("seconds", [301, -6, 10**6])
def test_evidence_for_a_challenge_of_another_time_is_stale(prey: Prey, seconds: int) -> None:
    """T8, T23: the attacker keeps evidence for a better moment, or bends a verifier's clock to before the token.

    The token carries its own issue time, so nobody has to remember it.
    """
    attacker = prey.attacker()
    parts = attacker.evidence()
    prey.office.move_clock(seconds)
    denied(prey.office, attacker.send(parts), "stale-session", "session.fresh")


def test_evidence_within_the_lifetime_of_its_challenge_is_fresh(prey: Prey) -> None:
    """The bounds themselves still count: 300 seconds, and five seconds of clocks that differ between nodes."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    prey.office.move_clock(299)
    assert attacker.keys(attacker.send(parts)) == {UUID: UNLOCK_KEY}


def test_a_challenge_of_another_verifier_gets_nothing_here(prey: Prey, neighbour: Owner) -> None:
    """T7: the attacker has a verifier of its own, and sends evidence made for that one to this one.

    It lists the foreign Challenge under this verifier's key, since under its own it would not even be looked at.
    """
    attacker = prey.attacker(neighbour)
    hello = attacker.hello()
    foreign = attacker.challenge(hello)
    attacker = prey.attacker()
    for key in (prey.office.public_key, foreign.key):
        relabelled = SignedChallenge(key=key, challenge=foreign.challenge)
        parts = attacker.evidence(hello, relabelled)
        denied(prey.office, attacker.send(parts), "stale-session", "session.token")


def test_a_list_without_this_verifiers_challenge_is_stale_and_one_with_it_is_served(
    prey: Prey, neighbour: Owner
) -> None:
    """T7: evidence that answers eight other verifiers answers this one only if its own Challenge is among them."""
    hello = prey.attacker().hello()
    foreign = prey.attacker(neighbour).challenge(hello)
    attacker = prey.attacker()
    hello = attacker.hello()
    own = attacker.challenge(hello)
    seven = [foreign] * 7
    denied(
        prey.office,
        attacker.send(attacker.evidence(hello, *seven, foreign)),
        "stale-session",
        "session.token",
    )
    told = attacker.send(attacker.evidence(hello, *seven, own))
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}


def test_challenges_left_out_of_the_report_cannot_be_added_to_the_list(prey: Prey, neighbour: Owner) -> None:
    """T7: a VM answered only its own verifier; the attacker adds a Challenge that it has drawn from another.

    The report commits to the whole list in order, so the list cannot grow, shrink or turn around afterwards.
    """
    attacker = prey.attacker()
    hello = attacker.hello()
    own = attacker.challenge(hello)
    foreign = SignedChallenge(
        key=neighbour.public_key, challenge=in_process(neighbour)(messages.PATH_CHALLENGE, hello)
    )
    parts = attacker.evidence(hello, own)
    denied(prey.office, attacker.send(parts | {"challenges": [own, foreign]}), "not-authentic", "report.tie")
    parts = attacker.evidence(hello, own, foreign)
    for other in ([own], [foreign, own], [own, foreign, foreign]):
        denied(prey.office, attacker.send(parts | {"challenges": other}), "not-authentic", "report.tie")


@pytest.mark.parametrize(
    "change",
    [
        {"vm_id": "web2"},
        {"hpke_public_key": sealing.ResponseKey([bytes(64)]).public},
        {"volumes": []},
        {"agent": "another agent"},
        {"kind": "snp-direct"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("when", ["before the report", "after the report"])
def test_a_hello_swapped_under_its_token_is_refused(prey: Prey, change: dict[str, Any], when: str) -> None:
    """T7: the attacker draws a token for one Hello and sends another: another VM, key or list of volumes.

    It may even command the SVSM's report door and the TPM, and have both commit to the other Hello.
    """
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    swapped = recoded(hello, Hello, **change)
    parts = attacker.evidence(swapped if when == "before the report" else hello, challenge)
    parts["hello"] = swapped
    denied(prey.office, attacker.send(parts), "not-authentic", "session.hello")


def test_a_dry_run_cannot_be_turned_into_an_unlock(prey: Prey) -> None:
    """T4: root of a running VM may ask for a verdict at any time; its evidence must never buy a key.

    A dry-run needs no cap at zero, so the rewritten purpose would be all that stands between it and the key.
    """
    attacker = prey.attacker()
    parts = attacker.evidence(attacker.hello(purpose="dry-run"))
    parts["hello"] = recoded(parts["hello"], Hello, purpose="unlock")
    denied(prey.office, attacker.send(parts), "not-authentic", "session.hello")


@pytest.mark.parametrize(
    "change",
    [
        {"pcr_selection": tpm.NO_PCRS},
        {"pcr_selection": tpm.pcr_selection([23])},
        {"nonce": bytes(32)},
        {"expires_in": 3600},
    ],
    ids=["no PCRs", "another PCR", "nonce", "expires_in"],
)
def test_a_challenge_rewritten_under_its_token_is_refused(prey: Prey, change: dict[str, Any]) -> None:
    """T22: a guest that booted something else rewrites the Challenge so that it has nothing, or little, to quote.

    Report and quote agree with the rewritten Challenge in everything; only the token knows what was sent.
    """
    attacker = prey.attacker()
    hello = attacker.hello()
    rewritten = own_challenge({"challenges": [attacker.challenge(hello)]}, **change)
    if change.get("pcr_selection") != tpm.NO_PCRS:
        parts = attacker.evidence(hello, *rewritten)
    else:  # the agent refuses to quote nothing, so the attacker takes what the TPM gives for one PCR
        parts = attacker.evidence(hello, attacker.challenge(hello)) | {"challenges": rewritten}
        parts |= attacker.quote(parts, tpm.pcr_selection([23]))
    denied(prey.office, attacker.send(parts), "not-authentic", "session.challenge")


def test_a_token_that_this_verifier_never_made_is_none(prey: Prey) -> None:
    """T8: the attacker makes up a session, or mends an old one: each of its bytes is authenticated."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    session = messages.decode(Challenge, parts["challenges"][0].challenge).session
    for forged in (
        b"",
        b"\x00",
        bytes(len(session)),
        session[:-1],
        session + b"\x00",
        session[1:] + session[:1],
    ):
        parts["challenges"] = own_challenge(parts, session=forged)
        denied(prey.office, attacker.send(parts), "stale-session", "session.token")


def test_a_reflected_message_is_no_request(prey: Prey) -> None:
    """T7: the attacker sends a verifier its own words back, and a guest's words to the wrong door.

    Every message is named on the wire, so none can pass for another.
    """
    attacker = prey.attacker()
    hello = attacker.hello()
    challenge = attacker.challenge(hello)
    told = attacker.send(attacker.evidence(hello, challenge))
    confirm = attacker.confirm(told, attacker.open(told))
    spoken = {
        messages.PATH_CHALLENGE: [challenge.challenge, told.request, told.body, confirm],
        messages.PATH_RELEASE: [hello, challenge.challenge, told.body, confirm],
        messages.PATH_CONFIRM: [hello, challenge.challenge, told.request, told.body],
    }
    post = in_process(prey.office)
    for path, bodies in spoken.items():
        for body in bodies:
            assert messages.decode(Denial, post(path, body)).code == "malformed"
            assert prey.office.refusals()[0].path == path.rsplit("/", 1)[1]
    assert prey.office.events() == ["released"]


@pytest.mark.parametrize(
    "lie", ["trailing", "unknown", "twice", "blank", "base64", "too large", "not JSON", "nothing"]
)
def test_evidence_in_any_but_its_one_form_is_malformed(prey: Prey, lie: str) -> None:
    """T22: two ends that read the same bytes differently can be played against each other, so there is one reading."""
    attacker = prey.attacker()
    honest = messages.encode(Evidence(**attacker.evidence()))
    lies = {
        "trailing": honest + b"\n",
        "unknown": honest[:-1] + b',"debug":true}',
        "twice": honest[:-1] + b',"version":1}',
        "blank": honest.replace(b'"version":1', b'"version": 1', 1),
        "base64": honest.replace(b"==", b"", 1),
        "too large": honest + b" " * messages.MAX_BODY,
        "not JSON": b"\xff" + honest,
        "nothing": b"",
    }
    assert lies[lie] != honest
    reply = messages.decode(Denial, in_process(prey.office)(messages.PATH_RELEASE, lies[lie]))
    assert (reply.code, reply.session) == ("malformed", b"")
    assert prey.office.refusals()[0].code in {"message.decode", "message.form", "message.size"}
    assert prey.office.events() == []


@pytest.mark.parametrize("part", ["hello", "evidence"])
def test_a_version_that_is_not_spoken_is_answered_with_those_that_are(prey: Prey, part: str) -> None:
    """T22: a release from the future, or an attacker who claims to be one, is told what is spoken here and no more."""
    attacker = prey.attacker()
    parts = attacker.evidence()
    if part == "hello":
        parts["hello"] = recoded(parts["hello"], Hello, version=2)
    else:
        parts["version"] = 2
    told = attacker.send(parts)
    assert told.message == VersionsSpoken(version=1, versions=[1])
    assert prey.office.events() == []


def test_a_flood_of_hellos_allocates_nothing(prey: Prey) -> None:
    """T24: whoever knows a vm_id may draw challenges without end; the guest keeps them, the verifier does not."""
    attacker = prey.attacker()
    before = rows(prey.office)
    sessions = {attacker.challenge(attacker.hello(vm_id=VM)).challenge for _ in range(200)}
    assert len(sessions) == 200
    assert rows(prey.office) == before
