"""Parse the command line, run one verb, and turn every error of ours into words and an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import KagimoriError, OperatorError
from kagimori_verifier.cli.output import (
    CONFIG_HELP,
    EXIT_CODES,
    JSON_HELP,
    NAME,
    Output,
    Parser,
    close_stdout,
    group,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG_VARIABLE: Final = "KAGIMORI_VERIFIER_CONFIG"
DOES_NOT_HOLD: Final = 1
INTERRUPTED: Final = 130

MODULES: Final = {
    "init": "setup",
    "serve": "setup",
    "identity": "signing_keys",
    "upgrade": "upkeep",
    "backup": "backups",
    "restore": "backups",
    "recovery": "recoveries",
    "vm": "vms",
    "volume": "volumes",
    "image": "images",
    "profile": "profiles",
    "reference": "references",
    "endorsements": "trust",
    "ledger": "records",
    "explain": "records",
    "snp": "evidence",
    "eventlog": "evidence",
    "quote": "evidence",
    "certs": "evidence",
}
"""Which module of this package declares a verb; only that one is imported, since the database's takes half a second."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. ``--help`` ends the process, as argparse has it."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a label may have letters that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Until the words are understood, what they say about the form is only their own word.
    verb = _verb(words)
    judging = MODULES.get(verb) == "evidence"
    output = Output(as_json="--json" in words, judging=judging)
    code = DOES_NOT_HOLD if judging else 0  # until there is a verdict, there is none
    try:
        try:
            options = parser(verb).parse_args(words)
            output = Output(as_json=options.json, judging=judging)
            if options.configured:
                options.config = options.config or _default_config()
            code = options.run(options, output)
        except KagimoriError as error:
            code = error.exit_code
            output.error(error)
        except KeyboardInterrupt:
            return INTERRUPTED
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except BrokenPipeError:
        close_stdout()  # whoever read our output has seen enough
    except OSError as error:
        close_stdout()
        output.note(f"what was to be told could not be written: {error.strerror}")
        return OperatorError.exit_code
    return code


def _default_config() -> Path:
    from kagimori_verifier.settings import DEFAULT_PATH  # noqa: PLC0415 - a tenth of a second that some verbs save

    return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_PATH)


def _verb(words: Sequence[str]) -> str:
    """Find the verb among the words; empty where there is none."""
    rest = iter(words)
    for word in rest:
        if word == "--config":
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return ""


def parser(verb: str = "") -> argparse.ArgumentParser:
    """Build the parser of one verb, or of all where it is none."""
    made = Parser(
        prog=NAME,
        description="Judge the evidence of your confidential VMs and release their disks' keys under your policy.",
        epilog=f"example:\n  {NAME} init --dir /etc/kagimori\n\n{EXIT_CODES}",
    )
    made.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    made.add_argument("--json", action="store_true", help=JSON_HELP)
    verbs = group(made)
    chosen = [MODULES[verb]] if verb in MODULES else dict.fromkeys(MODULES.values())
    for module in chosen:
        importlib.import_module(f"kagimori_verifier.cli.{module}").register(verbs)
    return made
