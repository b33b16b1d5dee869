r"""The form of a backup: everything behind one key, in pieces, so that none of it has to fit into memory.

::

    file    = "kagimori-backup\n" || u32 size of head || head || piece || piece || ...
    key     = HKDF-SHA256(KEK, salt = head.salt, info = "kagimori/1/backup" 0x00 || SHA-256(all before the first piece))
    piece i = AES-256-GCM(key, nonce = u64 i || 0x000000 || (1 for the last piece, else 0), 1 MiB of plaintext, the last less)
    plain   = (u16 size || name || u64 size || content) for each file

No piece can be left out, moved, added or taken from another backup, and a file that was cut has no last piece. Who has not
the KEK reads only the head: when it was made, under which KEK, from which tables. With a passphrase the KEK itself lies in
the head, behind scrypt; the cost is part of the version and is not read from the file.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from typing import IO, TYPE_CHECKING, Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from msgspec import Meta, Struct

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_verifier import wrapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VERSION: Final = 1
MAGIC: Final = b"kagimori-backup\n"
LABEL_BACKUP: Final = b"kagimori/1/backup"
LABEL_BACKUP_KEK: Final = b"kagimori/1/backup-kek"
PIECE: Final = 1 << 20
"""Bytes of plaintext in a piece."""
MAX_HEAD: Final = 4096
MIN_PASSPHRASE: Final = 16
"""Bytes. Behind it lie all keys, and who has the file has all the time there is."""
SCRYPT: Final = {"n": 1 << 17, "r": 8, "p": 1}
"""128 MiB and some half a second for each guess."""
_TAG: Final = 16
_SALT: Final = 32
_SIZE: Final = struct.Struct(">I")
_NAME: Final = struct.Struct(">H")
_CONTENT: Final = struct.Struct(">Q")
_NONCE: Final = struct.Struct(">Q3xB")
_NAMES: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}(/[A-Za-z0-9][A-Za-z0-9._-]{0,200}){0,3}")
"""What a file in a backup may be called: no path that leads out of a directory."""

Salt = Annotated[bytes, Meta(min_length=_SALT, max_length=_SALT)]


class BackupBroken(OperatorError):
    """A file is no backup, not all of one, or not as it was written."""

    default_code = "backup.broken"


class Head(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands in the clear: ``created`` in seconds since 1970, the KEK's ID, and the version of the tables.

    ``sealed_kek`` is the KEK behind a passphrase, with ``kek_salt``; both are empty without.
    """

    version: int
    created: int
    kek_id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    schema: Annotated[str, Meta(pattern=r"\A[0-9]{4}\Z")]
    salt: Salt
    kek_salt: Annotated[bytes, Meta(max_length=_SALT)] = b""
    sealed_kek: Annotated[bytes, Meta(max_length=256)] = b""


def make_head(kek: bytes, kek_id: str, schema: str, at_s: int, passphrase: bytes | None) -> Head:
    """Make a head; with a passphrase, the KEK lies in it. Raises UsageError for a passphrase that is too short. Random."""
    salt, kek_salt, sealed = secrets.token_bytes(_SALT), b"", b""
    if passphrase is not None:
        if len(passphrase) < MIN_PASSPHRASE:
            raise UsageError(
                "The passphrase is too short.",
                code="backup.passphrase",
                expected=f"{MIN_PASSPHRASE} bytes or more: the file may be guessed at for ever",
                found=f"{len(passphrase)} bytes",
            )
        kek_salt = secrets.token_bytes(_SALT)
        sealed = wrapping.seal(_stretched(passphrase, kek_salt), LABEL_BACKUP_KEK, kek, kek_id.encode())
    return Head(
        version=VERSION,
        created=at_s,
        kek_id=kek_id,
        schema=schema,
        salt=salt,
        kek_salt=kek_salt,
        sealed_kek=sealed,
    )


def kek_in(head: Head, passphrase: bytes) -> bytes:
    """Open the KEK that lies in a head. Raises OperatorError for a head without one, and another passphrase."""
    if not head.sealed_kek:
        raise OperatorError(
            "The key-encryption key is not in this backup.",
            code="backup.kek",
            expected="a backup that was made with --with-kek",
            found="one without",
            todo="Give the KEK's own backup by --kek FILE.",
        )
    try:
        stretched = _stretched(passphrase, head.kek_salt)
        return wrapping.unseal(stretched, LABEL_BACKUP_KEK, head.sealed_kek, head.kek_id.encode())
    except wrapping.BoxBroken:
        raise OperatorError(
            "The key-encryption key in this backup does not open.",
            code="backup.passphrase",
            expected="the passphrase that it was sealed with",
            found="another one, or a file that was changed",
        ) from None


def write(to: IO[bytes], head: Head, kek: bytes, files: Iterable[tuple[str, int, IO[bytes]]]) -> None:
    """Write a backup of files: name, size in bytes, content. Raises OSError."""
    raw = msgspec.json.encode(head)
    before = MAGIC + _SIZE.pack(len(raw)) + raw
    to.write(before)
    cipher, waiting, index = _cipher(kek, head, before), bytearray(), 0
    for part in _plain(files):
        waiting += part
        while len(waiting) > PIECE:
            to.write(cipher.encrypt(_NONCE.pack(index, 0), bytes(waiting[:PIECE]), None))
            del waiting[:PIECE]
            index += 1
    to.write(cipher.encrypt(_NONCE.pack(index, 1), bytes(waiting), None))


def read_head(source: IO[bytes]) -> tuple[Head, bytes]:
    """Read a head, and the bytes that it took. Raises BackupBroken for what is no backup of this version."""
    before = source.read(len(MAGIC) + _SIZE.size)
    size = _SIZE.unpack(before[len(MAGIC) :])[0] if len(before) == len(MAGIC) + _SIZE.size else 0
    if not before.startswith(MAGIC) or not 0 < size <= MAX_HEAD:
        raise _broken("a backup of a verifier", "a file of another kind")
    raw = source.read(size)
    try:
        head = msgspec.json.decode(raw, type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _broken("a head that can be read", str(error)) from error
    if head.version != VERSION:
        raise _broken(f"version {VERSION}", f"version {head.version}, of another release")
    return head, before + raw


def read(
    source: IO[bytes], head: Head, before: bytes, kek: bytes
) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """Give the files of a backup behind its head: name, size, and content in parts, to be taken before the next is asked for.

    Raises BackupBroken where it is not as it was written. What was given before has authentic bytes, but only the end of
    the iteration tells that it was all.
    """
    plain = _Plain(_pieces(source, _cipher(kek, head, before)))
    while not plain.ended():
        name = plain.exactly(_NAME.unpack(plain.exactly(_NAME.size))[0]).decode(errors="replace")
        if _NAMES.fullmatch(name) is None:
            raise _broken("names of files", ascii(name[:80]))
        size: int = _CONTENT.unpack(plain.exactly(_CONTENT.size))[0]
        yield name, size, plain.parts(size)
        if plain.owed:
            raise RuntimeError("the content of a file was not taken")


def _stretched(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=wrapping.KEY_SIZE, **SCRYPT).derive(passphrase)


def _cipher(kek: bytes, head: Head, before: bytes) -> AESGCM:
    info = LABEL_BACKUP + b"\x00" + hashlib.sha256(before).digest()
    return AESGCM(HKDF(hashes.SHA256(), wrapping.KEY_SIZE, head.salt, info).derive(kek))


def _plain(files: Iterable[tuple[str, int, IO[bytes]]]) -> Iterator[bytes]:
    for name, size, content in files:
        raw = name.encode()
        yield _NAME.pack(len(raw)) + raw + _CONTENT.pack(size)
        left = size
        while left:
            part = content.read(min(left, PIECE))
            if not part:
                raise _broken(f"{size} bytes of {name}", f"{size - left}: it became shorter meanwhile")
            left -= len(part)
            yield part


def _pieces(source: IO[bytes], cipher: AESGCM) -> Iterator[bytes]:
    piece, index = source.read(PIECE + _TAG), 0
    while True:
        after = source.read(PIECE + _TAG)
        try:
            yield cipher.decrypt(_NONCE.pack(index, 0 if after else 1), piece, None)
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag
            raise _broken(
                "a whole file, as it was written under this KEK",
                f"a piece that is not: byte {index * (PIECE + _TAG)} of the content and after",
            ) from None
        if not after:
            return
        piece, index = after, index + 1


class _Plain:
    """The plaintext of a backup, taken in sizes that its own words name."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._waiting = bytearray()
        self.owed = 0

    def ended(self) -> bool:
        return not self._more()

    def exactly(self, size: int) -> bytes:
        while len(self._waiting) < size:
            if (piece := next(self._pieces, None)) is None:
                raise _broken("all of each file", "an end in the middle of one")
            self._waiting += piece
        part = bytes(self._waiting[:size])
        del self._waiting[:size]
        return part

    def parts(self, size: int) -> Iterator[bytes]:
        self.owed = size
        while self.owed:
            if not self._more():
                raise _broken("all of each file", "an end in the middle of one")
            part = self.exactly(min(self.owed, len(self._waiting)))
            self.owed -= len(part)
            yield part

    def _more(self) -> bool:
        while not self._waiting:
            if (piece := next(self._pieces, None)) is None:
                return False
            self._waiting += piece
        return True


def _broken(expected: str, found: str) -> BackupBroken:
    return BackupBroken(
        "This is no backup that can be used.",
        expected=expected,
        found=found,
        todo="Take another copy of it, or an older backup.",
    )
