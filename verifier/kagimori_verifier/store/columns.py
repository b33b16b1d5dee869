"""Values that a column holds as JSON text."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from kagimori_verifier.store.database import StoreUnavailable

T = TypeVar("T")


def encode(value: object) -> str:
    """Write a value for a column."""
    return msgspec.json.encode(value).decode()


def decode(text: str, type: type[T], column: str) -> T:
    """Read a value of a column. Raises StoreUnavailable for what this release cannot have written."""
    try:
        return msgspec.json.decode(text, type=type)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise StoreUnavailable(
            f"The database holds something else than {column} in that column.",
            code="store.broken",
            expected="JSON as this release writes it",
            found=str(error),
            todo="Someone changed the database: restore it from your backup.",
        ) from error
