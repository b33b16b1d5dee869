"""T3: whatever a disk holds, looking at it and opening it write nothing: nothing is formatted, initialised or repaired."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_protocol.errors import KagimoriError

if TYPE_CHECKING:
    from tests.unit.luks.conftest import Vault

Fill = Callable[[Path], None]
SIZE = 20 << 20


def blank(disk: Path) -> None:
    """Give a new disk, as a provider does: what formats "if there is nothing yet" would begin here."""
    disk.write_bytes(bytes(SIZE))


def luks1(disk: Path) -> None:
    """Give a volume of the version before, made by the real cryptsetup."""
    blank(disk)
    command = ["cryptsetup", "-q", "luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000"]
    subprocess.run([*command, str(disk), "-"], input=b"words", capture_output=True, check=True)


def by_magic(at: int, magic: bytes) -> Fill:
    """Give a disk that carries the mark of something else."""

    def fill(disk: Path) -> None:
        content = bytearray(SIZE)
        content[at : at + len(magic)] = magic
        disk.write_bytes(content)

    return fill


def cut_off(disk: Path) -> None:
    """Leave of the volume only its headers, as a disk that was not copied to its end."""
    with disk.open("r+b") as file:
        file.truncate(1 << 20)


def wiped(offset: int) -> Fill:
    """Zero one copy of the header: cryptsetup by itself would write it anew from the other."""

    def fill(disk: Path) -> None:
        with disk.open("r+b") as file:
            file.seek(offset)
            file.write(bytes(0x4000))

    return fill


DISKS: dict[str, Fill] = {
    "blank": blank,
    "GPT": by_magic(512, b"EFI PART"),
    "ext4": by_magic(1024 + 56, b"\x53\xef"),
    "swap": by_magic(4096 - 10, b"SWAPSPACE2"),
    "LUKS1": luks1,
    "cut off": cut_off,
    "first copy wiped": wiped(0),
    "second copy wiped": wiped(0x4000),
    "both copies wiped": lambda disk: (wiped(0)(disk), wiped(0x4000)(disk))[-1],
    "honest": lambda _: None,
}


@pytest.mark.parametrize("named", [True, False], ids=["by device", "by UUID"])
@pytest.mark.parametrize("content", DISKS)
def test_no_byte_of_a_disk_changes(root: Path, disk: Path, vault: Vault, content: str, named: bool) -> None:
    """With the right key in hand; the disks that hold the volume open, the others are refused."""
    DISKS[content](disk)
    before = _state(disk)
    node = vault.attach(root, "vda", disk)
    volume = vault.volume(node if named else None)
    opens = content in {"honest", "first copy wiped", "second copy wiped"}
    try:
        outcome = vault.find_and_prove(volume, root, timeout_s=30 if opens else 0.3)
    except KagimoriError as error:
        outcome = error.code
    assert _state(disk) == before
    assert (outcome == "proved") is opens, outcome


def test_cryptsetup_by_itself_would_have_written(disk: Path, vault: Vault) -> None:
    """What the tests above look for can be seen: on the disk, without a header in memory, it repairs what it opens."""
    DISKS["second copy wiped"](disk)
    before = _state(disk)
    done = vault.cryptsetup("open", "--test-passphrase", "--key-file", "-", str(disk))
    assert done.returncode == 0
    assert _state(disk) != before


def test_no_byte_changes_by_a_key_that_is_wrong(root: Path, disk: Path, vault: Vault) -> None:
    """A verifier's key for a disk that has none of its keyslots any more is no reason to make one."""
    before = _state(disk)
    vault.refused(lambda: vault.prove(disk, key=bytes(32)), "luks.mac")
    assert _state(disk) == before


def _state(disk: Path) -> tuple[bytes, int]:
    return hashlib.sha256(disk.read_bytes()).digest(), disk.stat().st_mtime_ns
