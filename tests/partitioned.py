"""Disk images with partition tables, written by hand from the UEFI Specification (5.2, 5.3), for whoever reads them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

MIB = 1 << 20
_LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")  # 0FC63DAF-8483-4772-8E79-3D69D8477DE4
_ENTRIES = 128


def gpt(parts: Sequence[tuple[int, int]], size: int, sector: int = 512) -> bytes:
    """Give an image of ``size`` bytes with partitions (offset, size), in bytes."""
    last = size // sector - 1
    table = b"".join(
        struct.pack(
            "<16s16sQQQ72s", _LINUX, bytes([n] * 16), at // sector, (at + length) // sector - 1, 0, b""
        )
        for n, (at, length) in enumerate(parts, 1)
    ).ljust(_ENTRIES * 128, b"\0")

    def header(crc: int) -> bytes:
        fields = (b"EFI PART", 0x10000, 92, crc, 0, 1, last, 34, last - 33, b"g" * 16, 2, _ENTRIES, 128)
        return struct.pack("<8sIIIIQQQQ16sQIII", *fields, zlib.crc32(table))

    protective = struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, last)
    image = bytearray(size)
    image[446:462] = protective
    image[510:512] = b"\x55\xaa"
    image[sector : sector + 92] = header(zlib.crc32(header(0)))
    image[2 * sector : 2 * sector + len(table)] = table
    return bytes(image)


def mbr(parts: Sequence[tuple[int, int]], size: int, kind: int = 0x83) -> bytes:
    """Give an image of ``size`` bytes with primary partitions."""
    image = bytearray(size)
    for n, (at, length) in enumerate(parts):
        entry = struct.pack("<B3sB3sII", 0, b"", kind, b"", at // 512, length // 512)
        image[446 + 16 * n : 462 + 16 * n] = entry
    image[510:512] = b"\x55\xaa"
    return bytes(image)
