"""Two programs at one header: the agent and a cryptsetup that an administrator runs meanwhile lose no keyslot of each other."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import volumes
from tests.unit.luks.conftest import Vault

from kagimori_agent import device_lock, keyslots
from kagimori_protocol.errors import DiskError

NUMBER = os.makedev(253, 7)
NEW = bytes(range(32))


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Say where lock files are, and be impatient."""
    directory = tmp_path / "run/cryptsetup"
    directory.parent.mkdir()
    monkeypatch.setattr(device_lock, "DIRECTORY", directory)
    monkeypatch.setattr(device_lock, "WAIT_S", 0.2)
    return directory


@pytest.fixture
def device(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """Give what looks like a block device to ``held``, where none can be made."""
    path = tmp_path / "vdx"
    path.write_bytes(b"")
    real = os.fstat
    file = os.open(path, os.O_RDONLY)

    def as_block(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if descriptor != file:
            return found
        values = list(found)
        values[0] = 0o60600
        return os.stat_result(values, {"st_rdev": NUMBER})

    monkeypatch.setattr(os, "fstat", as_block)
    assert locks.parent.is_dir()
    yield path, file
    os.close(file)


def test_cryptsetups_lock_file_is_held_and_then_removed(locks: Path, device: tuple[Path, int]) -> None:
    """Its name, its directory and their modes are what cryptsetup would have made."""
    with device_lock.held(*device):
        assert [one.name for one in locks.iterdir()] == ["L_253:7"]
        assert locks.stat().st_mode & 0o777 == 0o700
        with (locks / "L_253:7").open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert list(locks.iterdir()) == []


def test_a_cryptsetup_at_work_is_waited_for_and_then_named(locks: Path, device: tuple[Path, int]) -> None:
    """A reader's lock counts as well: what it reads must not change below it."""
    locks.mkdir()
    with (locks / "L_253:7").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        began = time.monotonic()
        with pytest.raises(DiskError) as caught, device_lock.held(*device):
            raise AssertionError
        assert time.monotonic() - began >= device_lock.WAIT_S
        assert caught.value.code == "enrol.busy"
        assert str(locks / "L_253:7") in str(caught.value)
    with device_lock.held(*device):
        pass


def test_a_lock_file_that_was_removed_while_it_was_waited_for_is_no_lock(
    locks: Path, device: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves removes it; the next cryptsetup makes another, and would not see a lock on the old one."""
    monkeypatch.setattr(device_lock, "WAIT_S", 20.0)
    locks.mkdir()
    name = locks / "L_253:7"
    with name.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def leave() -> None:
            time.sleep(0.3)
            name.unlink()
            fcntl.flock(other, fcntl.LOCK_UN)

        leaving = threading.Thread(target=leave)
        leaving.start()
        with device_lock.held(*device), name.open("rb") as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leaving.join()


def test_a_lock_that_cannot_be_taken_is_an_error_and_no_leave_to_go_on(
    locks: Path, device: tuple[Path, int]
) -> None:
    """A link in its place leads elsewhere, and is not followed."""
    locks.symlink_to(locks.parent)
    with pytest.raises(DiskError) as caught, device_lock.held(*device):
        raise AssertionError
    assert caught.value.code == "enrol.lock"


def test_a_device_that_udev_looks_at_for_a_moment_is_waited_for(disk: Path) -> None:
    """It holds a shared lock on the device itself."""
    with disk.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        looking = threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN))
        looking.start()
        with keyslots.opened(disk) as one:
            assert keyslots.ours(one.load()) == ["0"]
        looking.join()


@pytest.fixture
def loop(disk: Path) -> Iterator[Path]:
    """Give the honest volume as a block device."""
    done = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"no loop device here, so cryptsetup itself is not tried; its lock file is: {done.stderr}"
        )
    path = Path(done.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


def test_a_keyslot_that_an_administrator_adds_meanwhile_takes_none_away(loop: Path, tmp_path: Path) -> None:
    """The real cryptsetup on a real block device: it waits, and does not write what it has read before."""
    (tmp_path / "more").write_bytes(b"another passphrase")
    words = ["luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"]
    command = ["cryptsetup", *words, str(loop), str(tmp_path / "more")]
    with keyslots.opened(loop) as one:
        change = keyslots.add(one.load(), Vault.key, NEW, 1)
        administrator = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert administrator.stdin is not None
        administrator.stdin.write(Vault.key)
        administrator.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            administrator.wait(2)
        one.write(change, tmp_path / "kept")
    added = administrator.wait(30) == 0
    assert volumes.opens(loop, NEW)
    assert volumes.opens(loop, Vault.key)
    assert volumes.opens(loop, b"another passphrase") == added
    with keyslots.opened(loop) as one:
        assert keyslots.ours(one.load()) == ["0", change.slot]
