"""Secrets that an operator hands over: by a descriptor, or typed where nobody can read them. Never by argument or environment."""

from __future__ import annotations

import getpass
import os
import sys
from typing import Final

from kagimori_protocol.errors import UsageError

MAX_SECRET: Final = 4096
"""Bytes of a passphrase or a code that a person makes up or reads from paper."""


def first_line(descriptor: int, what: str, code: str, limit: int = MAX_SECRET) -> bytes:
    """Read a secret as people type it, without the newline after it. Raises UsageError, which names it as ``what``."""
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            line = file.readline(limit + 1)
    except OSError as error:
        raise UsageError(
            f"The {what} cannot be read.",
            code=code,
            expected="a descriptor that is open for reading",
            found=str(error.strerror),
        ) from error
    if len(line) > limit:
        raise UsageError(
            f"The {what} is too long.", code=code, expected=f"at most {limit} bytes", found="more"
        )
    return line.removesuffix(b"\n")


def typed(descriptor: int | None, what: str, code: str) -> bytes:
    """Read a secret from a descriptor where one is named, else from the terminal, unseen, or from stdin that is none."""
    if descriptor is not None:
        return first_line(descriptor, what, code)
    if sys.stdin is not None and sys.stdin.isatty():
        return getpass.getpass(f"{what[:1].upper()}{what[1:]} (not shown): ").encode(errors="replace")
    return first_line(0, what, code)
