"""The LUKS2 header of a volume: read it bounded, take it apart strictly, believe nothing in it.

The host owns the disk, so it writes this header. ``read`` fetches the bytes and ``parse`` takes them apart; whether
what they say is allowed is asked in ``luks_allowed``, and the key is used only afterwards.

Source: LUKS2 On-Disk Format Specification 1.1.1, sections 2 (binary header) and 3 (JSON area).

Import budget: ``hashlib``, ``json``, ``struct``, ``re`` and the error tree.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kagimori_protocol.errors import DiskError

MAGIC: Final = b"LUKS\xba\xbe"
MAGIC_SECONDARY: Final = b"SKUL\xba\xbe"
VERSION: Final = 2
BINARY_SIZE: Final = 4096
SIZES: Final = tuple(0x4000 << n for n in range(9))
"""Sizes in bytes that one copy of the header may have (table 1): 16 KiB to 4 MiB."""

# luks2_hdr_disk (figure 2): magic, version, hdr_size, seqid, label, checksum_alg, salt, uuid, subsystem, hdr_offset,
# padding, csum, padding4096. Big-endian.
_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s3584s")
_CSUM: Final = slice(448, 512)
_UUID: Final = slice(168, 208)
_CHECKSUM_ALG: Final = b"sha256"
_UUID_FORM: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_INT_BOUND: Final = 1 << 63
MAX_JSON: Final = 1 << 16
"""Bytes of JSON at most, however large the area for it: 32 keyslots and no tokens need half of that. A full area of 4 MiB
would cost a second and 130 MiB of an initramfs."""
_SHOWN: Final = 120


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """One header, both copies of which agree. Authentic only in that its checksums hold: anybody can make those.

    ``size`` is that of one copy in bytes, ``seqid`` counts changes, ``json`` is the parsed JSON area.
    """

    uuid: str
    label: str
    subsystem: str
    seqid: int
    size: int
    json: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Copy:
    size: int
    seqid: int
    label: bytes
    uuid: bytes
    subsystem: bytes
    text: bytes


def probe(start: bytes) -> str | None:
    """Give the UUID that the first 4096 bytes of a device claim for themselves, or None if that is no LUKS2.

    Only to find devices: nothing is verified, so that a damaged header shows up as such later and not as absent.
    """
    if len(start) != BINARY_SIZE or start[:8] != MAGIC + VERSION.to_bytes(2):
        return None
    return start[_UUID].split(b"\0")[0].decode("ascii", "replace")


def read(device: Path) -> bytes:
    """Read both copies of a device's header, at most 8 MiB. Raises DiskError."""
    try:
        with device.open("rb", buffering=0) as file:
            start = _read_exactly(file.read, BINARY_SIZE)
            size = _size(start)
            return start + _read_exactly(file.read, 2 * size - BINARY_SIZE)
    except OSError as error:
        raise refusal(
            "luks.read", f"a readable device {device}", str(error.strerror), "See why it cannot be read."
        ) from error


def parse(raw: bytes) -> LuksHeader:
    """Take both copies of a header apart. Raises DiskError, whatever the bytes are."""
    size = _size(raw[:BINARY_SIZE])
    if len(raw) != 2 * size:
        raise refusal("luks.size", f"two copies of {size} bytes", f"{len(raw)} bytes")
    primary = _copy(raw[:size], MAGIC, 0)
    secondary = _copy(raw[size:], MAGIC_SECONDARY, size)
    if primary != secondary:
        # cryptsetup would follow the copy with the higher seqid, and write it over the other.
        differing = [name for name in _Copy.__slots__ if getattr(primary, name) != getattr(secondary, name)]
        raise refusal(
            "luks.copies",
            "two copies of the header that say the same",
            f"they differ in {', '.join(differing)}",
            "If the VM was cut off while its header was changed, run `cryptsetup repair` in a trusted place.",
        )
    uuid = _text(primary.uuid, "uuid")
    if not _UUID_FORM.fullmatch(uuid):
        raise refusal("luks.uuid", "a UUID in lower case", shown(uuid))
    return LuksHeader(
        uuid=uuid,
        label=_text(primary.label, "label"),
        subsystem=_text(primary.subsystem, "subsystem"),
        seqid=primary.seqid,
        size=size,
        json=_json(primary.text),
    )


def _read_exactly(read_some: Any, size: int) -> bytes:  # noqa: ANN401 - a raw file's read
    data = bytearray()
    while len(data) < size:
        part = read_some(size - len(data))
        if not part:
            raise refusal("luks.size", f"{size} bytes more of a header", f"the device ends after {len(data)}")
        data += part
    return bytes(data)


def _size(start: bytes) -> int:
    """Give the size of one copy. Raises DiskError for whatever is not the start of a LUKS2 header."""
    if len(start) != BINARY_SIZE or not start.startswith(MAGIC):
        raise refusal(
            "luks.magic",
            "a LUKS2 header",
            "no magic number of LUKS",
            "See that the right device is used, and that the volume was made with `cryptsetup luksFormat`.",
        )
    version = int.from_bytes(start[6:8])
    if version != VERSION:
        raise refusal(
            "luks.version", "LUKS version 2", f"version {version}", "Convert LUKS1 with `cryptsetup convert`."
        )
    size = int.from_bytes(start[8:16])
    if size not in SIZES:
        raise refusal(
            "luks.size", f"a header of {SIZES[0]} to {SIZES[-1]} bytes, a power of two", f"{size} bytes"
        )
    return size


def _copy(raw: bytes, magic: bytes, offset: int) -> _Copy:
    """Verify one copy of the header that should lie at ``offset``, and give what both copies have in common."""
    which = "secondary" if offset else "primary"
    (
        found_magic,
        version,
        size,
        seqid,
        label,
        checksum_alg,
        _salt,
        uuid,
        subsystem,
        found_offset,
        padding,
        csum,
        padding4096,
    ) = _BINARY.unpack(raw[:BINARY_SIZE])
    expected = (magic, VERSION, len(raw), offset)
    found = (found_magic, version, size, found_offset)
    if found != expected:
        names = ("magic", "version", "hdr_size", "hdr_offset")
        wrong = [name for name, one, other in zip(names, expected, found, strict=True) if one != other]
        raise refusal("luks.copies", f"a {which} header at {offset}", f"another {', '.join(wrong)}")
    if checksum_alg.rstrip(b"\0") != _CHECKSUM_ALG:
        raise refusal("luks.checksum", "checksums by sha256", shown(checksum_alg))
    digest = hashlib.sha256(raw[: _CSUM.start] + bytes(_CSUM.stop - _CSUM.start) + raw[_CSUM.stop :]).digest()
    if csum != digest.ljust(len(csum), b"\0"):
        raise refusal("luks.checksum", f"the checksum of the {which} header", "another")
    if any(padding) or any(padding4096):
        raise refusal("luks.padding", f"zeros for padding in the {which} header", "something else")
    text, _, rest = raw[BINARY_SIZE:].partition(b"\0")
    if len(text) == len(raw) - BINARY_SIZE:
        raise refusal("luks.json", "a JSON area that ends in zeros", "no zero")
    if any(rest):
        raise refusal("luks.json", "zeros after the JSON", "something else")
    if len(text) > MAX_JSON:
        raise refusal("luks.json", f"JSON of at most {MAX_JSON} bytes", f"{len(text)} bytes")
    return _Copy(size, seqid, label, uuid, subsystem, text)


def _text(data: bytes, name: str) -> str:
    """Read a fixed field of the binary header: printable ASCII, then zeros, of which there is at least one."""
    text, end, rest = data.partition(b"\0")
    if not end or any(rest) or not _printable(read := text.decode("latin-1")):
        raise refusal("luks.text", f"{name} in printable ASCII, padded with zeros", shown(data))
    return read


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _json(text: bytes) -> dict[str, Any]:
    """Parse the JSON area so that no other parser can read it differently.

    json-c, which cryptsetup uses, lets the last of repeated names win, cuts strings at an escaped NUL, and clamps
    large numbers. None of that is in an honest header.
    """
    try:
        value = json.loads(
            text.decode("ascii"),
            object_pairs_hook=_unrepeated,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        _require_printable(value)
    except (ValueError, RecursionError) as error:
        raise refusal("luks.json", "strict JSON in printable ASCII", shown(str(error))) from error
    return require_object(value, "the JSON area")


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("repeated names")
    return members


def _integer(text: str) -> int:
    value = int(text) if len(text) <= len(str(_INT_BOUND)) else _INT_BOUND
    if not 0 <= value < _INT_BOUND or text.startswith("-"):
        raise ValueError("an integer out of bounds")
    return value


def _no_number(text: str) -> object:
    raise ValueError(f"a number that is no integer: {text[:20]}")


def _require_printable(value: object) -> None:
    if isinstance(value, dict):
        _require_printable(list(value))
        _require_printable(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            _require_printable(one)
    elif isinstance(value, str) and not _printable(value):
        raise ValueError("characters that are not printable ASCII")


def require_object(value: object, name: str) -> dict[str, Any]:
    """Return the JSON object, or raise DiskError."""
    if not isinstance(value, dict):
        raise refusal("luks.json", f"{name} as an object", shown(value))
    return value


def shown(value: object) -> str:
    """Show what the host wrote, briefly and without its control characters."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refusal(code: str, expected: str, found: str, todo: str | None = None) -> DiskError:
    """Give the error for a header that is not used."""
    return DiskError(
        "The volume's LUKS header is refused; no key was used.",
        code=code,
        expected=expected,
        found=found,
        todo=todo
        or "Compare with `cryptsetup luksDump`; restore the header from a backup if it was changed.",
    )
