"""Give a volume of a booted system a keyslot for a new unlock key, or take it away again (``luks2_change``, ADR 9).

What changes is the header on the device, below a mapping that may well be in use: the data is not touched. The header as it
was goes to a file first, and cut off after any write, the volume opens by what opened it before.

Import budget: the standard library, ``luks``, ``device_lock``, and that of ``luks2_change``.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from typing import TYPE_CHECKING, Final

from kagimori_agent import device_lock
from kagimori_agent.luks import ENVIRONMENT, cryptsetup
from kagimori_protocol import luks2_change, luks2_guard
from kagimori_protocol.errors import DiskError, ImageError, OperatorError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kagimori_protocol.luks2_change import Change, Image, Pieces

CRYPTSETUP_S: Final = 300
"""How long one call may take: a passphrase's derivation may want a while."""
BACKUP_MODE: Final = 0o600
"""A header with an old passphrase opens the volume for ever."""
_MEANINGS: Final = {
    1: "it did not accept the parameters",
    luks2_change.NO_KEY: "no keyslot opens with this passphrase",
    3: "it ran out of memory",
    4: "the device cannot be used",
    5: "the device is in use",
}
_BLOCK: Final = 4096


class Disk:
    """A device whose header is worked on."""

    def __init__(self, path: Path, file: int) -> None:
        """Take a descriptor that is open for reading."""
        self.path = path
        self._file = file
        self.size = os.lseek(file, 0, os.SEEK_END)

    def load(self) -> Image:
        """Read header and keyslots. Raises DiskError if the header is not one that an agent would open."""
        return luks2_change.load(self.read, self.size)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes, fewer where the device ends. Raises DiskError."""
        data = bytearray()
        try:
            while len(data) < size and (part := os.pread(self._file, size - len(data), offset + len(data))):
                data += part
        except OSError as error:
            raise _failed(self.path, "read", error) from error
        return bytes(data)

    def write(self, change: Change, kept: Path) -> None:
        """Keep the header as it was in the new file ``kept``, then write. Raises DiskError, OperatorError."""
        keep(change, kept)
        luks2_change.require_unchanged(change, self.read)
        self.put(
            change.writes,
            f"It opens as before. If not: cryptsetup luksHeaderRestore --header-backup-file {kept} {self.path}",
        )

    def put(self, writes: Pieces, todo: str) -> None:
        """Write, one after the other, so that each would outlive a power cut; ``todo`` is for who cannot. Raises DiskError."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for offset, data in writes:
                    write(file, offset, data)
            finally:
                os.close(file)
        except OSError as error:
            raise DiskError(
                f"{self.path} was not written to its end.",
                code="enrol.write",
                expected="a device that can be written",
                found=str(error.strerror),
                todo=todo,
            ) from error


@contextlib.contextmanager
def opened(path: Path, *, alone: bool = True) -> Iterator[Disk]:
    """Open a device or image, and keep other programs' cryptsetup from it as long, unless only to look. Raises DiskError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, "opened", error) from error
    try:
        if not stat.S_ISBLK(mode := os.fstat(file).st_mode) and not stat.S_ISREG(mode):
            raise _failed(path, "opened", OSError(0, "it is neither a device nor a file"))
        with device_lock.held(path, file) if alone else contextlib.nullcontext():
            yield Disk(path, file)
    finally:
        os.close(file)


def opens(image: Image, passphrase: bytes) -> str | None:
    """Give the keyslot that a passphrase or key opens, or None. Raises DiskError if that stays unknown."""
    return luks2_change.slot_of(image, run, passphrase)


def require_volume_key(image: Image, key: bytes) -> None:
    """Raise DiskError unless this is the volume key of a header; what opens it does not matter."""
    if not luks2_change.has_volume_key(image, run, key):
        raise DiskError(
            "The volume's header is not that of the volume key that was made.",
            code="enrol.volume-key",
            expected="the header that the reencryption has left",
            found="one of another volume key",
            todo="If you have restored no header, the host has put another in its place, and may know what is behind it: "
            "nothing was written to it. Ask the provider, then run `kagimori-agent enrol --reencrypt` again.",
        )


def add(image: Image, passphrase: bytes, key: bytes, epoch: int) -> Change:
    """Plan a keyslot for a new unlock key, which the header's new token vouches for; proved. Raises DiskError."""
    return luks2_change.add_key(image, run, passphrase=passphrase, key=key, epoch=epoch, salts=salts())


def add_two(
    image: Image, passphrase: bytes, key: bytes, recovery_key: bytes, epoch: int
) -> tuple[Change, str]:
    """Plan a keyslot for a recovery key as well, of the same epoch, by one change; gives the unlock key's keyslot, too."""
    first = add(image, passphrase, key, epoch)
    second = add(first.after, key, recovery_key, epoch)
    return luks2_change.joined(first, second, run, key, epoch), first.slot


def remove(image: Image, slot: str) -> Change:
    """Plan to be without a keyslot and its token. Raises DiskError."""
    return luks2_change.remove_key(image, slot, salts())


def ours(image: Image) -> list[str]:
    """Name the keyslots that have a token of ours."""
    return sorted(luks2_guard.tied(image.header), key=int)


def salts() -> luks2_change.Salts:
    """Make the salts of a header."""
    return os.urandom(64), os.urandom(64)


def keep(change: Change, path: Path) -> None:
    """Keep the header as it was, for `cryptsetup luksHeaderRestore`, in a file that is not there yet. Raises OperatorError."""
    raw = change.before.raw
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, BACKUP_MODE)
        try:
            os.ftruncate(file, len(raw))
            for at in range(0, len(raw), _BLOCK):  # most blocks are zeros, which a sparse file need not hold
                if any(block := raw[at : at + _BLOCK]):
                    os.pwrite(file, block, at)
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
            code="enrol.backup",
            expected=f"a new file {path}",
            found=str(error.strerror),
            todo="Name another directory by --backup.",
        ) from error


def run(
    arguments: Sequence[str],
    *,
    size: int,
    pieces: Pieces,
    stdin: bytes | memoryview,
    new_key: bytes | memoryview = b"",
) -> tuple[int, str, bytes]:
    """Run cryptsetup on a header in memory, as ``luks2_change.Cryptsetup`` says. Raises ImageError, DiskError."""
    memory = os.memfd_create("luks-header", os.MFD_CLOEXEC)
    reader, writer = os.pipe()
    paths = {luks2_change.HEADER: f"/proc/self/fd/{memory}", luks2_change.NEW_KEY: f"/proc/self/fd/{reader}"}
    try:
        os.write(writer, new_key)  # 64 bytes fit any pipe, so this never waits
        os.close(writer)
        os.ftruncate(memory, size)
        for offset, data in pieces:
            os.pwrite(memory, data, offset)
        command = [str(cryptsetup()), *(paths.get(word, word) for word in arguments)]
        done = call(command, stdin, (memory, reader))
        return done.returncode, words(done), os.pread(memory, size, 0)
    finally:
        os.close(reader)
        os.close(memory)


def call(
    command: Sequence[str],
    stdin: bytes | memoryview,
    pass_fds: tuple[int, ...] = (),
    timeout_s: float | None = CRYPTSETUP_S,
) -> subprocess.CompletedProcess[bytes]:
    """Run cryptsetup with a secret on its standard input. Raises ImageError, DiskError."""
    try:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=timeout_s,
            env=ENVIRONMENT,
            pass_fds=pass_fds,
        )
    except subprocess.TimeoutExpired:
        raise DiskError(
            "cryptsetup takes too long.",
            code="enrol.timeout",
            expected=f"an end within {timeout_s} s",
            found="none",
            todo="Give the keyslot of the passphrase a cheaper KDF: cryptsetup luksConvertKey.",
        ) from None
    except OSError as error:
        raise ImageError(
            "cryptsetup cannot be started.",
            code="luks.no-cryptsetup",
            expected=f"{command[0]} to start",
            found=str(error.strerror),
            todo="Install cryptsetup.",
        ) from error


def words(done: subprocess.CompletedProcess[bytes]) -> str:
    """Say what cryptsetup's exit code means, and its own words in one bounded line."""
    meaning = _MEANINGS.get(done.returncode, f"exit code {done.returncode}")
    said = " ".join(done.stderr.decode(errors="replace").split())[:300]
    return f"{meaning}: {said}" if said else meaning


def write(file: int, offset: int, data: bytes) -> None:
    """Write so that it would outlive a power cut."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
    os.fsync(file)


def _failed(path: Path, done: str, error: OSError) -> DiskError:
    return DiskError(
        f"{path} cannot be {done}.",
        code="enrol.device",
        expected="a device or image with a LUKS2 header",
        found=str(error.strerror),
        todo="See that it is there, and that the agent runs as root.",
    )
