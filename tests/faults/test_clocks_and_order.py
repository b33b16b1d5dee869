"""Clocks that jump, on either side, and messages that come twice, at once, or in another order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.attacks.attacker import Told
from tests.faults import invariants
from tests.faults.guests import Guest
from tests.faults.programs import Launcher
from tests.worlds import Enrolled, Owner

from kagimori_protocol import messages
from kagimori_simulator.amd import AmdRoot

pytestmark = pytest.mark.slow  # the quick suite has three minutes

YEAR_S = 365 * 86400
LIFETIME_S = 300
SKEW_S = 5
AT_ONCE = 6


@dataclass
class Story:
    """A VM and its verifier, whose clock stands still unless somebody moves it."""

    guest: Guest
    owner: Owner
    right: float = field(default_factory=time.time)
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Give the verifier its clock."""
        self.owner.verifier.service._clock = lambda: self.right + self.shift

    @property
    def url(self) -> str:
        return self.owner.url

    def confirm(self, told: Told) -> None:
        """Confirm an answer, and hold what must be true then."""
        self.guest.confirm(self.url, self.guest.confirmation(told))
        self.hold([told])

    def hold(self, answers: list[Told]) -> None:
        """Hold what must be true at the end, whatever the clocks said."""
        opened = [self.guest.open(told) for told in answers]
        invariants.nothing_is_released_that_the_ledger_lacks(self.owner.directory, opened)
        invariants.nothing_is_released_twice(self.owner.directory, opened)
        invariants.opened_is_recorded_once(self.owner.directory, opened[-1].session)
        self.owner.ledger()

    def start_over(self) -> Told:
        """Let the VM begin anew, as an agent does whose challenge has grown old."""
        return self.guest.release(self.url, self.guest.evidence(self.url))


@pytest.fixture
def story(guest: Guest, amd: AmdRoot, tmp_path: Path) -> Iterator[Story]:
    """Begin one."""
    with Owner.opened(guest.copy(tmp_path / "verifier"), amd) as owner, owner.served():
        yield Story(guest, owner)


@pytest.mark.parametrize("seconds", [-SKEW_S, -1, LIFETIME_S - 30, LIFETIME_S])
@pytest.mark.parametrize("guest", ["svsm-vtpm", "snp-direct"], indirect=True)
def test_a_clock_that_jumps_within_a_challenges_life_is_not_noticed(story: Story, seconds: int) -> None:
    """Between challenge and release; the answer comes, and once."""
    evidence = story.guest.evidence(story.url)
    story.shift = seconds
    told = story.guest.release(story.url, evidence)
    story.confirm(told)


@pytest.mark.parametrize("seconds", [-10 * YEAR_S, -SKEW_S - 1, LIFETIME_S + 1, 10 * YEAR_S])
@pytest.mark.parametrize("guest", ["svsm-vtpm", "snp-direct"], indirect=True)
def test_a_clock_that_jumps_further_makes_the_vm_begin_anew(story: Story, seconds: int) -> None:
    """The challenge is stale, and the agent is told so; nothing was decided. With the clock right, the key comes."""
    evidence = story.guest.evidence(story.url)
    story.shift = seconds
    assert story.guest.release(story.url, evidence).denial == "stale-session"
    assert story.owner.events() == []
    story.shift = 0
    story.confirm(story.start_over())


@pytest.mark.parametrize("year", [1971, 2009, 2040])
def test_a_verifier_in_another_decade_releases_nothing(story: Story, year: int) -> None:
    """Its certificates and revocation lists are not valid then, whatever its tokens say. Set right, it releases."""
    story.shift = datetime(year, 1, 1, tzinfo=UTC).timestamp() - story.right
    verdict = story.guest.attacker.verdict(story.start_over())
    failed = [check.id for check in verdict.checks if not check.ok]
    assert failed == ["endorsement.valid"] + ["endorsement.revocation"] * (year == 2040)
    assert story.owner.events() == ["refused"]
    story.shift = 0
    story.confirm(story.start_over())


@pytest.mark.parametrize("seconds", [-10 * YEAR_S, -1000, 1000, 10 * YEAR_S])
def test_a_confirm_counts_whenever_it_comes(story: Story, seconds: int) -> None:
    """It proves who opened the answer, not when: the booted system may send it late, and clocks may be wrong."""
    told = story.start_over()
    story.shift += seconds
    story.confirm(told)


def test_an_answer_dropped_by_a_clock_that_jumped_is_made_again_and_both_can_be_confirmed(
    story: Story,
) -> None:
    """The clock ran ahead, another VM's boot cleared old answers away, the clock was set back: the VM asks again.

    Whichever answer it opened, its Confirm counts: the agent may have the first one, and somebody else resend.
    """
    first = story.start_over()
    story.shift += LIFETIME_S + 60
    story.start_over()
    story.shift = 0
    again = story.guest.release(story.url, first.request)
    assert again.body != first.body
    assert story.guest.open(again) == story.guest.open(first)
    story.guest.confirm(story.url, story.guest.confirmation(first))
    story.guest.confirm(story.url, story.guest.confirmation(again))
    story.hold([first, again])


def test_a_clock_that_jumps_at_every_step_ends_in_one_key(story: Story) -> None:
    """Forth and back before each request; the ledger's order is that of its lines, not of its clock."""
    answers: list[Told] = []
    for seconds in (200, -200, 290, -290):
        evidence = story.guest.evidence(story.url)
        story.shift += seconds
        told = story.guest.release(story.url, evidence)
        story.shift -= seconds
        assert (told.denial is None) == (seconds > 0)
        answers += [told] * (told.denial is None)
    story.confirm(answers[-1])
    story.hold(answers)


@pytest.mark.parametrize("year", [1971, 2009, 2040])
def test_an_agent_in_another_decade_unlocks(launcher: Launcher, enrolled: Enrolled, year: int) -> None:
    """A guest's clock is its host's to bend, so nothing that the agent decides depends on it."""
    with enrolled.booted() as (world, _):
        config = world.directory / "agent.toml"
        done = launcher.run("agent", "unlock", "--prove", "--json", "--config", config, year=year)
        assert done.code == 0, done.stderr.read_text()
        assert world.vtpm is not None
        invariants.the_boot_is_capped(world.vtpm)
    assert done.json["confirmed"]
    assert enrolled.owner.events() == ["released", "confirmed-opened"]


def _at_once(do: Callable[[], bytes]) -> list[bytes]:
    """Do the same several times at once."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [future.result() for future in [threads.submit(do) for _ in range(AT_ONCE)]]


@pytest.mark.parametrize("guest", ["svsm-vtpm", "snp-direct"], indirect=True)
def test_requests_that_come_several_times_at_once_count_once(story: Story) -> None:
    """Whoever repeats them gets the bytes that are there already; the ledger has one line of each kind."""
    guest, url = story.guest, story.url
    evidence = guest.evidence(url)
    answers = _at_once(lambda: guest.ask(url, messages.PATH_RELEASE, evidence))
    assert len(set(answers)) == 1
    told = Told(evidence, answers[0])
    confirmation = guest.confirmation(told)
    receipts = _at_once(lambda: guest.ask(url, messages.PATH_CONFIRM, confirmation))
    assert len(set(receipts)) == 1
    story.hold([told])
    assert story.owner.events() == ["released", "confirmed-opened"]


def test_a_confirm_that_overtakes_its_evidence_is_refused_and_counts_when_it_comes_again(
    story: Story, amd: AmdRoot, tmp_path: Path
) -> None:
    """A database was restored to before the release: its Confirm means nothing there, until the evidence has come."""
    guest = story.guest
    told = story.start_over()
    with Owner.opened(guest.copy(tmp_path / "restored"), amd) as owner, owner.served() as url:
        body = guest.confirmation(told)
        reply = messages.decode_confirm_reply(guest.ask(url, messages.PATH_CONFIRM, body))
        assert getattr(reply, "code", None) == "not-authentic"
        assert owner.events() == []
        Story(guest, owner).confirm(guest.release(url, told.request))


def test_a_late_received_does_not_take_opened_back(story: Story) -> None:
    """Confirms of one session in another order: what is final stays."""
    guest, url = story.guest, story.url
    told = story.start_over()
    payload = guest.attacker.open(told)
    story.confirm(told)
    for outcome in ("received", "failed"):
        body = guest.attacker.confirm(told, payload, outcome)
        reply = messages.decode_confirm_reply(guest.ask(url, messages.PATH_CONFIRM, body))
        assert getattr(reply, "code", None) == "not-authentic"
    story.hold([told])


def test_evidence_that_comes_again_after_its_confirm_gets_the_same_answer_and_no_other_line(
    story: Story,
) -> None:
    """The network held a copy back; new evidence of this boot is refused, as it has opened its volumes."""
    told = story.start_over()
    story.confirm(told)
    assert story.guest.release(story.url, told.request).body == told.body
    verdict = story.guest.attacker.verdict(story.start_over())
    assert [check.id for check in verdict.checks if not check.ok] == ["boot.unopened"]
    story.hold([told])
    assert story.owner.events() == ["released", "confirmed-opened", "refused"]
