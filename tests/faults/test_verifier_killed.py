"""kill -9 at every write of the verifier, and between all that it does: the VM asks again and gets its key, once.

The counting run lists the points that a whole unlock passes; each is one case. The numbers below are held to it, so a
write that is added to the verifier is a case that is missing here.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.attacks.attacker import Told
from tests.faults import invariants
from tests.faults.guests import KINDS, Guest, Opened
from tests.faults.programs import Launcher

from kagimori_protocol.errors import NetworkError
from kagimori_protocol.messages import Kind

pytestmark = pytest.mark.slow  # a verifier per case

POINTS: dict[Kind, dict[str, int]] = {
    "svsm-vtpm": {"challenge": 4, "release": 25, "confirm": 17},
    "snp-direct": {"challenge": 4, "release": 25, "confirm": 16},
}
"""How many points a request passes."""
REMAKING: dict[Kind, int] = {"svsm-vtpm": 17, "snp-direct": 17}
"""How many points a release passes whose decision was written down by a verifier that died then."""
DECIDED = "release: after COMMIT #1"

CASES = [
    (kind, request, number)
    for kind, requests in POINTS.items()
    for request, count in requests.items()
    for number in range(count)
]


@dataclass
class Story:
    """One VM and one verifier that is killed, until it is not any more."""

    launcher: Launcher
    guest: Guest
    directory: Path
    evidence: bytes = b""
    answers: list[Told] = field(default_factory=list)

    def unlock(self, **failpoints: object) -> bool:
        """Ask, open, confirm; tells whether all three were answered. Evidence and answers are kept."""
        with self.launcher.serving(self.directory, **failpoints) as (url, program):
            with contextlib.suppress(NetworkError):
                self.evidence = self.evidence or self.guest.evidence(url)
                self.answers.append(self.guest.release(url, self.evidence))
                self.guest.confirm(url, self.guest.confirmation(self.answers[-1]))
            if "at" in failpoints:
                assert program.wait() == -signal.SIGKILL, program.stderr.read_text()
                return False
            if "record" in failpoints:  # what comes after the last reply is recorded, too
                program.send(signal.SIGTERM)
                assert program.wait() == 0
            invariants.no_traceback(program.stderr)
            return True

    def hold(self) -> list[Opened]:
        """Hold what must be true after each fault; gives the answers that could be opened."""
        opened = [self.guest.open(told) for told in self.answers]
        invariants.the_owner_is_safe(self.launcher, self.directory, opened)
        return opened

    def end(self) -> None:
        """Let the VM ask once more, of a verifier that is well, and hold what must be true then."""
        assert self.unlock()
        opened = self.hold()
        invariants.opened_is_recorded_once(self.directory, opened[-1].session)


@pytest.fixture
def story(launcher: Launcher, guest: Guest, tmp_path: Path) -> Story:
    """Begin one."""
    return Story(launcher, guest, guest.copy(tmp_path / "verifier"))


@dataclass
class Counted:
    """The points of a whole unlock, and of one that is taken up again, by kind and request."""

    whole: dict[Kind, dict[str, list[str]]]
    remaking: dict[Kind, list[str]]


def points(record: Path, request: str) -> list[str]:
    """Read what a run has passed while it answered one request."""
    return [line for line in record.read_text().splitlines() if line.startswith(f"{request}: ")]


@pytest.fixture(scope="session")
def counted(
    launcher: Launcher, guests: dict[Kind, Guest], tmp_path_factory: pytest.TempPathFactory
) -> Counted:
    """Unlock once without a fault, and once with a verifier that dies when it has decided; list all points."""
    counts = Counted({}, {})
    for kind in KINDS:
        directory = tmp_path_factory.mktemp("counted")
        whole, remaking = directory / "whole", directory / "remaking"
        story = Story(launcher, guests[kind], guests[kind].copy(directory / "verifier"))
        assert story.unlock(record=whole)
        counts.whole[kind] = {request: points(whole, request) for request in POINTS[kind]}
        story = Story(launcher, guests[kind], guests[kind].copy(directory / "again"))
        assert not story.unlock(at=DECIDED)
        assert story.unlock(record=remaking)
        counts.remaking[kind] = points(remaking, "release")
    return counts


def test_every_write_is_a_case(counted: Counted) -> None:
    """The cases of this file are all points that the verifier passes, and no other."""
    for kind, requests in POINTS.items():
        found = {request: len(counted.whole[kind][request]) for request in requests}
        assert found == requests, counted.whole[kind]
        assert len(counted.remaking[kind]) == REMAKING[kind], counted.remaking[kind]


@pytest.mark.parametrize(("guest", "request_name", "number"), CASES, indirect=["guest"])
def test_a_verifier_killed_anywhere_has_released_nothing_unwritten_and_the_vm_gets_its_key(
    story: Story, counted: Counted, request_name: str, number: int
) -> None:
    """A crash between any two of its steps: the VM sends the same again, and it is as if there had been none."""
    point = counted.whole[story.guest.kind][request_name][number]
    assert not story.unlock(at=point), point
    story.hold()
    story.end()


@pytest.mark.parametrize(
    ("guest", "number"),
    [(kind, number) for kind in KINDS for number in range(REMAKING[kind])],
    indirect=["guest"],
)
def test_a_verifier_killed_again_while_it_makes_up_for_the_first_time_still_answers_the_third(
    story: Story, counted: Counted, number: int
) -> None:
    """The decision stands, its answer was never made, and the verifier dies anywhere while it makes it."""
    assert not story.unlock(at=DECIDED)
    assert not story.unlock(at=counted.remaking[story.guest.kind][number])
    story.hold()
    assert [line.event for line in invariants.lines(story.directory)][:1] == ["released"]
    story.end()


def test_a_vm_that_starts_over_gets_its_key_under_a_line_of_its_own(story: Story) -> None:
    """An agent that gives up on its evidence shows new evidence of the same boot; both decisions are in the ledger."""
    assert not story.unlock(at=DECIDED)
    story.evidence = b""
    story.end()
    events = [line.event for line in invariants.lines(story.directory)]
    assert events == ["released", "released", "confirmed-opened"]


@pytest.mark.parametrize("guest", ["snp-direct"], indirect=True)
def test_without_a_tpm_new_evidence_of_the_same_boot_gets_nothing_after_a_crash(story: Story) -> None:
    """Such a boot has one answer, and it was decided; the same evidence still gets it, other evidence never."""
    assert not story.unlock(at=DECIDED)
    first = story.evidence
    with story.launcher.serving(story.directory) as (url, _):
        second = story.guest.release(url, story.guest.evidence(url))
        verdict = story.guest.attacker.verdict(second)
    assert [check.id for check in verdict.checks if not check.ok] == ["boot.ungranted"]
    story.evidence = first
    story.end()
