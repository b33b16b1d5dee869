"""The least of PE/COFF: enough for a boot loader, a kernel or a UKI that firmware could load and measure.

Source: Microsoft PE format; the Authenticode hash as in "Windows Authenticode Portable Executable Signature Format",
section "Calculating the PE Image Hash". PE32+ for x86-64 only.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PE_OFFSET: Final = 0x40
_COFF: Final = struct.Struct("<HHIIIHH")
_OPTIONAL: Final = struct.Struct("<HBBIIIIIQIIHHHHHHIIIIHHQQQQII")
_SECTION: Final = struct.Struct("<8sIIIIIIHHI")
_DIRECTORIES: Final = 16
_DIRECTORY_SIZE: Final = 8
_CERTIFICATE_DIRECTORY: Final = 4
_CHECKSUM_IN_OPTIONAL: Final = 64
_OPTIONAL_SIZE: Final = _OPTIONAL.size + _DIRECTORIES * _DIRECTORY_SIZE

_MACHINE_X64: Final = 0x8664
_CHARACTERISTICS: Final = 0x0206
_MAGIC_PE32_PLUS: Final = 0x20B
_EFI_APPLICATION: Final = 10
_FILE_ALIGNMENT: Final = 0x200
_SECTION_ALIGNMENT: Final = 0x1000
_NAME_SIZE: Final = 8
_READABLE_DATA: Final = 0x40000040


def image(sections: Mapping[str, bytes]) -> bytes:
    """Build a PE32+ EFI application with these sections, in this order; unsigned. Raises UsageError for a long name."""
    headers_end = _PE_OFFSET + 4 + _COFF.size + _OPTIONAL_SIZE + len(sections) * _SECTION.size
    size_of_headers = _align(headers_end, _FILE_ALIGNMENT)
    at, address = size_of_headers, _SECTION_ALIGNMENT
    table, bodies = [], []
    for name, content in sections.items():
        encoded = name.encode()
        if len(encoded) > _NAME_SIZE:
            raise UsageError(
                "A section's name is too long.", expected=f"at most {_NAME_SIZE} bytes", found=name
            )
        size = _align(len(content), _FILE_ALIGNMENT)
        table.append(_SECTION.pack(encoded, len(content), address, size, at, 0, 0, 0, 0, _READABLE_DATA))
        bodies.append(content.ljust(size, b"\x00"))
        at += size
        address += _align(max(len(content), 1), _SECTION_ALIGNMENT)
    dos = b"MZ".ljust(_PE_OFFSET - 4, b"\x00") + struct.pack("<I", _PE_OFFSET)
    coff = _COFF.pack(_MACHINE_X64, len(sections), 0, 0, 0, _OPTIONAL_SIZE, _CHARACTERISTICS)
    optional = _OPTIONAL.pack(
        *(_MAGIC_PE32_PLUS, 0, 0, 0, at - size_of_headers, 0, _SECTION_ALIGNMENT, _SECTION_ALIGNMENT),
        *(0, _SECTION_ALIGNMENT, _FILE_ALIGNMENT, 0, 0, 0, 0, 0, 0, 0, address, size_of_headers, 0),
        *(_EFI_APPLICATION, 0, 0, 0, 0, 0, 0, _DIRECTORIES),
    )
    headers = dos + b"PE\x00\x00" + coff + optional + bytes(_DIRECTORIES * _DIRECTORY_SIZE) + b"".join(table)
    return headers.ljust(size_of_headers, b"\x00") + b"".join(bodies)


def authenticode_input(raw: bytes) -> bytes:
    """Give the bytes whose hash is the image's Authenticode hash: no checksum, no certificate table, no table entry.

    Raises UsageError if ``raw`` is no PE32+ image: firmware would not start it.
    """
    try:
        return _authenticode_input(raw)
    except (struct.error, ValueError) as error:
        raise UsageError(
            "Firmware starts PE images only.",
            expected="a PE32+ image (kagimori_simulator.pe.image builds one)",
            found=f"{raw[:16]!r}: {error}",
        ) from error


def _authenticode_input(raw: bytes) -> bytes:
    (pe_offset,) = struct.unpack_from("<I", raw, 0x3C)
    optional_at = pe_offset + 4 + _COFF.size
    (magic,) = struct.unpack_from("<H", raw, optional_at)
    if raw[:2] != b"MZ" or raw[pe_offset : pe_offset + 4] != b"PE\x00\x00" or magic != _MAGIC_PE32_PLUS:
        message = "no PE32+ headers"
        raise ValueError(message)
    sections = _COFF.unpack_from(raw, pe_offset + 4)[1]
    optional_size = _COFF.unpack_from(raw, pe_offset + 4)[5]
    (size_of_headers,) = struct.unpack_from("<I", raw, optional_at + 60)
    checksum_at = optional_at + _CHECKSUM_IN_OPTIONAL
    directory_at = optional_at + _OPTIONAL.size + _CERTIFICATE_DIRECTORY * _DIRECTORY_SIZE
    certificates = struct.unpack_from("<I", raw, directory_at + 4)[0]
    parts = [raw[:checksum_at], raw[checksum_at + 4 : directory_at]]
    parts.append(raw[directory_at + _DIRECTORY_SIZE : size_of_headers])
    hashed = size_of_headers
    spans = []
    for index in range(sections):
        row = _SECTION.unpack_from(raw, optional_at + optional_size + index * _SECTION.size)
        spans.append((row[4], row[3]))
    for at, size in sorted(spans):
        parts.append(raw[at : at + size])
        hashed += size
    parts.append(raw[hashed : len(raw) - certificates])
    return b"".join(parts)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to
