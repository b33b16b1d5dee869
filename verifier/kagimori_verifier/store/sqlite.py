"""All that is SQLite's own: how a file is opened, what makes it durable, what its errors mean.

WAL with full synchronisation: a line of the ledger is on the disk before anything that it tells of leaves the verifier.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

from kagimori_verifier.acting import acting_as, owner_of

NAME: Final = "sqlite"
BUSY_S: Final = 5
"""How long a transaction waits for another program's lock."""
BEGIN_READ: Final = "BEGIN"
BEGIN_WRITE: Final = "BEGIN IMMEDIATE"
"""Takes the write lock first, so that what was read cannot change before it is acted on."""

Problem = tuple[str, str]
"""An error code of this project, and what to do about it."""

LOCKED: Final = ("store.locked", "Another program holds the database; stop it, or try again.")
_FULL: Final = ("store.full", "Make room on the disk that holds the database.")
_READ_ONLY: Final = ("store.read-only", "Let the verifier's user write the database and its directory.")
_GONE: Final = ("store.gone", "Is the database where verifier.toml says, and its directory writable?")
_PROBLEMS: Final[dict[int, Problem]] = {
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: _GONE,
    sqlite3.SQLITE_IOERR: (
        "store.broken",
        "The disk fails: see the system's log, and restore from your backup.",
    ),
    sqlite3.SQLITE_CORRUPT: ("store.broken", "Restore the database from your backup."),
    sqlite3.SQLITE_NOTADB: ("store.broken", "This file is no database: see verifier.toml."),
}
_PRIMARY: Final = 0xFF
"""The lowest byte of an extended error code is the primary one."""
_NOT_WRITABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def create_file(path: Path) -> None:
    """Make an empty file that only its owner may read, unless there is one. Raises OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def file_identity(path: Path) -> tuple[int, int]:
    """Tell which file a path names now: device and inode. Raises OSError."""
    facts = os.stat(path)  # noqa: PTH116 - each transaction asks, and Path.stat takes twice as long
    return facts.st_dev, facts.st_ino


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing file. A missing one is an error: SQLite would quietly put an empty database in its place."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,  # the store begins transactions itself
        check_same_thread=False,  # the pool gives a connection to one thread at a time
    )
    try:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def copy(source: Path, to: Path) -> None:
    """Copy a database as it is now into a new file, also while it is written. Raises OSError and SQLite's errors.

    SQLite's own way of copying takes a snapshot, with what still lies in the write-ahead log; copying the files does not.
    """
    # SQLite opens by name what was made here: in a directory of another user's, who may have put a link there meanwhile, root
    # has that user's rights.
    # Whose they are is asked before: one of them may not look into what lies above the other's.
    owner, maker = owner_of(source.parent), owner_of(to.parent)
    with acting_as(owner), closing(connect(source)) as here, acting_as(maker):
        os.close(os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(to, isolation_level=None)) as there:
            here.backup(there)
            there.execute("PRAGMA journal_mode=DELETE").close()  # one file, with nothing beside it
            _require_intact(there)
        with to.open("rb") as file:
            os.fsync(file.fileno())


def check(path: Path) -> None:
    """Read a whole database. Raises SQLite's errors where its structure is broken."""
    with closing(connect(path)) as connection:
        _require_intact(connection)


def _require_intact(connection: sqlite3.Connection) -> None:
    for check in ("integrity_check", "foreign_key_check"):
        found = connection.execute(f"PRAGMA {check}").fetchone()
        if found not in {None, ("ok",)}:
            raise sqlite3.DatabaseError(f"{check}: {' '.join(map(str, found))}")


def problem(cause: BaseException | None) -> Problem | None:
    """Say what an error of SQLite means to an operator; None for one that has no name here."""
    return _PROBLEMS.get(getattr(cause, "sqlite_errorcode", -1) & _PRIMARY)


def is_conflict(cause: BaseException | None) -> bool:
    """Tell whether a constraint or a trigger of the tables refused a change."""
    return getattr(cause, "sqlite_errorcode", -1) & _PRIMARY == sqlite3.SQLITE_CONSTRAINT


def problem_of_file(error: OSError) -> Problem:
    """Say what an error of the file system means to an operator."""
    if error.errno in _NOT_WRITABLE:
        return _READ_ONLY
    if error.errno in _NO_ROOM:
        return _FULL
    return _GONE
