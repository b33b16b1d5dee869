"""Volumes made by the real cryptsetup on plain files, forgeries of them, and a made-up kernel that shows devices."""

from __future__ import annotations

import base64
import hashlib
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from kagimori_agent import luks
from kagimori_agent.config import Volume
from kagimori_protocol import luks2_change
from kagimori_protocol.errors import DiskError
from kagimori_verifier import luks_enrol

COPY_SIZE: Final = 0x4000
CSUM: Final = slice(448, 512)


class Vault:
    """One honest volume's names and key, and what tests do with such volumes."""

    key: Final = hashlib.sha256(b"an unlock key of these tests").digest()
    uuid: Final = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
    other_uuid: Final = "00000000-8a52-4b7e-9c8c-0d6f3c7f2a11"
    mapping_uuid: Final = "CRYPT-LUKS2-6f1c1a588a524b7e9c8c0d6f3c7f2a11-cryptroot"

    def cryptsetup(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run cryptsetup with the key on its standard input."""
        return subprocess.run(
            ["cryptsetup", "-q", *arguments], input=self.key, capture_output=True, check=False
        )

    def volume(self, device: Path | None, uuid: str = uuid) -> Volume:
        """Describe a volume as agent.toml does."""
        return Volume(uuid=uuid, name="cryptroot", device=device)

    def __init__(self) -> None:
        self.said: list[str] = []
        """What the agent has told the console."""

    def open(self, device: Path, root: Path, flags: Sequence[str] = ()) -> str:
        """Map the volume, in the world under ``root``."""
        return self._open(self.volume(device), prove=False, root=root, flags=flags)

    def prove(
        self, device: Path, key: bytes | memoryview = key, timeout_s: float = 30, epoch: int = 1
    ) -> str:
        """Try the key on a device whose header must be of this epoch."""
        return self._open(self.volume(device), key, timeout_s=timeout_s, epoch=epoch)

    def find_and_prove(self, volume: Volume, root: Path, timeout_s: float = 30) -> str:
        """Find the device in the world under ``root`` and try the key on it."""
        return self._open(volume, timeout_s=timeout_s, root=root)

    def _open(
        self,
        volume: Volume,
        key: bytes | memoryview = key,
        *,
        prove: bool = True,
        timeout_s: float = 30,
        epoch: int = 1,
        flags: Sequence[str] = (),
        root: Path = luks.ROOT,
    ) -> str:
        return luks.open_volume(
            volume,
            key,
            header_epoch=epoch,
            prove=prove,
            timeout_s=timeout_s,
            say=self.said.append,
            flags=flags,
            root=root,
        )

    def seal(self, device: Path, epoch: int = 1, key: bytes = key) -> None:
        """Authenticate a device's header as it is, by a key that opens it."""
        with luks_enrol.opened(device) as disk:
            change = luks2_change.reseal(
                disk.load(), luks_enrol.cryptsetup, key=key, epoch=epoch, salts=luks_enrol.salts()
            )
            disk.write(change)

    def refused(self, call: Callable[[], object], code: str) -> DiskError:
        """See that a call raises an error that tells everything but the key."""
        with pytest.raises(DiskError) as caught:
            call()
        error = caught.value
        assert error.code == code
        assert error.expected
        assert error.found
        assert error.todo
        for spelt in (self.key, self.key.hex().encode(), base64.b64encode(self.key), repr(self.key).encode()):
            assert spelt not in str(error).encode()
        return error

    def forge(self, device: Path, old: bytes, new: bytes, *, nth: int) -> None:
        """Replace the ``nth`` occurrence of a text in both copies of a header, and make both checksums right."""
        assert len(old) == len(new)
        with device.open("r+b") as file:
            for offset in (0, COPY_SIZE):
                file.seek(offset)
                copy = bytearray(file.read(COPY_SIZE))
                at = -1
                for _ in range(nth):
                    at = copy.index(old, at + 1)
                copy[at : at + len(new)] = new
                copy[CSUM] = bytes(CSUM.stop - CSUM.start)
                digest = hashlib.sha256(copy).digest()
                copy[CSUM.start : CSUM.start + len(digest)] = digest
                file.seek(offset)
                file.write(copy)

    def attach(self, root: Path, name: str, device: Path | None) -> Path:
        """Show a block device, with a node that leads to a file or without any; gives the node."""
        (root / "sys/class/block" / name).mkdir()
        node = root / "dev" / name.replace("!", "/")
        if device is not None:
            node.symlink_to(device)
        return node

    def map(self, root: Path, name: str, uuid: str, dm: str = "dm-0") -> None:
        """Show an active mapping."""
        directory = root / "sys/class/block" / dm / "dm"
        directory.mkdir(parents=True)
        (directory / "name").write_text(f"{name}\n")
        (directory / "uuid").write_text(f"{uuid}\n")


@pytest.fixture
def vault() -> Vault:
    """Give the names, the key and the tools."""
    return Vault()


@pytest.fixture(scope="session")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one honest volume, to be copied and never changed."""
    device = tmp_path_factory.mktemp("luks") / "honest"
    with device.open("wb") as file:
        file.truncate(17 << 20)
    options = ["--uuid", Vault.uuid, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    vault = Vault()
    made = vault.cryptsetup("luksFormat", *options, "--key-file", "-", str(device))
    assert made.returncode == 0, made.stderr
    vault.seal(device)
    return device


@pytest.fixture
def disk(formatted: Path, tmp_path: Path) -> Path:
    """Give a copy of the honest volume that a test may spoil."""
    copy = tmp_path / "disk"
    shutil.copyfile(formatted, copy)
    return copy


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Give a function that puts a shell script in cryptsetup's place."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr(luks, "DIRECTORIES", (directory,))

    def write(body: str) -> Path:
        program = directory / "cryptsetup"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return program

    return write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a made-up file system with /sys/class/block, /dev and a /proc/misc that has device-mapper."""
    for directory in ("sys/class/block", "dev/mapper", "dev/cciss", "proc"):
        (tmp_path / "root" / directory).mkdir(parents=True)
    (tmp_path / "root/proc/misc").write_text("235 autofs\n236 device-mapper\n")
    return tmp_path / "root"
