"""How the verbs that check one artefact read their files and tell their verdict."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import PeerError, UsageError
from kagimori_verifier.cli.files import read_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from kagimori_verifier.cli.output import Output
    from kagimori_verifier.trail import Trail

HOLDS: Final = 0
DOES_NOT_HOLD: Final = 1
_SHOWN: Final = 100
"""Characters of what was found by a check that holds; JSON has all of it."""


def read_artefact(path: Path, limit: int, what: str) -> bytes:
    """Read a file that must not be empty. Raises UsageError."""
    raw = read_file(path, limit)
    if not raw:
        raise UsageError(
            f"{path} is empty.", code="file.empty", expected=what, found="0 bytes",
            todo="See whether what wrote this file has failed.",
        )  # fmt: skip
    return raw


@contextmanager
def readable(path: Path, what: str, todo: str | None = None) -> Iterator[None]:
    """Turn what a parser says about a file into a UsageError: it cannot be read as what it should be."""
    try:
        yield
    except PeerError as error:
        raise UsageError(
            f"{path} cannot be read as {what}: {error.what}",
            code=error.code,
            expected=error.expected,
            found=error.found,
            todo=todo or error.todo or f"See whether {path} is the file that was meant.",
        ) from error


def tell(
    output: Output, trail: Trail, facts: Mapping[str, Any], lines: Sequence[str], notes: Sequence[str]
) -> int:
    """Print facts, checks, notes and verdict; returns the exit code. No check at all is a no."""
    verified = bool(trail.checks) and not trail.failed
    reasons = [f"{check.id}: expected {check.expected}, found {check.found}" for check in trail.failed] or (
        [] if verified else ["nothing was checked"]
    )
    checks = [
        {"check": check.id, "holds": check.ok, "expected": check.expected, "found": check.found}
        for check in trail.checks
    ]
    value = {"verified": verified, "reasons": reasons, "checks": checks, "notes": list(notes), **facts}
    width = max((len(check.id) for check in trail.checks), default=0)
    told = [*lines, ""] if lines else []
    for check in trail.checks:
        if check.ok:
            told.append(f"holds  {check.id:<{width}}  {_short(check.found)}")
        else:
            told += [
                f"FAILS  {check.id}",
                f"         expected: {check.expected}",
                f"         found:    {check.found}",
            ]
    told += [f"note   {note}" for note in notes]
    output.result(value, *told, "", "It holds." if verified else "It does NOT hold.")
    return HOLDS if verified else DOES_NOT_HOLD


def heading(text: str) -> list[str]:
    """Begin a part of what a person reads."""
    return ["", text]


def aligned(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Align rows of cells in columns, without names."""
    if not rows:
        return []
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
