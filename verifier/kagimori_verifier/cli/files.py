"""Files named on the command line: read whole, up to a limit, and every trouble said in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import UsageError

MAX_FILE: Final = 16 << 20
"""Largest file that is read, in bytes: more than any event log or bundle of certificates has."""


def read_file(path: Path, limit: int = MAX_FILE) -> bytes:
    """Read a file named on the command line; ``-`` is stdin. Raises UsageError, also for more than ``limit`` bytes."""
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(limit + 1)
        else:
            with path.open("rb") as file:
                content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a path
        raise UsageError(
            f"{path} cannot be read.",
            code="file.read",
            expected="a file that can be read",
            found=getattr(error, "strerror", None) or str(error),
            todo="Name a file that this user may read, or - for stdin.",
        ) from error
    if len(content) > limit:
        raise UsageError(
            f"{path} is too large.",
            code="file.size",
            expected=f"at most {limit} bytes",
            found="more",
            todo="See whether this is the file that was meant.",
        )
    return content
