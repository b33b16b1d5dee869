"""One copy of a LUKS2 header: where it lies, its binary fields, its JSON; taken apart strictly, and put together.

The host owns the disk, so it writes what is read here. A header has two copies, and a crash, or the host, may leave them
different: each is taken apart by itself. What a copy may say is asked in ``luks2_allowed``, whether it is authentic in
``luks2_guard``.

Source: LUKS2 On-Disk Format Specification 1.1.1, sections 2 (binary header) and 3 (JSON area).

Import budget: ``hashlib``, ``json``, ``struct``, ``re`` and the error tree.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAGIC: Final = b"LUKS\xba\xbe"
MAGIC_SECONDARY: Final = b"SKUL\xba\xbe"
VERSION: Final = 2
BINARY_SIZE: Final = 4096
SIZES: Final = tuple(0x4000 << n for n in range(9))
"""Sizes in bytes that one copy of the header may have (table 1), 16 KiB to 4 MiB. The secondary copy lies at its size."""

# luks2_hdr_disk (figure 2): magic, version, hdr_size, seqid, label, checksum_alg, salt, uuid, subsystem, hdr_offset,
# padding, csum, padding4096. Big-endian.
_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s3584s")
_CSUM: Final = slice(448, 512)
_UUID: Final = slice(168, 208)
_CHECKSUM_ALG: Final = b"sha256"
_SALT_SIZE: Final = 64
_UUID_FORM: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_INT_BOUND: Final = 1 << 63
MAX_JSON: Final = 1 << 16
"""Bytes of JSON at most, however large the area for it: 32 keyslots, each with its token, need two thirds of that. A full
area of 4 MiB would cost a second and 130 MiB of an initramfs."""
_SHOWN: Final = 120


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """What one copy says. Authentic only in that its checksum holds: anybody can make those.

    ``size`` is that of one copy in bytes, ``seqid`` counts changes, ``offset`` is where this copy lies (0: the primary),
    ``json`` is the parsed JSON area.
    """

    uuid: str
    label: str
    subsystem: str
    seqid: int
    size: int
    offset: int
    json: Mapping[str, Any] = field(repr=False)

    @property
    def which(self) -> str:
        """Name this copy."""
        return "secondary" if self.offset else "primary"


def probe(read: Callable[[int, int], bytes]) -> str | None:
    """Give the UUID that a device claims for itself, or None if it has no LUKS2 header.

    Only to find devices: nothing is verified, so that a damaged header shows up as such later and not as absent. Where the
    primary copy is gone, the secondary speaks.
    """
    for offset in (0, *SIZES):
        start = read(offset, BINARY_SIZE)
        magic = (MAGIC_SECONDARY if offset else MAGIC) + VERSION.to_bytes(2)
        if len(start) == BINARY_SIZE and start.startswith(magic):
            return start[_UUID].split(b"\0")[0].decode("ascii", "replace")
    return None


def copies(read: Callable[[int, int], bytes]) -> tuple[LuksHeader | DiskError, ...]:
    """Take apart every copy that a device has, the primary first; what is no copy is there as its error.

    ``read(offset, size)`` gives bytes of the device, fewer where it ends. Raises nothing of its own. Where the primary is
    damaged, the secondary is looked for at each place that it may have, as cryptsetup does.
    """
    primary = _taken_apart(read, 0)
    sizes = (primary.size,) if isinstance(primary, LuksHeader) else SIZES
    found = [
        _taken_apart(read, size)
        for size in sizes
        if isinstance(primary, LuksHeader) or read(size, len(MAGIC)) == MAGIC_SECONDARY
    ]
    return (primary, *found)


def parse(raw: bytes, offset: int) -> LuksHeader:
    """Take one copy apart that lies at ``offset`` of its device. Raises DiskError, whatever the bytes are."""
    which = "secondary" if offset else "primary"
    size = _size(raw[:BINARY_SIZE], offset)
    if len(raw) != size:
        raise refusal("luks.size", f"a {which} header of {size} bytes", f"{len(raw)} bytes")
    (
        _magic,
        _version,
        _hdr_size,
        seqid,
        label,
        checksum_alg,
        _salt,
        uuid,
        subsystem,
        hdr_offset,
        padding,
        csum,
        padding4096,
    ) = _BINARY.unpack(raw[:BINARY_SIZE])
    if hdr_offset != offset:
        raise refusal("luks.copies", f"a {which} header at {offset}", f"one of {hdr_offset}")
    if checksum_alg.rstrip(b"\0") != _CHECKSUM_ALG:
        raise refusal("luks.checksum", "checksums by sha256", shown(checksum_alg))
    if csum != _checksum(raw).ljust(len(csum), b"\0"):
        raise refusal("luks.checksum", f"the checksum of the {which} header", "another")
    if any(padding) or any(padding4096):
        raise refusal("luks.padding", f"zeros for padding in the {which} header", "something else")
    named = _text(uuid, "uuid")
    if not _UUID_FORM.fullmatch(named):
        raise refusal("luks.uuid", "a UUID in lower case", shown(named))
    return LuksHeader(
        uuid=named,
        label=_text(label, "label"),
        subsystem=_text(subsystem, "subsystem"),
        seqid=seqid,
        size=size,
        offset=offset,
        json=_json(_json_area(raw[BINARY_SIZE:])),
    )


def build(header: LuksHeader, salts: tuple[bytes, bytes]) -> bytes:
    """Write both copies of a header, primary and secondary, with right checksums.

    ``salts`` (64 bytes each) only make the checksums of two headers differ. Raises DiskError if the JSON does not fit.
    """
    text = canonical(header.json)
    if len(text) >= header.size - BINARY_SIZE:
        raise refusal(
            "luks.json",
            f"JSON of less than {header.size - BINARY_SIZE} bytes",
            f"{len(text)} bytes",
            "Remove keyslots that nobody needs.",
        )
    built = b""
    for offset, magic, salt in ((0, MAGIC, salts[0]), (header.size, MAGIC_SECONDARY, salts[1])):
        binary = _BINARY.pack(
            magic,
            VERSION,
            header.size,
            header.seqid,
            header.label.encode("ascii"),
            _CHECKSUM_ALG,
            salt.ljust(_SALT_SIZE, b"\0"),
            header.uuid.encode("ascii"),
            header.subsystem.encode("ascii"),
            offset,
            b"",
            b"",
            b"",
        )
        copy = (binary + text).ljust(header.size, b"\0")
        built += copy[: _CSUM.start] + _checksum(copy).ljust(_CSUM.stop - _CSUM.start, b"\0")
        built += copy[_CSUM.stop :]
    return built


def canonical(value: object) -> bytes:
    """Write JSON of a header in one form: names in order, without blanks, ASCII. What is authenticated is this."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True).encode("ascii")


def _taken_apart(read: Callable[[int, int], bytes], offset: int) -> LuksHeader | DiskError:
    try:
        size = _size(read(offset, BINARY_SIZE), offset)
        return parse(read(offset, size), offset)
    except DiskError as error:
        return error


def _size(start: bytes, offset: int) -> int:
    """Give the size of a copy. Raises DiskError for whatever is not the start of a LUKS2 header."""
    if len(start) != BINARY_SIZE or not start.startswith(MAGIC_SECONDARY if offset else MAGIC):
        raise refusal(
            "luks.copies" if offset else "luks.magic",
            "the other copy of the header" if offset else "a LUKS2 header",
            "no magic number of LUKS",
            "See that the right device is used, and that the volume was made with `cryptsetup luksFormat`.",
        )
    version = int.from_bytes(start[6:8])
    if version != VERSION:
        raise refusal(
            "luks.version", "LUKS version 2", f"version {version}", "Convert LUKS1 with `cryptsetup convert`."
        )
    size = int.from_bytes(start[8:16])
    if size not in SIZES or offset not in {0, size}:
        raise refusal(
            "luks.size", f"a header of {SIZES[0]} to {SIZES[-1]} bytes, a power of two", f"{size} bytes"
        )
    return size


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw[: _CSUM.start] + bytes(_CSUM.stop - _CSUM.start) + raw[_CSUM.stop :]).digest()


def _json_area(area: bytes) -> bytes:
    text, _, rest = area.partition(b"\0")
    if len(text) == len(area):
        raise refusal("luks.json", "a JSON area that ends in zeros", "no zero")
    if any(rest):
        raise refusal("luks.json", "zeros after the JSON", "something else")
    if len(text) > MAX_JSON:
        raise refusal("luks.json", f"JSON of at most {MAX_JSON} bytes", f"{len(text)} bytes")
    return text


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
