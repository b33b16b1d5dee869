"""The key-encryption key: read only where nobody else could have read it, never overwritten, never shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.keystore import kek
from kagimori_verifier.keystore.kek import CredentialKek, FileKek, kek_id


def written(path: Path, content: bytes = b"k" * 32, mode: int = 0o600) -> FileKek:
    """Put a key file there."""
    path.write_bytes(content)
    path.chmod(mode)
    return FileKek(path)


def refused(provider: FileKek | CredentialKek) -> OperatorError:
    """Read a KEK that must not be taken."""
    with pytest.raises(OperatorError) as caught:
        provider.read()
    assert "backup" in (caught.value.todo or "")
    return caught.value


def test_a_new_kek_is_random_private_and_reads_back(tmp_path: Path) -> None:
    """32 bytes, mode 0600, whatever the umask."""
    path = tmp_path / "deep" / "kek"
    made = FileKek(path).create()
    assert len(made) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert FileKek(path).read() == made
    assert FileKek(tmp_path / "other").create() != made


def test_an_existing_kek_is_never_overwritten(tmp_path: Path) -> None:
    """It is the only thing that opens the database."""
    provider = written(tmp_path / "kek")
    with pytest.raises(OperatorError) as caught:
        provider.create()
    assert caught.value.code == "kek.exists"
    assert (tmp_path / "kek").read_bytes() == b"k" * 32


def test_a_link_in_a_keks_place_is_not_followed_when_one_is_made(tmp_path: Path) -> None:
    """Otherwise whoever may write the directory chooses where the key goes."""
    (tmp_path / "kek").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OperatorError) as caught:
        FileKek(tmp_path / "kek").create()
    assert caught.value.code == "kek.exists"
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_that_fills_while_a_kek_is_made_leaves_no_half_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial file would be read one day, or refused every day."""

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OperatorError) as caught:
        FileKek(tmp_path / "kek").create()
    assert caught.value.code == "kek.write"
    assert not (tmp_path / "kek").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o610, 0o666, 0o601])
def test_a_kek_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right of group or others is one too many."""
    error = refused(written(tmp_path / "kek", mode=mode))
    assert error.code == "kek.mode"
    assert f"{mode:04o}" in (error.found or "")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_kek_is_read(tmp_path: Path, mode: int) -> None:
    """Mode 0400 is as good as 0600."""
    assert written(tmp_path / "kek", mode=mode).read() == b"k" * 32


def test_a_kek_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could read and change it."""
    provider = written(tmp_path / "kek")
    owner = (tmp_path / "kek").stat().st_uid
    facts = os.stat_result((0o100600, 1, 1, 1, owner + 4711, 0, 32, 0, 0, 0))
    monkeypatch.setattr(kek.os, "fstat", lambda _descriptor: facts)  # type: ignore[attr-defined]  # the module's own os
    assert refused(provider).code == "kek.mode"


@pytest.mark.parametrize("size", [0, 31, 33, 4096])
def test_a_kek_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    """Never padded, never cut."""
    error = refused(written(tmp_path / "kek", b"k" * size))
    assert error.code == "kek.size"
    assert "k" * 31 not in str(error)


def test_whatever_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO does not hang, a directory and a device are no key, a link could point anywhere."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    written(tmp_path / "kek")
    (tmp_path / "link").symlink_to(tmp_path / "kek")
    for path in (tmp_path / "fifo", tmp_path / "directory", tmp_path / "link", Path("/dev/zero")):
        assert refused(FileKek(path)).code == "kek.read"


def test_a_missing_kek_is_named(tmp_path: Path) -> None:
    """The path is in the message, and what to do."""
    error = refused(FileKek(tmp_path / "kek"))
    assert error.code == "kek.read"
    assert str(tmp_path / "kek") in error.what


def test_a_systemd_credential_is_read_from_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd answers for its mode."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "kagimori-kek").write_bytes(b"c" * 32)
    assert CredentialKek("kagimori-kek").read() == b"c" * 32
    (tmp_path / "kagimori-kek").write_bytes(b"c" * 31)
    assert refused(CredentialKek("kagimori-kek")).code == "kek.size"


def test_a_credential_that_systemd_did_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the variable, and without the file."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    error = refused(CredentialKek("kagimori-kek"))
    assert error.code == "kek.credential"
    assert "CREDENTIALS_DIRECTORY" in (error.found or "")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert refused(CredentialKek("kagimori-kek")).code == "kek.credential"


def test_the_name_of_a_kek_tells_keys_apart_and_is_none() -> None:
    """It rests in the database in the clear."""
    assert kek_id(b"k" * 32) == kek_id(b"k" * 32) != kek_id(b"l" * 32)
    assert len(kek_id(b"k" * 32)) == 16
