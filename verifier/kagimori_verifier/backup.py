"""Make a backup of a verifier while it serves: its database as it is at one moment, its settings, its endorsements.

Killed at any moment, the file either has its name and is whole, or has not. What was unfinished lies beside it under a name
with a dot, holds nothing that is not wrapped, and is taken up by the next backup of that name. The KEK is in no backup
unless its owner asks for that, with a passphrase.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import backup_format, ledger
from kagimori_verifier.acting import acting_as, owner_of
from kagimori_verifier.keystore.kek import kek_id
from kagimori_verifier.store.database import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_verifier.acting import User
    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Store

SETTINGS: Final = "verifier.toml"
DATABASE: Final = "verifier.db"
ENDORSEMENTS: Final = "endorsements/"


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made: its size in bytes, and the ledger's line and head of it; others may have come after."""

    size: int
    lines: int
    head: bytes


def make(  # noqa: PLR0913 - what is backed up, and whereto
    settings: Settings,
    config: Path,
    store: Store,
    kek: bytes,
    to: Path,
    at_s: int,
    passphrase: bytes | None = None,
) -> Made:
    """Back up a verifier to the new file ``to``; ``config`` is its verifier.toml. With a passphrase, the KEK is in it.

    Root works in another user's directory as that user, also in that of ``to``. Raises OperatorError: no room, a file that is there, a ledger that is broken (a backup of which could not be restored).
    """
    if os.path.lexists(to):
        raise _exists(to)
    # Where this process is, and what a name leads through from there, may be root's alone.
    to, config = to.parent.resolve() / to.name, config.resolve()
    head = backup_format.make_head(kek, kek_id(kek), SCHEMA, at_s, passphrase)
    with store.read() as txn:
        ledger.verify(txn)
    with store.write() as txn:  # before the copy, so that it is in there, too
        body = {"with_kek": passphrase is not None}
        line = ledger.append(txn, at_s=at_s, event="backup", vm_id=None, session=None, body=body)
    with _writable(to), acting_as(maker := owner_of(to.parent)), contextlib.ExitStack() as ends:
        new, copy = to.with_name(f".{to.name}.new"), to.with_name(f".{to.name}.copy")
        file = ends.enter_context(_locked(new))
        with contextlib.suppress(FileNotFoundError):
            copy.unlink()  # of a backup that was killed
        ends.callback(copy.unlink, missing_ok=True)
        ends.callback(new.unlink, missing_ok=True)
        store.snapshot(copy)
        backup_format.write(file, head, kek, _files(settings, config, copy, maker))
        copy.unlink()
        file.flush()
        os.fsync(file.fileno())
        _read_again(file, kek)
        if os.path.lexists(to):
            raise _exists(to)
        size = new.stat().st_size
        new.rename(to)
        _sync(to.parent)
    return Made(size, line.seq, line.hash)


def _files(settings: Settings, config: Path, copy: Path, maker: User) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Give what goes into a backup, each read as whose it is: the service may have put links to root's files among its own."""
    endorsements = settings.path(settings.endorsements)
    with acting_as(settings.owner):
        kept = sorted(_certificates(endorsements))
    named = [(SETTINGS, config, settings.owner), (DATABASE, copy, maker)]
    named += [
        (ENDORSEMENTS + path.relative_to(endorsements).as_posix(), path, settings.owner) for path in kept
    ]
    for name, path, owner in named:
        with acting_as(owner):
            file = path.open("rb")
        with file:
            yield name, os.fstat(file.fileno()).st_size, file


def _certificates(endorsements: Path) -> Iterator[Path]:
    """Find what is kept, but for an import at work, or one that was killed. Raises OSError for what cannot be looked into."""
    for directory, below, names in os.walk(endorsements, onerror=_raise):
        below[:] = [name for name in below if not name.startswith(".")]
        found = (
            Path(directory, name) for name in names if name.endswith(".der") and not name.startswith(".")
        )
        yield from (path for path in found if path.is_file())


def _raise(error: OSError) -> None:
    """Let no directory be passed over but one that has gone meanwhile, or was never made."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _read_again(file: IO[bytes], kek: bytes) -> None:
    """Read what was written, to its end: a backup that cannot be read is found today. Raises BackupBroken."""
    file.seek(0)
    head, before = backup_format.read_head(file)
    for _, _, parts in backup_format.read(file, head, before, kek):
        deque(parts, maxlen=0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open an unfinished file, empty; one backup of a name at a time. The lock goes with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OperatorError(
                "Another backup of this name is being made.",
                code="backup.busy",
                expected="one at a time",
                found="one at work",
            ) from None
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "somebody else has put it there", str(path))
        file.truncate(0)
        yield file


@contextlib.contextmanager
def _writable(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OperatorError(
            f"The backup {to} cannot be made.",
            code="backup.write",
            expected="files that can be read, and a directory with room that can be written",
            found=f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror),
            todo="Nothing has the backup's name now.",
        ) from error


def _sync(directory: Path) -> None:
    """Let a name last. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(to: Path) -> OperatorError:
    return OperatorError(
        f"{to} is there already.",
        code="backup.exists",
        expected="a new name, for a backup never takes the place of another",
        found="a file of that name",
        todo="Choose another name, such as one with the date.",
    )
