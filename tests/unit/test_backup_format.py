"""A backup is whole and as it was written, or it is none."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_verifier import backup_format
from kagimori_verifier.backup_format import PIECE, BackupBroken, Head
from kagimori_verifier.keystore.kek import kek_id

KEK = b"k" * 32
PASSPHRASE = b"sixteen bytes or"
FILES = {"verifier.toml": b"toml", "endorsements/ca/aa.der": b"", "verifier.db": bytes(range(256)) * 5000}


def head(kek: bytes = KEK, passphrase: bytes | None = None) -> Head:
    """Make a head."""
    return backup_format.make_head(kek, kek_id(kek), "0002", 7, passphrase)


def written(files: dict[str, bytes], made: Head | None = None) -> bytes:
    """Write a backup."""
    to = io.BytesIO()
    backup_format.write(
        to, made or head(), KEK, ((name, len(raw), io.BytesIO(raw)) for name, raw in files.items())
    )
    return to.getvalue()


def read(raw: bytes, kek: bytes = KEK) -> dict[str, bytes]:
    """Read all of it."""
    source = io.BytesIO(raw)
    found, before = backup_format.read_head(source)
    return {name: b"".join(parts) for name, _, parts in backup_format.read(source, found, before, kek)}


def refused(raw: bytes, kek: bytes = KEK) -> str:
    """Give what was found in a file that must be refused."""
    with pytest.raises(BackupBroken) as caught:
        read(raw, kek)
    return caught.value.found or ""


WHOLE = written(FILES)


@pytest.mark.parametrize("size", [0, 1, PIECE - 40, PIECE - 23, PIECE - 22, PIECE, 2 * PIECE, 2 * PIECE + 1])
def test_files_of_any_size_come_back(size: int) -> None:
    """Also those that end where a piece does."""
    files = {"verifier.db": bytes(size), "verifier.toml": b"x"}
    assert read(written(files)) == files
    assert read(written({})) == {}


def test_nothing_of_a_file_can_be_read_without_the_kek() -> None:
    """The head tells when, under which KEK and with which tables it was made."""
    assert b"endorsements" not in WHOLE
    assert KEK not in WHOLE
    found, _ = backup_format.read_head(io.BytesIO(WHOLE))
    assert (found.version, found.created, found.kek_id, found.schema) == (1, 7, kek_id(KEK), "0002")
    assert found.sealed_kek == b""


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_flipped_bit_anywhere_is_found(at: int, change: int) -> None:
    """In the head as in the content."""
    raw = bytearray(WHOLE)
    raw[at] ^= change
    refused(bytes(raw))


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_was_cut_is_no_backup(size: int) -> None:
    """Wherever the disk was full, also between two pieces."""
    refused(WHOLE[:size])


def test_a_file_that_was_cut_between_pieces_has_no_last_piece() -> None:
    """Nor has one to which something was added, or in which pieces changed places."""
    source = io.BytesIO(WHOLE)
    backup_format.read_head(source)
    start, piece = source.tell(), PIECE + 16
    first, rest = WHOLE[start : start + piece], WHOLE[start + piece :]
    assert 0 < len(rest) < piece
    refused(WHOLE[: start + piece])
    refused(WHOLE[:start] + rest)
    refused(WHOLE[:start] + rest + first)
    refused(WHOLE[:start] + first + first + rest)
    refused(WHOLE + b"\0")
    refused(WHOLE + WHOLE[start:])


def test_pieces_of_two_backups_do_not_mix() -> None:
    """Each has a key of its own."""
    other = written(FILES)
    size = len(WHOLE) // 2
    refused(WHOLE[:size] + other[size:])


def test_another_kek_opens_nothing() -> None:
    """And says no more than that."""
    assert "a piece that is not" in refused(WHOLE, b"l" * 32)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../kek", "a/../../b", "", ".hidden", "a//b", "a/b/c/d/e", "x" * 300, "a\nb", "a\0b"],
)
def test_no_name_leads_out_of_a_directory(name: str) -> None:
    """Even though whoever made the file had the KEK."""
    assert refused(written({name: b"x"})) == ascii(name[:80])


def test_a_file_that_shrinks_while_it_is_read_is_no_backup() -> None:
    """What stands in its place would be another's."""
    with pytest.raises(BackupBroken, match="shorter"):
        backup_format.write(io.BytesIO(), head(), KEK, [("verifier.toml", 5, io.BytesIO(b"four"))])


def test_a_kek_behind_a_passphrase_opens_by_that_passphrase_alone() -> None:
    """And the file then holds all that a verifier needs."""
    made = head(passphrase=PASSPHRASE)
    raw = written(FILES, made)
    assert KEK not in raw
    found, _ = backup_format.read_head(io.BytesIO(raw))
    assert backup_format.kek_in(found, PASSPHRASE) == KEK
    with pytest.raises(OperatorError) as caught:
        backup_format.kek_in(found, PASSPHRASE + b"!")
    assert caught.value.code == "backup.passphrase"
    with pytest.raises(OperatorError) as caught:
        backup_format.kek_in(head(), PASSPHRASE)
    assert caught.value.code == "backup.kek"


def test_a_short_passphrase_is_refused() -> None:
    """The file may be guessed at for ever."""
    with pytest.raises(UsageError) as caught:
        head(passphrase=PASSPHRASE[:15])
    assert caught.value.code == "backup.passphrase"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    """A file of another kind is never a traceback."""
    refused(raw)
    refused(backup_format.MAGIC + raw)


def test_a_version_of_tomorrow_is_named() -> None:
    """Not taken for a broken file."""
    raw = WHOLE.replace(b'"version":1', b'"version":2', 1)
    assert refused(raw) == "version 2, of another release"
