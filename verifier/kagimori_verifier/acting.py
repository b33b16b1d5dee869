"""Owners' commands are run by root, in directories of the verifier's user, whose links may lead anywhere.

What root does there it does as that user: it can be led to nothing that the user could not have reached alone, and what it
makes is the user's. Paths of the command line, and the KEK, root uses as root.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kagimori_protocol.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class User:
    """A user and group, by number."""

    uid: int
    gid: int


def owner_of(directory: Path) -> User:
    """Tell whose a directory is, or, where it is not there yet, the nearest one above it. Raises OSError."""
    while True:
        try:
            facts = directory.stat()
        except FileNotFoundError:
            directory = directory.parent
        else:
            return User(facts.st_uid, facts.st_gid)


@contextlib.contextmanager
def acting_as(user: User) -> Iterator[None]:
    """Have this user's rights instead of root's; whoever is not root keeps what they have. Raises OperatorError.

    One inside another counts by itself. The rights are the whole process's: not for a program that serves.
    """
    before = os.geteuid(), os.getegid(), os.getgroups()
    if os.getuid() != 0 or before[0] == user.uid:
        yield
        return
    try:
        _become(user.uid, user.gid, [user.gid])
    except OSError as error:
        raise OperatorError(
            "Root may not act as another user here.",
            code="acting.user",
            expected=f"the right to act as user {user.uid}, whose directory it is",
            found=str(error.strerror),
            todo="Run it as that user, or where root has CAP_SETUID and CAP_SETGID.",
        ) from error
    try:
        yield
    finally:
        _become(*before)


def _become(uid: int, gid: int, groups: list[int]) -> None:
    os.seteuid(0)  # who alone may choose
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
