"""The key-encryption key (KEK) that wraps every secret in the database.

Providers by name; one is imported when it is used. ``file`` is 32 random bytes in a file that only its owner may read;
``credential`` is the same as a systemd credential, whose mode systemd answers for.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final, Protocol

from kagimori_protocol.errors import OperatorError

KEK_SIZE: Final = 32
LABEL_KEK_ID: Final = b"kagimori/1/kek-id"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class KekProvider(Protocol):
    """Gives the KEK. Must return 32 bytes or raise OperatorError; any other error is a bug."""

    def read(self) -> bytes:
        """Read the KEK."""


class FileKek:
    """A KEK in a file of mode 0600 or 0400 that belongs to root or to whoever runs the verifier."""

    def __init__(self, path: Path) -> None:
        """Remember the path."""
        self._path = path

    def create(self) -> bytes:
        """Make a new KEK; an existing file is never overwritten. Raises OperatorError."""
        kek = secrets.token_bytes(KEK_SIZE)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(kek)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                self._path.unlink()
                raise
        except FileExistsError as error:
            raise _wrong(self._path, "no file yet", "one, which is left alone", "kek.exists") from error
        except OSError as error:
            raise _wrong(
                self._path, "a file that can be written", str(error.strerror), "kek.write"
            ) from error
        return kek

    def read(self) -> bytes:
        """Read the KEK, if nobody else could have. Raises OperatorError."""
        try:
            # Not blocking: a FIFO in the file's place has no other end, and is refused below.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._require_private(os.fstat(descriptor))
                return _sized(self._path, os.read(descriptor, KEK_SIZE + 1))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _wrong(
                self._path, "a regular file that can be read", str(error.strerror), "kek.read"
            ) from error

    def _require_private(self, facts: os.stat_result) -> None:
        if not stat.S_ISREG(facts.st_mode):
            raise _wrong(self._path, "a regular file", "something else", "kek.read")
        if facts.st_mode & _OTHERS or facts.st_uid not in {0, os.geteuid()}:
            found = f"mode {stat.S_IMODE(facts.st_mode):04o}, owner {facts.st_uid}"
            raise _wrong(self._path, "mode 0600 or 0400, owned by root or this user", found, "kek.mode")


class CredentialKek:
    """A KEK that systemd hands over (LoadCredential=, SetCredentialEncrypted=) in $CREDENTIALS_DIRECTORY."""

    def __init__(self, name: str) -> None:
        """Remember the credential's name."""
        self._name = name

    def read(self) -> bytes:
        """Read the KEK. Raises OperatorError where systemd gave none."""
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        path = Path(directory or "/nonexistent") / self._name
        try:
            with path.open("rb") as file:
                return _sized(path, file.read(KEK_SIZE + 1))
        except OSError as error:
            found = str(error.strerror) if directory else "no $CREDENTIALS_DIRECTORY"
            raise _wrong(path, f"the systemd credential {self._name}", found, "kek.credential") from error


def kek_id(kek: bytes) -> str:
    """Name a KEK without telling it: the database remembers under which one it was made."""
    return hashlib.sha256(LABEL_KEK_ID + b"\x00" + kek).digest()[:8].hex()


def _sized(path: Path, kek: bytes) -> bytes:
    if len(kek) != KEK_SIZE:
        size = f"{len(kek)} bytes" if len(kek) < KEK_SIZE else "more"
        raise _wrong(path, f"exactly {KEK_SIZE} bytes", size, "kek.size")
    return kek


def _wrong(path: Path, expected: str, found: str, code: str) -> OperatorError:
    return OperatorError(
        f"The key-encryption key {path} cannot be used.",
        code=code,
        expected=expected,
        found=found,
        todo="Without this key nothing in the database opens: restore it from your backup, or correct [kek] in verifier.toml.",
    )
