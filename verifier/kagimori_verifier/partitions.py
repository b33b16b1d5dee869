"""Partitions of a raw disk image: GPT, or the four of an MBR. Read strictly, never written.

Sources: UEFI Specification 2.10, sections 5.2 (MBR) and 5.3 (GPT).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable

SECTORS: Final = (512, 4096)
"""Sizes of a logical block, in bytes, that a GPT is looked for with."""
MAX_ENTRIES: Final = 1024
_GPT: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_SIGNATURE: Final = b"EFI PART"
_GPT_REVISION: Final = 0x10000
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_MBR_SIGNATURE: Final = b"\x55\xaa"
_MBR_AT: Final = 446
_MBR_ENTRY: Final = struct.Struct("<B3sB3sII")
_MBR_ENTRIES: Final = 4
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: its number, and where it lies, in bytes."""

    number: int
    offset: int
    size: int


def find(read: Callable[[int, int], bytes], size: int) -> tuple[Partition, ...]:
    """Give the partitions of an image of ``size`` bytes; none where it has no table.

    ``read(offset, size)`` gives bytes, fewer where the image ends. Raises DiskError for a table that is broken, or that lies
    outside the image.
    """
    mbr = read(0, 512)
    for sector in SECTORS:
        if read(sector, len(_GPT_SIGNATURE)) == _GPT_SIGNATURE:
            return _checked(_gpt(read, sector), size)
    if len(mbr) != 512 or not mbr.endswith(_MBR_SIGNATURE):  # noqa: PLR2004 - the size of an MBR
        return ()
    return _checked(_mbr(mbr), size)


def _gpt(read: Callable[[int, int], bytes], sector: int) -> list[Partition]:
    raw = read(sector, _GPT.size)
    if len(raw) != _GPT.size:
        raise _broken("a whole header", f"{len(raw)} bytes")
    (_, revision, header_size, crc, _, at, _, _, _, _, entries_at, count, entry_size, entries_crc) = (
        _GPT.unpack(raw)
    )
    if revision != _GPT_REVISION or not _GPT.size <= header_size <= sector or at != 1:
        raise _broken("a header of revision 1.0 at block 1", f"revision {revision:#x}, block {at}")
    header = bytearray(read(sector, header_size))
    header[16:20] = bytes(4)
    if zlib.crc32(header) != crc:
        raise _broken("the header's checksum", "another")
    if not 1 <= count <= MAX_ENTRIES or entry_size < _ENTRY.size or entry_size % 8 or entry_size > sector:
        raise _broken(f"up to {MAX_ENTRIES} entries of 128 bytes", f"{count} of {entry_size}")
    table = read(entries_at * sector, count * entry_size)
    if len(table) != count * entry_size or zlib.crc32(table) != entries_crc:
        raise _broken("the checksum of the entries", "another")
    found = []
    for number in range(count):
        kind, _, first, last, _, _ = _ENTRY.unpack_from(table, number * entry_size)
        if any(kind):
            found.append(Partition(number + 1, first * sector, (last - first + 1) * sector))
    return found


def _mbr(raw: bytes) -> list[Partition]:
    found = []
    for number in range(_MBR_ENTRIES):
        _, _, kind, _, first, count = _MBR_ENTRY.unpack_from(raw, _MBR_AT + number * _MBR_ENTRY.size)
        if kind == _PROTECTIVE:
            raise _broken("the GPT that the MBR speaks of", "none")
        if kind in _EXTENDED:
            raise _broken("a GPT, or primary partitions alone", "an extended partition")
        if kind:
            found.append(Partition(number + 1, first * 512, count * 512))
    return found


def _checked(found: list[Partition], size: int) -> tuple[Partition, ...]:
    """Require partitions that lie within the image and on no other's place."""
    end = 0
    for one in sorted(found, key=lambda partition: partition.offset):
        if one.offset < max(end, 512) or one.size <= 0 or one.offset + one.size > size:
            raise _broken(
                f"partitions beside one another within {size} bytes",
                f"partition {one.number} of {one.size} bytes at {one.offset}",
            )
        end = one.offset + one.size
    return tuple(found)


def _broken(expected: str, found: str) -> DiskError:
    return DiskError(
        "The image's partition table cannot be used.",
        code="image.partitions",
        expected=expected,
        found=found,
        todo="See `sfdisk --verify IMAGE`. Convert qcow2 and the like first: qemu-img convert -O raw.",
    )
