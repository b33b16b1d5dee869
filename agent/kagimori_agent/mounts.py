"""What is mounted where, as the kernel tells it.

Source: proc_pid_mountinfo(5). Import budget: the standard library and the error tree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import ImageError

ROOT: Final = Path("/")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_LEAST_FIELDS: Final = 10
"""Of a line without optional fields, the dash counted."""
_AFTER_DASH: Final = 3


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: ``number`` is major:minor as stat(2) gives it, ``kind`` the file system's, ``options`` the super block's."""

    number: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def read(root: Path = ROOT) -> list[Mount]:
    """List all mounts that this process sees, in the kernel's order. Raises ImageError: no list, or another form."""
    path = root / "proc/self/mountinfo"
    try:
        return [_mount(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise _unreadable(f"a list of mounts in {path}", str(error.strerror)) from error
    except ValueError as error:
        raise _unreadable("lines as in proc_pid_mountinfo(5)", ascii(str(error))) from error


def unescaped(text: str) -> str:
    """Undo what the kernel does to blanks and backslashes in paths."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _mount(line: str) -> Mount:
    fields = line.split(" ")
    if len(fields) < _LEAST_FIELDS or "-" not in fields[6:]:
        raise ValueError(line[:200])
    after = fields[fields.index("-", 6) + 1 :]
    if len(after) < _AFTER_DASH:
        raise ValueError(line[:200])
    kind, source, options = after[0], unescaped(after[1]), tuple(after[2].split(","))
    return Mount(fields[2], unescaped(fields[4]), kind, source, options)


def _unreadable(expected: str, found: str) -> ImageError:
    return ImageError(
        "What is mounted cannot be told.",
        code="root.mounts",
        expected=expected,
        found=found,
        todo="mount -t proc proc /proc",
    )
