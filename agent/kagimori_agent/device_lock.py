"""Keep other programs from a device whose header is changed: udev by the device's own lock, cryptsetup by its lock file.

For a volume in a file cryptsetup locks that file. For a block device it locks a file of the device's number instead, which
whoever leaves it last removes; so the one that was locked may not be the one that the next opens, and is looked for again
(libcryptsetup, lib/utils_device_locking.c). A shared lock of udev, which looks at a device for a moment, is waited for.

Import budget: ``fcntl``, ``os``, ``stat``, ``time`` and the error tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECTORY: Final = Path("/run/cryptsetup")
"""Where cryptsetup has its lock files: what it is built with by default, and by Debian, Fedora, openSUSE and Arch."""
WAIT_S: Final = 5.0
"""How long another's lock is waited for, in seconds."""
_POLL_S: Final = 0.05
_DIRECTORY_MODE: Final = 0o700
_FILE_MODE: Final = 0o644
"""Both as cryptsetup makes them."""


@contextlib.contextmanager
def held(path: Path, file: int) -> Iterator[None]:
    """Be the only one at the device or image ``path``, which is open as ``file``. Raises DiskError "enrol.busy".

    The lock on ``file`` itself ends as that is closed.
    """
    until = time.monotonic() + WAIT_S
    _lock(file, path, path, until)
    found = os.fstat(file)
    if not stat.S_ISBLK(found.st_mode):
        yield
        return
    name = lock_file(found.st_rdev)
    locked = _locked(name, path, until)
    try:
        yield
    finally:
        _leave(locked, name)


def lock_file(number: int) -> Path:
    """Name cryptsetup's lock file of a block device, by its number (``st_rdev``)."""
    return DIRECTORY / f"L_{os.major(number)}:{os.minor(number)}"


def _locked(name: Path, path: Path, until: float) -> int:
    """Open and lock a file that has this name once it is locked, too."""
    while True:
        file = _made(name, path)
        try:
            _lock(file, path, name, until)
            if _is(file, name):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _made(name: Path, path: Path) -> int:
    try:
        with contextlib.suppress(FileExistsError):
            name.parent.mkdir(mode=_DIRECTORY_MODE)
        directory = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
            return os.open(name.name, flags, _FILE_MODE, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise DiskError(
            f"{path} cannot be kept from other programs.",
            code="enrol.lock",
            expected=f"a lock file {name} that can be made, as cryptsetup makes it",
            found=str(error.strerror),
            todo="Run it as root, with a /run that can be written.",
        ) from error


def _lock(file: int, path: Path, name: Path, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) and time.monotonic() < until:
                time.sleep(_POLL_S)
                continue
            raise DiskError(
                f"{path} is being worked on.",
                code="enrol.busy",
                expected=f"a device that nothing else works on: {name} unlocked within {WAIT_S:.0f} s",
                found=str(error.strerror),
                todo=f"Wait until the other program (cryptsetup, another enrolment) has ended; `fuser -v {name}` names it.",
            ) from error


def _is(file: int, name: Path) -> bool:
    """Tell whether an open file is the one that has a name now."""
    try:
        return os.path.samestat(os.fstat(file), name.stat())
    except FileNotFoundError:
        return False


def _leave(file: int, name: Path) -> None:
    """Unlock a file, having removed it: who waits for it sees that, and makes another."""
    try:
        with contextlib.suppress(OSError):
            if _is(file, name):
                name.unlink()
    finally:
        os.close(file)
