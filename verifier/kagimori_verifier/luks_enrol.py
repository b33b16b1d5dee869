"""Run cryptsetup on the owner's machine, and write headers to a device, for ``luks2_change``.

Secrets go through pipes: never by argument, environment or file. cryptsetup works on a header in memory, is looked for in
fixed directories and gets a minimal environment, since whoever enrols is often root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from kagimori_protocol import luks2_change, luks2_layout
from kagimori_protocol.errors import DiskError, OperatorError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kagimori_protocol.luks2_change import Change, Image, Pieces, Salts

CRYPTSETUP_S: Final = 120
"""How long one call may take: an existing keyslot's derivation may want seconds on a small machine."""
SEARCH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
BACKUP_MODE: Final = 0o600
"""A header with an old passphrase opens the volume for ever."""

_MEANINGS: Final = {
    1: "it did not accept the parameters",
    luks2_change.NO_KEY: "no keyslot opens with this passphrase",
    3: "it ran out of memory",
    4: "the device cannot be used",
    5: "the device is in use",
}
_NO_LUKS2: Final = frozenset({"luks.magic", "luks.version"})
_BLOCK: Final = 4096


class Disk:
    """A device or image whose header is worked on; nobody else's cryptsetup writes it meanwhile if it is a file."""

    def __init__(self, path: Path, file: int, part: tuple[int, int] | None = None) -> None:
        """Take a descriptor that is open for reading; ``part`` is offset and size of the volume in it, or None for all."""
        self._path = path
        self._file = file
        self._offset, self.size = part or (0, os.lseek(file, 0, os.SEEK_END))
        self.touched = False
        """Whether writing has begun."""

    def is_luks2(self) -> bool:
        """Tell whether a LUKS2 header seems to be there; nothing is verified."""
        return luks2_layout.probe(self.read) is not None

    def load(self) -> Image:
        """Read header and keyslots. Raises DiskError."""
        try:
            return luks2_change.load(self.read, self.size)
        except DiskError as error:
            if error.code not in _NO_LUKS2:
                raise
            raise DiskError(
                f"{self._path} is no LUKS2 volume.",
                code="volume.luks2",
                expected="a device or image with a LUKS2 header",
                found=error.found,
                todo="`cryptsetup convert --type luks2` turns a LUKS1 header into one.",
            ) from error

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes, fewer where the device ends. Raises DiskError."""
        data = bytearray()
        size = max(0, min(size, self.size - offset))
        at = self._offset + offset
        try:
            while len(data) < size and (part := os.pread(self._file, size - len(data), at + len(data))):
                data += part
        except OSError as error:
            raise failed(self._path, "read", str(error.strerror)) from error
        return bytes(data)

    def write(self, change: Change) -> None:
        """Write a change whose ``before`` is kept. Raises DiskError; ``touched`` tells whether writing had begun."""
        luks2_change.require_unchanged(change, self.read)
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise failed(self._path, "written", str(error.strerror)) from error
        self.touched = True
        try:
            luks2_change.apply(change, lambda offset, data: _write(file, self._offset + offset, data))
        except OSError as error:
            raise failed(self._path, "written", str(error.strerror)) from error
        finally:
            os.close(file)


@contextmanager
def opened(path: Path, part: tuple[int, int] | None = None) -> Iterator[Disk]:
    """Open a device or image, or a part of it: offset and size in bytes. Raises DiskError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise failed(path, "opened", str(error.strerror)) from error
    try:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise failed(path, "opened", "a directory")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as cryptsetup does on files
        except OSError as error:
            raise DiskError(
                f"{path} is being worked on.",
                code="volume.busy",
                expected="a device that nobody else changes",
                found=str(error.strerror),
                todo="Wait until the other program (cryptsetup, another enrolment) has ended.",
            ) from error
        yield Disk(path, file, part)
    finally:
        os.close(file)


def salts() -> Salts:
    """Make the salts of a header."""
    return os.urandom(64), os.urandom(64)


def keep(change: Change, path: Path) -> None:
    """Keep the header as it was, so that `cryptsetup luksHeaderRestore` can bring it back. Raises OperatorError.

    Never over a file that is there.
    """
    raw = change.before.raw
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, BACKUP_MODE)
        try:
            for at in range(0, len(raw), _BLOCK):
                if any(
                    block := raw[at : at + _BLOCK]
                ):  # most of it is zeros, which a sparse file need not hold
                    os.pwrite(file, block, at)
            os.ftruncate(file, len(raw))
            os.fsync(file)
        finally:
            os.close(file)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OperatorError(
            "The header as it was cannot be kept, so it is not changed.",
            code="volume.backup",
            expected=f"a new file {path}",
            found=str(error.strerror),
            todo="Name another file by --backup.",
        ) from error


def cryptsetup(
    arguments: Sequence[str],
    *,
    size: int,
    pieces: Pieces,
    stdin: bytes | memoryview,
    new_key: bytes | memoryview = b"",
) -> tuple[int, str, bytes]:
    """Run it as ``luks2_change.Cryptsetup`` says. Raises OperatorError, DiskError."""
    program = shutil.which("cryptsetup", path=SEARCH)
    if program is None:
        raise OperatorError(
            "cryptsetup is missing.",
            code="volume.cryptsetup",
            expected=f"the program cryptsetup in {SEARCH}",
            found="none",
            todo="Install it (Debian: cryptsetup-bin).",
        )
    memory = os.memfd_create("luks-header", os.MFD_CLOEXEC)
    reader, writer = os.pipe()
    paths = {luks2_change.HEADER: f"/proc/self/fd/{memory}", luks2_change.NEW_KEY: f"/proc/self/fd/{reader}"}
    try:
        os.write(writer, new_key)  # 32 bytes fit any pipe, so this never waits
        os.close(writer)
        os.ftruncate(memory, size)
        for offset, data in pieces:
            os.pwrite(memory, data, offset)
        done = _run([program, *(paths.get(word, word) for word in arguments)], stdin, (memory, reader))
        return done.returncode, _words(done), os.pread(memory, size, 0)
    finally:
        os.close(reader)
        os.close(memory)


def failed(path: Path, done: str, found: str) -> DiskError:
    """Give the error for a device that cannot be opened, read or written."""
    return DiskError(
        f"{path} cannot be {done}.",
        code="volume.device",
        expected="a device or image with a LUKS2 header, on this machine",
        found=found,
        todo="See that it is there and complete, and that this user may read and write it.",
    )


def _write(file: int, offset: int, data: bytes) -> None:
    """Write a part of a header so that it would outlive a power cut."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
    os.fsync(file)


def _run(
    command: list[str], stdin: bytes | memoryview, pass_fds: tuple[int, ...]
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=CRYPTSETUP_S,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            pass_fds=pass_fds,
        )
    except subprocess.TimeoutExpired:
        raise DiskError(
            "cryptsetup takes too long.",
            code="volume.timeout",
            expected=f"an end within {CRYPTSETUP_S} s",
            found="none",
            todo="Give the keyslot of the passphrase a cheaper KDF, or use a faster machine.",
        ) from None
    except OSError as error:
        raise OperatorError(
            "cryptsetup cannot be started.",
            code="volume.cryptsetup",
            expected=f"{command[0]} to start",
            found=str(error.strerror),
        ) from error


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    """Say what cryptsetup's exit code means, and its own words in one bounded line."""
    meaning = _MEANINGS.get(done.returncode, f"exit code {done.returncode}")
    words = " ".join(done.stderr.decode(errors="replace").split())[:300]
    return f"{meaning}: {words}" if words else meaning
