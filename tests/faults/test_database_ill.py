"""The database of a running verifier fails: its disk is full, somebody locks it, moves it, replaces it, or may not write it.

The reply is unsigned then, so to an agent it is none. Once the database is well again, the same bytes get their answer.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.attacks.attacker import Told
from tests.faults import invariants
from tests.faults.guests import Guest
from tests.faults.programs import Launcher, Program

from kagimori_protocol.errors import NetworkError, OperatorError

pytestmark = pytest.mark.slow  # a verifier per case

BUSY_S = 0.2
"""How long the verifiers of these stories wait for a lock; the fault lasts longer."""
NOBODY = 65534
FULL_BYTES = 1 << 20
"""Size of the disk that is filled."""


@dataclass
class Ill:
    """A verifier that runs, and where its database lies."""

    directory: Path
    program: Program

    @property
    def database(self) -> Path:
        return self.directory / "verifier.db"


Fault = Callable[[Ill], "contextlib.AbstractContextManager[None]"]


@contextlib.contextmanager
def held(ill: Ill, *statements: str) -> Iterator[None]:
    """Let another program hold the database for as long as the block takes."""
    holder = sqlite3.connect(ill.database, isolation_level=None)
    try:
        for statement in statements:
            holder.execute(statement).fetchall()
        yield
    finally:
        if holder.in_transaction:
            holder.rollback()
        holder.close()


@contextlib.contextmanager
def locked(ill: Ill) -> Iterator[None]:
    """Another program writes, and does not end."""
    with held(ill, "BEGIN IMMEDIATE"):
        yield


@contextlib.contextmanager
def locked_exclusively(ill: Ill) -> Iterator[None]:
    """Another program wants it all for itself."""
    with held(ill, "BEGIN EXCLUSIVE"):
        yield


@contextlib.contextmanager
def deleted(ill: Ill) -> Iterator[None]:
    """Somebody moves it away, as a clumsy backup does, and brings it back."""
    away = ill.directory / "away"
    ill.database.rename(away)
    try:
        yield
    finally:
        away.rename(ill.database)


@contextlib.contextmanager
def replaced(ill: Ill) -> Iterator[None]:
    """Somebody restores another one below the running verifier, sees the trouble, and takes it back."""
    with deleted(ill):
        shutil.copy(ill.directory / "away", ill.database)
        yield
        ill.database.unlink()


def limited(room: int) -> Fault:
    """Make a fault: no file may grow by more than so many bytes."""

    @contextlib.contextmanager
    def fault(ill: Ill) -> Iterator[None]:
        size = ill.database.with_name("verifier.db-wal").stat().st_size
        limit, pid = resource.RLIMIT_FSIZE, ill.program.pid
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (size + room, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, limit, before)

    return fault


def full(room: int) -> Fault:
    """Make a fault: the disk has so many bytes left, in pages."""

    @contextlib.contextmanager
    def fault(ill: Ill) -> Iterator[None]:
        filler = ill.directory / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - room)
        try:
            yield
        finally:
            filler.unlink()

    return fault


NO_WRITE: dict[str, Fault] = {
    "locked": locked,
    "locked exclusively": locked_exclusively,
    "deleted": deleted,
    "replaced": replaced,
    "without room for a byte": limited(0),
}
"""Faults that let nothing be written."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk that can be filled."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = ("-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs")
    done = subprocess.run(["mount", *options, directory], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here, so none is filled; the limits still are: {done.stderr}")
    yield directory
    subprocess.run(["umount", directory], check=True)


@dataclass
class Story:
    """One VM at one verifier whose database falls ill."""

    launcher: Launcher
    guest: Guest
    directory: Path

    def release(self, fault: Fault) -> bool:
        """Break it before the evidence arrives; tells whether an answer came all the same."""
        with self.launcher.serving(self.directory, busy_s=BUSY_S) as (url, program):
            evidence = self.guest.evidence(url)
            told = []
            with fault(Ill(self.directory, program)), contextlib.suppress(NetworkError):
                told.append(self.guest.release(url, evidence))
            told.append(self.guest.release(url, evidence))
            self.guest.confirm(url, self.guest.confirmation(told[-1]))
            self._end(program, told)
        return len(told) > 1

    def confirm(self, fault: Fault) -> bool:
        """Break it before the Confirm arrives; tells whether a receipt came all the same."""
        came = False
        with self.launcher.serving(self.directory, busy_s=BUSY_S) as (url, program):
            told = self.guest.release(url, self.guest.evidence(url))
            body = self.guest.confirmation(told)
            with fault(Ill(self.directory, program)), contextlib.suppress(NetworkError):
                self.guest.confirm(url, body)
                came = True
            assert came or [line.event for line in invariants.lines(self.directory)] == ["released"]
            self.guest.confirm(url, body)
            self._end(program, [told])
        return came

    def challenge(self, fault: Fault) -> bool:
        """Break it before the Hello arrives; tells whether a challenge came all the same."""
        came = False
        with self.launcher.serving(self.directory, busy_s=BUSY_S) as (url, program):
            with fault(Ill(self.directory, program)), contextlib.suppress(NetworkError):
                self.guest.evidence(url)
                came = True
            told = self.guest.release(url, self.guest.evidence(url))
            self.guest.confirm(url, self.guest.confirmation(told))
            self._end(program, [told])
        return came

    def _end(self, program: Program, told: list[Told]) -> None:
        opened = [self.guest.open(one) for one in told]
        invariants.no_traceback(program.stderr)
        invariants.the_owner_is_safe(self.launcher, self.directory, opened)
        invariants.opened_is_recorded_once(self.directory, opened[-1].session)


@pytest.fixture
def story(launcher: Launcher, guest: Guest, tmp_path: Path) -> Story:
    """Begin one."""
    return Story(launcher, guest, guest.copy(tmp_path / "verifier"))


@pytest.mark.parametrize("fault", NO_WRITE)
@pytest.mark.parametrize("guest", ["svsm-vtpm", "snp-direct"], indirect=True)
def test_what_cannot_be_written_down_is_not_released_until_it_can(story: Story, fault: str) -> None:
    """No answer while the ledger cannot have its line; afterwards the same evidence gets the key."""
    assert not story.release(NO_WRITE[fault])


@pytest.mark.parametrize("fault", NO_WRITE)
def test_a_confirm_that_cannot_be_written_down_has_no_receipt_until_it_can(story: Story, fault: str) -> None:
    """The booted system sends it again; it counts once."""
    assert not story.confirm(NO_WRITE[fault])


@pytest.mark.parametrize("fault", NO_WRITE)
def test_a_challenge_needs_no_write(story: Story, fault: str) -> None:
    """A database that can still be read gives one; one that is not the verifier's own any more gives none."""
    assert story.challenge(NO_WRITE[fault]) == (fault not in {"deleted", "replaced"})


@pytest.mark.parametrize("room", [0, 2048, 4096, 12 << 10, 20 << 10, 28 << 10, 36 << 10])
@pytest.mark.parametrize("what", ["release", "confirm"])
def test_a_write_that_breaks_off_in_the_middle_is_as_if_it_had_not_begun(
    story: Story, what: str, room: int
) -> None:
    """No file may grow further, somewhere between the first page of a transaction and its last."""
    answered = getattr(story, what)(limited(room))
    assert not answered or room, "without room nothing can be kept"


@pytest.mark.parametrize("room", [0, 4096, 12 << 10, 20 << 10, 32 << 10, 64 << 10])
@pytest.mark.parametrize("what", ["release", "confirm"])
def test_a_disk_that_is_full_keeps_nothing_and_releases_nothing(
    launcher: Launcher, guest: Guest, disk: Path, what: str, room: int
) -> None:
    """There is room for a part of what has to be kept, or for none; once there is room again, all is as it should be."""
    story = Story(launcher, guest, guest.copy(disk / "verifier"))
    answered = getattr(story, what)(full(room))
    assert not answered or room, "without room nothing can be kept"


def test_an_owner_on_a_full_disk_is_told_so_and_nothing_is_half_done(
    launcher: Launcher, guest: Guest, disk: Path
) -> None:
    """The command line says what to do, and works when that is done."""
    directory = guest.copy(disk / "verifier")
    words = ("--json", "--config", directory / "verifier.toml", "vm", "add", "web2", "--profile", "grub")
    before = invariants.lines(directory)
    (directory / "verifier.db-wal").unlink(missing_ok=True)
    with full(0)(Ill(directory, Program(launcher, 0, disk, disk))):
        done = launcher.run("verifier", *words)
        assert done.json["error"]["code"] in {"store.full", "store.broken"}
        invariants.no_traceback(done.stderr)
    assert invariants.lines(directory) == before
    assert launcher.run("verifier", *words).code == 0
    invariants.the_owner_is_safe(launcher, directory)


def test_a_verifier_that_may_not_write_its_directory_says_so_and_starts_when_it_may(
    launcher: Launcher, guest: Guest
) -> None:
    """After a restore by root the files are another's; the verifier's user is told what to do."""
    user = NOBODY if os.geteuid() == 0 else None
    # Not below pytest's directories, which only their owner may enter.
    with tempfile.TemporaryDirectory(prefix="kagimori-faults-") as private:
        directory = guest.copy(Path(private) / "verifier")
        for path in (directory.parent, directory, *directory.rglob("*")):
            os.chown(path, user or -1, user or -1)
        places = [directory, directory / "verifier.db"]
        for path in places:
            path.chmod(0o500 if path.is_dir() else 0o400)
        done = launcher.run("verifier", "--json", "--config", directory / "verifier.toml", "serve", user=user)
        assert done.code == OperatorError.exit_code
        assert done.json["error"]["code"] == "store.read-only"
        assert done.json["error"]["todo"] == "Let the verifier's user write the database and its directory."
        for path in places:
            path.chmod(0o700)
        with launcher.serving(directory, user=user) as (url, _):
            told = guest.release(url, guest.evidence(url))
            guest.confirm(url, guest.confirmation(told))
        invariants.the_owner_is_safe(launcher, directory, [guest.open(told)])
