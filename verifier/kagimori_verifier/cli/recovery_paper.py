"""Recovery codes on their way to paper: shown once, to a person or by a descriptor, and never into a log."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from kagimori_protocol import recovery_code
from kagimori_protocol.errors import UsageError
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.recovery import NewKey

if TYPE_CHECKING:
    import argparse

    from kagimori_verifier.cli.output import Output
    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Store

_GROUPS: Final = 5
"""Groups of a code on one line of a terminal."""


def require_reader(descriptor: int | None, option: str, *, as_json: bool) -> None:
    """Raise UsageError unless a person reads along, or somebody waits for the code at the descriptor that ``option`` names."""
    if descriptor is None:
        there = sys.stdout is not None and sys.stdout.isatty() and not as_json
    else:
        try:
            os.fstat(descriptor)
            there = True
        except OSError:
            there = False
    if not there:
        raise UsageError(
            "Nobody would see the recovery code.",
            code="recovery.output",
            expected=f"a terminal to show it on, or {option} with a descriptor that is open",
            found="neither",
        )


def show(key: bytes, descriptor: int | None, of: str, todo: str) -> None:
    """Show a key's code, once. ``todo`` says what to do where it cannot be handed over: UsageError then."""
    code = recovery_code.encode(key)
    if descriptor is None:
        groups = code.split("-")
        lines = ["-".join(groups[at : at + _GROUPS]) for at in range(0, len(groups), _GROUPS)]
        print(f"recovery code of {of}, not to be shown again:", *lines, sep="\n", flush=True)
        return
    try:
        os.write(descriptor, code.encode() + b"\n")
    except OSError as error:
        raise UsageError(
            "The recovery code cannot be handed over.",
            code="recovery.output",
            expected="a descriptor that can be written",
            found=str(error.strerror),
            todo=todo,
        ) from error


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options by which a recovery code is asked for with a one-time code."""
    parser.add_argument(
        "--recovery",
        action="store_true",
        help="give the volumes that are enrolled by the code a recovery keyslot, and show its code here, once",
    )
    parser.add_argument(
        "--recovery-fd",
        type=arguments.descriptor,
        metavar="N",
        help="the same, but write the recovery code to this descriptor, on one line",
    )


def asked(options: argparse.Namespace, output: Output, settings: Settings, store: Store) -> NewKey | None:
    """Make a recovery key if one is asked for. Raises UsageError where nobody would see its code, OperatorError for another KEK."""
    if not options.recovery and options.recovery_fd is None:
        return None
    require_reader(options.recovery_fd, "--recovery-fd", as_json=output.as_json)
    return NewKey.make(own_kek(settings, store))


def show_new(made: NewKey, options: argparse.Namespace, vm_id: str) -> None:
    """Show the code of a key that is kept by now. Raises UsageError."""
    show(
        made.key,
        options.recovery_fd,
        f"the volumes that {vm_id} enrols by the next code",
        f"Make other codes: `kagimori-verifier vm code {vm_id} --recovery` replaces both.",
    )
