"""Requests that come together share one commit (store.turns): its fault is everybody's, and nobody's answer precedes it.

Another program holds the database until all of them wait for their turn; then they write one after the other, and the
last one's commit is the one for all.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.attacks.attacker import Told
from tests.faults import invariants
from tests.faults.guests import Guest
from tests.faults.programs import POLL_S, WAIT_S, Launcher, Program
from tests.faults.test_database_ill import Ill, deleted, limited

from kagimori_protocol.errors import NetworkError

pytestmark = pytest.mark.slow  # verifiers as processes

AT_ONCE = 5
BUSY_S = 30.0
"""How long the verifier waits for the other program: longer than it takes that all requests have come."""


@dataclass
class Crowd:
    """Several pieces of evidence of one boot, at one verifier, at once."""

    launcher: Launcher
    guest: Guest
    directory: Path
    record: Path
    evidence: list[bytes] = field(default_factory=list)
    after: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What ends when all have their answer, or none."""

    def collect(self) -> None:
        """Draw challenges, and answer each."""
        with self.launcher.serving(self.directory) as (url, _):
            self.evidence = [self.guest.evidence(url) for _ in range(AT_ONCE)]

    @contextlib.contextmanager
    def asking(self, **failpoints: Any) -> Iterator[tuple[list[Future[Told]], Program]]:  # noqa: ANN401 - those of failpoints.arm
        """Send all of it; within the block all wait for their turn, and the database is let go at its end."""
        served = self.launcher.serving(self.directory, record=self.record, busy_s=BUSY_S, **failpoints)
        with served as (url, program), ThreadPoolExecutor(AT_ONCE) as threads:
            with self._held():
                futures = [threads.submit(self.guest.release, url, one) for one in self.evidence]
                self._wait_until_all_queue(program)
                yield futures, program
            for future in futures:
                future.exception(WAIT_S)
            self.after.close()
            if "at" in failpoints:
                assert program.wait() == -signal.SIGKILL

    def end(self) -> None:
        """Let everybody ask again, one of them confirm, and hold what must be true then."""
        with self.launcher.serving(self.directory) as (url, program):
            told = [self.guest.release(url, one) for one in self.evidence]
            self.guest.confirm(url, self.guest.confirmation(told[-1]))
            invariants.no_traceback(program.stderr)
        opened = [self.guest.open(one) for one in told]
        invariants.the_owner_is_safe(self.launcher, self.directory, opened)
        invariants.opened_is_recorded_once(self.directory, opened[-1].session)
        assert len(invariants.lines(self.directory, "released")) == AT_ONCE

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        holder = sqlite3.connect(self.directory / "verifier.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            holder.rollback()
            holder.close()

    def _wait_until_all_queue(self, program: Program) -> None:
        until = time.monotonic() + WAIT_S
        while self._passed("before a turn to write is taken") < AT_ONCE:
            assert time.monotonic() < until, self.record.read_text() + program.stderr.read_text()
            time.sleep(POLL_S)

    def _passed(self, point: str) -> int:
        return self.record.read_text().count(f"release: {point} #") if self.record.exists() else 0


@pytest.fixture
def crowd(launcher: Launcher, guest: Guest, tmp_path: Path) -> Crowd:
    """Gather one."""
    gathered = Crowd(launcher, guest, guest.copy(tmp_path / "verifier"), tmp_path / "record")
    gathered.collect()
    return gathered


def test_requests_that_wait_together_share_a_commit(crowd: Crowd) -> None:
    """Or the stories below would not be about what they say."""
    with crowd.asking() as (futures, _):
        pass
    assert all(future.result().denial is None for future in futures)
    assert crowd._passed("before SAVEPOINT") >= AT_ONCE - 1
    assert crowd._passed("after COMMIT") < AT_ONCE * 2, "two transactions each, if nobody shared"
    crowd.end()


@pytest.mark.parametrize(
    "point",
    [
        "before SAVEPOINT #1",
        "before RELEASE #1",
        "before SAVEPOINT #3",
        "before INSERT ledger #3",
        "before RELEASE #4",
        "before COMMIT #1",
    ],
)
def test_a_crash_before_the_shared_commit_is_as_if_nobody_had_come(crowd: Crowd, point: str) -> None:
    """Some had written and waited, one was writing: nobody has an answer, and the ledger nobody's line."""
    with crowd.asking(at=f"release: {point}") as (futures, _):
        pass
    assert [type(future.exception()) for future in futures] == [NetworkError] * AT_ONCE
    assert invariants.lines(crowd.directory) == []
    crowd.end()


def test_a_crash_after_the_shared_commit_leaves_everybodys_line_and_their_answers_to_be_made(
    crowd: Crowd,
) -> None:
    """All were decided, none was told; each gets its answer under its own line."""
    with crowd.asking(at="release: after COMMIT #1") as (futures, _):
        pass
    assert [type(future.exception()) for future in futures] == [NetworkError] * AT_ONCE
    assert len(invariants.lines(crowd.directory, "released")) == AT_ONCE
    crowd.end()


@pytest.mark.parametrize("room", [0, 8 << 10, 24 << 10, 48 << 10])
def test_a_shared_commit_without_room_fails_for_everybody(crowd: Crowd, room: int) -> None:
    """Whoever was answered has its line, whoever was not may ask again: a commit keeps all of them or none."""
    with crowd.asking() as (futures, program):
        ill = Ill(crowd.directory, program)
        crowd.after.enter_context(limited(room)(ill))
    answered = [future.result() for future in futures if future.exception() is None]
    assert room or not answered
    invariants.the_owner_is_safe(crowd.launcher, crowd.directory, map(crowd.guest.open, answered))
    crowd.end()


def test_a_database_taken_away_before_the_shared_commit_is_nobodys_answer(crowd: Crowd) -> None:
    """It would be committed to a file without a name, and every session unused again."""
    with crowd.asking() as (futures, program):
        crowd.after.enter_context(deleted(Ill(crowd.directory, program)))
    assert [type(future.exception()) for future in futures] == [NetworkError] * AT_ONCE
    assert invariants.lines(crowd.directory) == []
    crowd.end()
