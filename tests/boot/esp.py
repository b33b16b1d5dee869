"""Boot disks, made without root's rights: a partition table, an EFI system partition, and /boot where there is one.

Sources: UEFI specification 2.10, section 5.3 (GPT); the discoverable partitions' types as Debian's installer sets them.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSTEM_PARTITION: Final = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

_DISK: Final = uuid.UUID("6b616769-6d6f-7269-8000-0000000000d0")
_SECTOR: Final = 512
_ALIGNED: Final = 2048
"""Sectors to the first partition, and what each begins at a multiple of."""
_ENTRIES: Final = 128
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_REVISION: Final = 0x00010000
_TABLE_SECTORS: Final = _ENTRIES * _ENTRY.size // _SECTOR
_SPARE: Final = 4 << 20
"""Bytes that a file system gets beside its files'."""
_TIMEOUT_S: Final = 60


@dataclass(frozen=True)
class Partition:
    """A partition of a ``kind``, whose file system is in the file ``content``: whole sectors."""

    kind: uuid.UUID
    identity: uuid.UUID
    content: Path


def fat(image: Path, files: Mapping[str, Path]) -> None:
    """Make a FAT32 file system with files at absolute paths."""
    size = max(
        sum(file.stat().st_size for file in files.values()) + _SPARE, 40 << 20
    )  # FAT32 has a least size
    with image.open("wb") as file:
        file.truncate(size + -size % (1 << 20))
    _run("mformat", "-i", str(image), "-F", "-N", "4B474D52", "-v", "ESP", "::")
    directories = {str(parent) for name in files for parent in Path(name).parents} - {"/"}
    for directory in sorted(directories):
        _run("mmd", "-i", str(image), f"::{directory}")
    for name, source in files.items():
        _run("mcopy", "-i", str(image), str(source), f"::{name}")


def ext4(image: Path, files: Mapping[str, Path], identity: uuid.UUID) -> None:
    """Make an ext4 file system with files at absolute paths, found by its UUID."""
    tree = image.with_suffix(".tree")
    for name, source in files.items():
        target = tree / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    size = sum(file.stat().st_size for file in files.values()) * 11 // 10 + 4 * _SPARE
    features = ["-O", "^has_journal,^metadata_csum_seed", "-U", str(identity)]
    _run("mke2fs", "-q", "-t", "ext4", *features, "-d", str(tree), str(image), f"{size >> 20}M")
    shutil.rmtree(tree)


def disk(image: Path, partitions: Sequence[Partition]) -> None:
    """Put partitions on a disk one behind the other, with a GUID partition table at both ends."""
    entries, places, at = b"", [], _ALIGNED
    for number, partition in enumerate(partitions, 1):
        count = partition.content.stat().st_size // _SECTOR
        name = f"partition {number}".encode("utf-16-le").ljust(72, b"\0")
        ids = partition.kind.bytes_le, partition.identity.bytes_le
        entries += _ENTRY.pack(*ids, at, at + count - 1, 0, name)
        places.append((at, partition.content))
        at += count + -count % _ALIGNED
    entries = entries.ljust(_ENTRIES * _ENTRY.size, b"\0")
    last = at + _ALIGNED - 1
    with image.open("wb") as file:
        file.truncate((last + 1) * _SECTOR)
        file.write(_protective_record(last))
        file.write(_header(1, last, 2, last, entries))
        file.write(entries)
        for start, content in places:
            file.seek(start * _SECTOR)
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.seek((last - _TABLE_SECTORS) * _SECTOR)
        file.write(entries)
        file.write(_header(last, 1, last - _TABLE_SECTORS, last, entries))


def _protective_record(last: int) -> bytes:
    """The master boot record that keeps other tools off (section 5.2.3)."""
    entry = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, last)
    return b"".join([bytes(446), entry, bytes(48), b"\x55\xaa"])


def _header(own: int, other: int, table: int, last: int, entries: bytes) -> bytes:
    def packed(crc: int) -> bytes:
        usable = (_TABLE_SECTORS + 2, last - _TABLE_SECTORS - 1)
        return _HEADER.pack(
            *(b"EFI PART", _REVISION, _HEADER.size, crc, 0, own, other, *usable, _DISK.bytes_le, table),
            *(_ENTRIES, _ENTRY.size, zlib.crc32(entries)),
        )

    return packed(zlib.crc32(packed(0))).ljust(_SECTOR, b"\0")


def _run(*command: str) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
