"""What the agent says to people: progress and errors on stderr, results on stdout, never a key."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from kagimori_protocol.errors import KagimoriError
    from kagimori_protocol.messages import Check

NAME: Final = "kagimori-agent"
_INDENT: Final = "         "


def say(text: str) -> None:
    """Tell what happens, on stderr: stdout carries only what was asked for."""
    print(f"{NAME}: {_one_line(text)}", file=sys.stderr, flush=True)


def debug() -> None:
    """Tell, on stderr, all that we and our libraries log from now on: whom was asked where, and what came of it.

    No body, key or answer is ever logged.
    """
    import logging  # noqa: PLC0415 - only who debugs pays for it

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"[{record.relativeCreated / 1000:.1f} s, {record.name}] {record.getMessage()}")

    logging.basicConfig(level=logging.DEBUG, handlers=[Handler()])


def explain(error: KagimoriError) -> None:
    """Tell an error on stderr: what, expected, found, what to do; a refusal, check by check."""
    say(error.what)
    checks: Sequence[Check] = getattr(error, "checks", ())
    if checks:
        show_checks(checks, every=False, stream=sys.stderr)
        print(f"{_INDENT}to do: {error.todo}", file=sys.stderr, flush=True)
        return
    for name, text in (("expected", error.expected), ("found", error.found), ("to do", error.todo)):
        if text is not None:
            print(f"{_INDENT}{name}: {_one_line(text)}", file=sys.stderr, flush=True)


def show_checks(
    checks: Sequence[Check], *, every: bool, always: Container[str] = (), stream: TextIO | None = None
) -> None:
    """Print a verdict's checks (on stdout), those that failed last, where a console still shows them.

    Of those that hold only the ones named in ``always``, unless ``every``.
    """
    for check in sorted(checks, key=lambda one: not one.ok):
        if check.ok and (every or check.id in always):
            print(f"holds  {check.id}: {_one_line(check.found)}", file=stream)
        elif not check.ok:
            print(f"FAILS  {check.id}", file=stream)
            print(f"{_INDENT}expected: {_one_line(check.expected)}", file=stream)
            print(f"{_INDENT}found:    {_one_line(check.found)}", file=stream)


def _one_line(text: str) -> str:
    """Escape what a terminal would obey: some of it came from the network."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
