"""Inputs as text: how a finding is printed, and how a person gives one back."""

from __future__ import annotations

import zlib
from pathlib import Path

PACKED = "z:"
LONGEST_PLAIN = 2048


def as_text(data: bytes) -> str:
    """Write an input in hexadecimal; a long one is packed first, so that a log can carry it whole."""
    return data.hex() if len(data) <= LONGEST_PLAIN else PACKED + zlib.compress(data, 9).hex()


def from_text(text: str) -> bytes:
    """Read an input back, or a file of this name. Raises ValueError for what is neither."""
    if Path(text).is_file():
        return Path(text).read_bytes()
    try:
        return (
            zlib.decompress(bytes.fromhex(text[len(PACKED) :]))
            if text.startswith(PACKED)
            else bytes.fromhex(text)
        )
    except zlib.error as error:
        raise ValueError(str(error)) from error
