"""The few DER facts that `cryptography` does not hand out: the signed bytes as they are, and AMD's bare values.

Source: ITU-T X.690, sections 8.1 to 8.3; RFC 5280, section 4.1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kagimori_protocol.errors import Malformed

_SEQUENCE: Final = 0x30
_INTEGER: Final = 0x02
_BIT_STRING: Final = 0x03
_IA5_STRING: Final = 0x16
_VERSION: Final = 0xA0
_LONG_FORM: Final = 0x80
_MAX_LENGTH_BYTES: Final = 3
_BYTES_SHOWN: Final = 16


class Element(NamedTuple):
    """One element: its tag, where it starts, where its content starts, where it ends."""

    tag: int
    start: int
    content: int
    end: int


def element(data: bytes, at: int, tag: int, limit: int | None = None) -> Element:
    """Read the element at ``at``, which must have ``tag`` and end within ``limit``. Raises Malformed."""
    limit = len(data) if limit is None else limit
    if at + 2 > limit or data[at] != tag:
        raise _broken(f"tag 0x{tag:02x} at offset {at}", data[at : at + 1].hex() or "the end")
    size, content = data[at + 1], at + 2
    if size & _LONG_FORM:
        count = size & ~_LONG_FORM
        content += count
        if not 1 <= count <= _MAX_LENGTH_BYTES or content > limit:
            raise _broken("a definite length of 1 to 3 bytes", f"length byte 0x{size:02x}")
        size = int.from_bytes(data[at + 2 : content], "big")
    if content + size > limit:
        raise _broken(f"content up to offset {limit}", f"{size} bytes from offset {content}")
    return Element(tag, at, content, content + size)


def split_certificate(raw: bytes) -> tuple[bytes, bytes]:
    """Give what is signed in a certificate or revocation list, with its header, and the signature.

    The algorithm outside of what is signed must be the one inside (RFC 5280, sections 4.1.1.2 and 5.1.1.2), byte for
    byte: then nobody but the issuer could have chosen any byte of the whole. Raises Malformed.
    """
    whole = element(raw, 0, _SEQUENCE)
    if whole.end != len(raw):
        raise _broken("one certificate and nothing after it", f"{len(raw) - whole.end} bytes more")
    tbs = element(raw, whole.content, _SEQUENCE, whole.end)
    algorithm = element(raw, tbs.end, _SEQUENCE, whole.end)
    signature = element(raw, algorithm.end, _BIT_STRING, whole.end)
    if signature.end != whole.end or raw[signature.content : signature.content + 1] != b"\x00":
        raise _broken("a signature of whole bytes at the end", "something else")
    at = tbs.content
    while at < tbs.end and raw[at] in (_VERSION, _INTEGER):  # version and serial number come first
        at = element(raw, at, raw[at], tbs.end).end
    inner = element(raw, at, _SEQUENCE, tbs.end)
    if raw[inner.start : inner.end] != raw[algorithm.start : algorithm.end]:
        raise _broken("one signature algorithm, inside and outside", "two")
    return raw[tbs.start : tbs.end], raw[signature.content + 1 : signature.end]


def with_serial_number_one(raw: bytes) -> bytes | None:
    """Give a copy of a certificate whose serial number 0 is 1; None if it has another number. Raises Malformed."""
    whole = element(raw, 0, _SEQUENCE)
    tbs = element(raw, whole.content, _SEQUENCE, whole.end)
    version = element(raw, tbs.content, _VERSION, tbs.end)
    serial = element(raw, version.end, _INTEGER, tbs.end)
    if raw[serial.content : serial.end] != b"\x00":
        return None
    return raw[: serial.content] + b"\x01" + raw[serial.end :]


def small_integer(value: bytes) -> int:
    """Read a non-negative INTEGER of at most 4 bytes. Raises Malformed."""
    found = element(value, 0, _INTEGER)
    content = value[found.content : found.end]
    if found.end != len(value) or not 1 <= len(content) <= 4 or content[0] & _LONG_FORM:  # noqa: PLR2004 - docstring
        raise _broken("a small, non-negative INTEGER", _shown(value))
    return int.from_bytes(content, "big")


def ia5_string(value: bytes) -> str:
    """Read an IA5String of printable characters. Raises Malformed."""
    found = element(value, 0, _IA5_STRING)
    content = value[found.content : found.end]
    if found.end != len(value) or not all(0x20 <= byte < 0x7F for byte in content):  # noqa: PLR2004 - printable ASCII
        raise _broken("an IA5String of printable characters", _shown(value))
    return content.decode("ascii")


def _shown(value: bytes) -> str:
    """Show a value for a message: as much of it as tells what it is, for whoever sent it chose its length."""
    return (
        value.hex() if len(value) <= _BYTES_SHOWN else f"{value[:_BYTES_SHOWN].hex()}... {len(value)} bytes"
    )


def _broken(expected: str, found: str) -> Malformed:
    return Malformed("DER is broken.", code="certificate.der", expected=expected, found=found)
