"""The trail of named checks: what was expected, what was found, in the order of PROTOCOL.md section 6.

Every check in the verifier goes through ``require`` or ``note``, under the name that the ledger, the sealed
verdict and ``explain`` show. ``require`` ends the exchange: what it guards must hold before anything else is
believed. ``note`` gathers: once evidence is authentic, its owner wants all reasons at once.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kagimori_protocol.errors import KagimoriError, NotAuthentic
from kagimori_protocol.messages import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TEXT = 1000
"""Longest text of a check, in characters: it must fit a verdict and a console."""


class Trail:
    """Checks made so far. One trail belongs to one piece of evidence."""

    def __init__(self) -> None:
        """Start with nothing checked."""
        self._checks: list[Check] = []

    @property
    def checks(self) -> tuple[Check, ...]:
        """Give every check made so far, in order."""
        return tuple(self._checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Give the checks that do not hold."""
        return tuple(check for check in self._checks if not check.ok)

    def note(self, check: str, holds: bool, *, expected: str, found: str) -> None:  # noqa: FBT001 - the verdict itself
        """Write a check down, whether it holds or not."""
        self._checks.append(Check(id=check, ok=holds, expected=plain(expected), found=plain(found)))

    def require(self, check: str, holds: bool, *, expected: str, found: str) -> None:  # noqa: FBT001 - the verdict itself
        """Write a check down, and raise NotAuthentic with its name if it does not hold."""
        self.note(check, holds, expected=expected, found=found)
        if not holds:
            told = self._checks[-1]  # bounded and escaped, as a refusal must be too
            raise NotAuthentic(
                f"The check {check} does not hold.", code=check, expected=told.expected, found=told.found
            )

    @contextmanager
    def step(self, check: str, expected: str) -> Iterator[None]:
        """Make a block one check: an error of ours inside it fails the check and becomes NotAuthentic.

        The error's own code stays visible in what was found.
        """
        try:
            yield
        except KagimoriError as error:
            found = error.found or error.what
            detail = found if error.code == check else f"{found} ({error.code})"
            self.require(check, False, expected=error.expected or expected, found=detail)  # noqa: FBT003 - it failed
        else:
            self.note(check, True, expected=expected, found="so it is")  # noqa: FBT003 - it held


def plain(text: str) -> str:
    """Bound a text and escape what a terminal would obey: parts of it were chosen by whoever sent the evidence."""
    bounded = text[:MAX_TEXT]
    if bounded.isprintable():  # nearly all are, and a verdict has a hundred
        return bounded
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in bounded
    )
    return escaped[:MAX_TEXT]
