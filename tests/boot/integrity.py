"""A root on a volume with integrity, as its owner would format it: cryptsetup in a machine does that, and nothing of ours.

Beside it lies the same file system on a volume without, to be spoilt in the same way.

Below the encryption lies dm-integrity: after superblock and journal its disk is areas, each of tags and then of the data
that they are for. ``Laid`` says where, so that a test's host can put its finger on one sector and on that sector's tag.

Source: Linux, drivers/md/dm-integrity.c (struct superblock, get_data_sector, get_metadata_sector_and_offset,
calculate_journal_section_size).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.boot import images, machine
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, Estate
from tests.boot.images import PASSPHRASE, SECRET
from tests.boot.scene import as_disk
from tests.boot.variants import GUEST, UUID
from tests.unit.luks.headers import SIZE

from kagimori_protocol.luks2_layout import LuksHeader, parse

_FORMAT: Final = f"""
printf '%s' "{PASSPHRASE.decode()}" >/key
disk=/dev/disk/by-id/virtio-blank
cryptsetup luksFormat --batch-mode --type luks2 --uuid {UUID} --cipher aes-xts-plain64 --integrity hmac-sha256 \\
    --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /key $disk &&
    cryptsetup open --key-file /key $disk made &&
    dd if=/dev/disk/by-id/virtio-plain of=/dev/mapper/made bs=1M && sync &&
    cryptsetup close made && echo "made: a volume with integrity"
poweroff -f
"""
_FILE_SYSTEM: Final = "24M"
_DISK_SIZE: Final = 64 << 20
_SECTOR: Final = 512
_SB_SECTORS: Final = 8
_SUPERBLOCK: Final = struct.Struct("<8sBBHI12xB")
_PADDING: Final = 128 << 10
TAG: Final = 32
"""Bytes of a tag."""


@dataclass(frozen=True)
class Laid:
    """Where on its disk a volume with integrity keeps what."""

    first_area: int
    data_run: int
    tag_run: int
    block: int

    @classmethod
    def of(cls, disk: Path) -> Laid:
        """Read it off a disk."""
        header = header_of(disk)
        start = data_offset(header)
        with disk.open("rb") as file:
            file.seek(start)
            raw = file.read(_SUPERBLOCK.size)
        magic, _version, log2_interleave, tag, sections, log2_block = _SUPERBLOCK.unpack(raw)
        assert magic == b"integrt\0"
        assert tag == TAG
        tag_run = tag << log2_interleave >> log2_block
        assert tag_run % _PADDING == 0, "what follows would begin later"
        return cls(
            first_area=start + (_SB_SECTORS + sections * _section_sectors(tag, log2_block)) * _SECTOR,
            data_run=_SECTOR << log2_interleave,
            tag_run=tag_run,
            block=_SECTOR << log2_block,
        )

    def data(self, at: int) -> int:
        """Give where byte ``at`` of the volume lies."""
        area, within = divmod(at, self.data_run)
        return self.first_area + area * (self.tag_run + self.data_run) + self.tag_run + within

    def tag(self, at: int) -> int:
        """Give where the tag of that byte's sector lies."""
        area, within = divmod(at, self.data_run)
        return self.first_area + area * (self.tag_run + self.data_run) + within // self.block * TAG


def header_of(disk: Path) -> LuksHeader:
    """Read a volume's primary header."""
    with disk.open("rb") as file:
        return parse(file.read(SIZE), 0)


def data_offset(header: LuksHeader) -> int:
    """Give where a volume's segment begins, in bytes."""
    return int(header.json["segments"]["0"]["offset"])


def _section_sectors(tag: int, log2_block: int) -> int:
    """Give the sectors of one section of the journal, as calculate_journal_section_size does without a MAC of its own."""
    entry = -(-(8 + (8 << log2_block) + tag) // 8) * 8
    entries = (_SECTOR - 8) // entry * 8
    return 8 + (entries << log2_block)


def build(cache: Cache, estate: Estate) -> Path:
    """Give the directory of ``disk.img``, a root with integrity, ``plain.img``, the file system in it, and ``xts.img`` without."""
    # Made of what the VM's other root is made of, and by the kernel and cryptsetup of that Debian.
    made_from = [estate.images.volume.parent.name, Path(__file__)]
    return cache.get("integrity", made_from, lambda to: _build(to, estate))


def _build(to: Path, estate: Estate) -> None:
    tree = to / "tree"
    images.small_system(tree, estate.images.chroot, GUEST / "init")
    (tree / "secret").write_text(SECRET, encoding="utf-8")
    plain = to / "plain.img"
    images.make_ext4(tree, plain, _FILE_SYSTEM)
    shutil.rmtree(tree)
    images.encrypt(Path(shutil.copyfile(plain, to / "xts.img")))
    disk = to / "disk.img"
    with disk.open("wb") as file:
        file.truncate(_DISK_SIZE)
    disks = [
        machine.Disk(estate.images.hardware, "snp"),
        machine.Disk(plain, "plain"),
        machine.Disk(disk, "blank", kept=True),
        machine.Disk(as_disk(to / "scene", _FORMAT), "scene"),
    ]
    with machine.start(
        to / "vm",
        kernel=estate.images.kernel,
        initramfs=estate.initramfs,
        cmdline=estate.images.variant.cmdline,
        disks=disks,
        verifier=None,
    ) as running:
        running.wait_for("made: a volume with integrity", BOOT_S)
        running.wait_off(BOOT_S)


def first_block(plain: Path, file: str) -> int:
    """Give where in a file system a file's content begins, in bytes."""
    told = subprocess.run(
        ["debugfs", "-R", f"blocks {file}", str(plain)], capture_output=True, check=True, text=True
    )
    size = subprocess.run(["dumpe2fs", "-h", str(plain)], capture_output=True, check=True, text=True)
    (block_size,) = [line.split()[-1] for line in size.stdout.splitlines() if line.startswith("Block size:")]
    return int(told.stdout.split()[0]) * int(block_size)
