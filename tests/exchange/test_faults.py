"""Things break in the middle: nothing is released that the ledger does not show, and afterwards the same evidence gets its key."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event
from tests.attacks.attacker import UNLOCK_KEY, UUID, Prey, Told, closing, judged
from tests.worlds import CHIP_ID, SVSM, Enrolled, Owner, enrol_grub_vm, make_verifier

from kagimori_agent.unlock import unlock
from kagimori_protocol import messages, signature
from kagimori_protocol.messages import Evidence
from kagimori_simulator import measured_boot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm
from kagimori_simulator.world import VerifierAt
from kagimori_verifier.pipeline import Pipeline
from kagimori_verifier.release import Release
from kagimori_verifier.store import StoreUnavailable, redemptions, sqlite

if TYPE_CHECKING:
    from kagimori_simulator.amd import AmdRoot

pytestmark = pytest.mark.slow  # the quick suite has three minutes

Fault = Callable[[Owner], "contextlib.AbstractContextManager[None]"]


@pytest.fixture
def prey(tmp_path: Path, office: Owner) -> Iterator[Prey]:
    """Give a VM to be driven by hand, step by step."""
    enrol_grub_vm(office, UUID, UNLOCK_KEY)
    machine = SnpMachine(office.root, chip_id=CHIP_ID, svsm=True, measurement=SVSM, report_version=3)
    with Vtpm.start(tmp_path / "securityfs") as vtpm:
        vtpm.play(measured_boot.grub())
        with closing(Prey(office, machine, Svsm(machine, vtpm), vtpm)) as running:
            yield running


def post(owner: Owner, evidence: bytes) -> requests.Response:
    """Send evidence over HTTP."""
    return requests.post(owner.url + messages.PATH_RELEASE, data=evidence, timeout=30)


@contextlib.contextmanager
def locked(owner: Owner) -> Iterator[None]:
    """Let another program hold the database."""
    holder = sqlite3.connect(owner.directory / "verifier.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        holder.rollback()
        holder.close()


@contextlib.contextmanager
def taken_away(owner: Owner) -> Iterator[None]:
    """Let somebody move the database away, as a clumsy backup does, and bring it back."""
    path = owner.directory / "verifier.db"
    path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        path.with_suffix(".away").rename(path)


@contextlib.contextmanager
def read_only(owner: Owner) -> Iterator[None]:
    """Let the disk go read-only, as file systems do after an error."""
    store = owner.verifier.store

    def refuse_writes(connection: Any, *_: object) -> None:  # noqa: ANN401 - the driver's
        connection.execute("PRAGMA query_only=ON")

    event.listen(store._engine, "checkout", refuse_writes)
    store.close()  # so that the next connection is such a one, and the one after it is none again
    try:
        yield
    finally:
        event.remove(store._engine, "checkout", refuse_writes)
        store.close()


FAULTS: dict[str, Fault] = {"locked": locked, "gone": taken_away, "read-only": read_only}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_database_lost_in_the_middle_of_a_request_is_503_and_nothing_is_released(
    prey: Prey, owner: Owner, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evidence has been judged, the database fails before the decision can be written.

    The reply is unsigned, so to an agent it is no answer; once the database is back, the same bytes get their key.
    """
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
    owner.verifier.store.close()  # so that connections are as impatient as the test
    attacker = prey.attacker()
    evidence = messages.encode(Evidence(**attacker.evidence()))
    broken = contextlib.ExitStack()
    judge = Pipeline.judge

    def judge_and_break(*arguments: Any) -> object:  # noqa: ANN401 - judge's
        judgement = judge(*arguments)
        broken.enter_context(FAULTS[fault](owner))
        return judgement

    monkeypatch.setattr(Pipeline, "judge", judge_and_break)
    with broken:
        reply = post(owner, evidence)
        monkeypatch.setattr(Pipeline, "judge", judge)
    assert (reply.status_code, reply.text) == (503, f"store.{fault}\n")
    assert signature.HEADER not in reply.headers
    assert owner.events() == [], "nothing was decided"
    told = Told(evidence, post(owner, evidence).content)
    assert attacker.keys(told) == {UUID: UNLOCK_KEY}
    assert owner.events() == ["released"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_database_lost_after_the_ledger_is_503_and_the_answer_comes_later(
    prey: Prey, owner: Owner, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is in the ledger, the answer is made, and cannot be kept: so it is not sent either.

    An answer that was sent without its confirm key could never be confirmed.
    """
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
    owner.verifier.store.close()
    attacker = prey.attacker()
    evidence = messages.encode(Evidence(**attacker.evidence()))
    broken = contextlib.ExitStack()
    payload = Release._payload

    def make_and_break(*arguments: Any) -> object:  # noqa: ANN401 - _payload's
        made = payload(*arguments)
        broken.enter_context(FAULTS[fault](owner))
        return made

    monkeypatch.setattr(Release, "_payload", make_and_break)
    with broken:
        reply = post(owner, evidence)
        monkeypatch.setattr(Release, "_payload", payload)
    assert (reply.status_code, reply.text) == (503, f"store.{fault}\n")
    assert signature.HEADER not in reply.headers
    told = Told(evidence, post(owner, evidence).content)
    opened = attacker.open(told)
    assert attacker.send_confirm(attacker.confirm(told, opened)) == "opened"
    assert owner.events() == ["released", "confirmed-opened"], "one line, however often it was tried"


DEATHS = {
    "after the ledger": "release.Release._make_answer = die",
    "with the answer made": "redemptions.store_answer = die",
    "before the ledger": "release._redeem = die",
}
DYING = """
import os, sys
from pathlib import Path
from kagimori_verifier import app, release, settings
from kagimori_verifier.store import redemptions
def die(*_): os._exit(9)
{death}
verifier = app.open_verifier(settings.load(Path(sys.argv[1])))
verifier.service.release(Path(sys.argv[2]).read_bytes(), "a test")
"""


@pytest.mark.parametrize("death", DEATHS)
def test_a_verifier_that_dies_between_ledger_and_answer_gives_one_answer_after_all(
    tmp_path: Path, prey: Prey, amd: AmdRoot, death: str
) -> None:
    """A real process dies without a word, its database as it was at that moment; another takes over.

    The same evidence gets an answer, under the same single line of the ledger.
    """
    attacker = prey.attacker()
    evidence = messages.encode(Evidence(**attacker.evidence()))
    (tmp_path / "evidence").write_bytes(evidence)
    program = DYING.format(death=DEATHS[death])
    settings = str(prey.office.directory / "verifier.toml")
    done = subprocess.run(
        [sys.executable, "-c", program, settings, str(tmp_path / "evidence")], check=False, timeout=30
    )
    assert done.returncode == 9
    assert prey.office.events() == ([] if death == "before the ledger" else ["released"])
    with Owner.opened(prey.office.directory, amd) as again:
        first, second = (again.verifier.service.release(evidence, "again").body for _ in range(2))
        assert first == second
        assert attacker.keys(Told(evidence, first)) == {UUID: UNLOCK_KEY}
        assert again.events() == ["released"]


def test_a_refusal_that_was_not_sent_in_time_keeps_its_reasons(
    prey: Prey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier died before it could tell a "no"; told later, it is the same no, for the reasons in the ledger."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    attacker.send_confirm(attacker.confirm(told, attacker.open(told)))
    parts = attacker.evidence()
    with monkeypatch.context() as patched:
        patched.setattr(Release, "_make_answer", _unavailable)
        with pytest.raises(StoreUnavailable):
            attacker.send(parts)
    prey.office.move_clock(1)
    prey.office.change_policy("grub", platform_required=["TSME_EN"])
    judged(attacker, attacker.send(parts), "boot.unopened")


def test_a_confirm_that_cannot_be_kept_is_not_receipted_and_counts_when_it_comes_again(
    prey: Prey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a Confirm changes (outcome, observation, opened boot, ledger) is changed together, or not at all."""
    attacker = prey.attacker()
    told = attacker.send(attacker.evidence())
    confirm = attacker.confirm(told, attacker.open(told))
    with monkeypatch.context() as patched:
        patched.setattr(redemptions, "mark_opened", _unavailable)
        with pytest.raises(StoreUnavailable):
            attacker.send_confirm(confirm)
    assert prey.office.events() == ["released"]
    assert attacker.keys(attacker.send(attacker.evidence())) == {UUID: UNLOCK_KEY}, "not opened yet"
    assert attacker.send_confirm(confirm) == "opened"
    judged(attacker, attacker.send(attacker.evidence()), "boot.unopened")


def _unavailable(*_: object) -> None:
    raise StoreUnavailable("The database is gone.")


def test_an_agent_outlasts_a_verifier_that_is_ill_for_a_while(
    enrolled: Enrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice there is 503, then the key; the boot's budget has room for that, and the ledger has one line."""
    said: list[str] = []
    redeem = redemptions.insert
    calls: list[object] = []

    def ill_at_first(txn: Any, row: Any) -> None:  # noqa: ANN401 - insert's
        calls.append(row)
        if len(calls) < 3:
            _unavailable()
        redeem(txn, row)

    monkeypatch.setattr(redemptions, "insert", ill_at_first)
    with enrolled.booted() as (_, config):
        unlocked = unlock(config, said.append, prove=True)
    assert unlocked.confirmed
    assert len(calls) == 3
    assert sum("again in" in line for line in said) == 2
    assert enrolled.owner.events() == ["released", "confirmed-opened"]


@pytest.fixture
def second(tmp_path: Path, amd: AmdRoot, enrolled: Enrolled) -> Iterator[Owner]:
    """Give a second verifier of the same owner, with keys of its own, that knows the same VM."""
    make_verifier(tmp_path / "second", amd)
    with Owner.opened(tmp_path / "second", amd) as owner:
        enrol_grub_vm(owner, enrolled.volume.uuid, enrolled.unlock_key)
        with owner.served():
            yield owner


def named(name: str, owner: Owner) -> VerifierAt:
    """Name a verifier as agent.toml does."""
    return VerifierAt(name, [owner.url], [b64encode(owner.public_key).decode()])


@pytest.mark.parametrize("how", ["refuses connections", "never answers"])
def test_when_the_first_verifier_is_dead_the_second_answers(enrolled: Enrolled, how: str) -> None:
    """Nobody waits for a verifier that is not there longer than it takes to gather the others' challenges."""
    key = b64encode(Ed25519PrivateKey.generate().public_key().public_bytes_raw()).decode()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "never answers":
            listener.listen()
        dead = VerifierAt("dead", [f"http://127.0.0.1:{listener.getsockname()[1]}"], [key])
        with enrolled.booted(verifiers=[dead, enrolled.verifier()]) as (_, config):
            unlocked = unlock(config, lambda _: None, prove=True)
    assert (unlocked.verifier, unlocked.confirmed) == ("home", True)
    assert enrolled.owner.events() == ["released", "confirmed-opened"]


def test_one_report_serves_two_verifiers(
    enrolled: Enrolled, second: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first verifier gives its challenge and then dies; the second takes the same report and the same quote.

    A guest can make few reports, since its host throttles them.
    """
    enrolled.owner.verifier.service._release.answer = _unavailable  # type: ignore[assignment,method-assign]  # it dies
    reports: list[bytes] = []
    report = SnpMachine.report

    def counted(self: SnpMachine, *arguments: Any, **named: Any) -> bytes:  # noqa: ANN401 - report's
        reports.append(report(self, *arguments, **named))
        return reports[-1]

    monkeypatch.setattr(SnpMachine, "report", counted)
    verifiers = [named("first", enrolled.owner), named("second", second)]
    with enrolled.booted(verifiers=verifiers) as (_, config):
        unlocked = unlock(config, lambda _: None, prove=True)
    assert (unlocked.verifier, unlocked.confirmed) == ("second", True)
    assert len(reports) == 1
    assert enrolled.owner.events() == []
    assert second.events() == ["released", "confirmed-opened"]


def test_both_verifiers_of_one_evidence_answer_it_each_for_itself(
    enrolled: Enrolled, second: Owner, tmp_path: Path
) -> None:
    """One Evidence lists two challenges; each verifier finds its own, and neither's answer passes for the other's."""
    machine = SnpMachine(second.root, chip_id=CHIP_ID, svsm=True, measurement=SVSM, report_version=3)
    with Vtpm.start(tmp_path / "vtpm") as vtpm:
        vtpm.play(measured_boot.grub())
        with closing(Prey(second, machine, Svsm(machine, vtpm), vtpm)) as prey:
            agent = prey.attacker()
            hello = agent.hello(volumes=[enrolled.volume.uuid])
            there = agent.challenge(hello)
            here = messages.SignedChallenge(
                key=enrolled.owner.public_key,
                challenge=enrolled.owner.verifier.service.challenge(hello, "agent").body,
            )
            evidence = messages.encode(Evidence(**agent.evidence(hello, here, there)))
            bodies = [
                owner.verifier.service.release(evidence, "agent").body for owner in (enrolled.owner, second)
            ]
            assert agent.keys(Told(evidence, bodies[1])) == {enrolled.volume.uuid: enrolled.unlock_key}
            with pytest.raises(Exception, match="does not open"):
                agent.open(Told(evidence, bodies[0]))
    assert enrolled.owner.events() == second.events() == ["released"]
