"""Where a header goes as it was, before a verb changes it."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Output
    from kagimori_verifier.settings import Settings


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--backup",
        type=Path,
        metavar="FILE",
        help="keep the header as it was in this new file (default: in headers/, beside verifier.toml)",
    )


def place(options: argparse.Namespace, settings: Settings, uuid: str) -> Path:
    """Name the file that the header goes to as it was: one that is not there yet."""
    if options.backup is not None:
        return Path(options.backup)
    directory = settings.path("headers")
    numbered = (directory / f"{uuid}.{number}.img" for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def note(output: Output, backup: Path) -> None:
    """Say where it is, if the header was changed at all."""
    if backup.exists():
        output.note(
            f"the header as it was: {backup}; delete it once the VM has booted, for an old passphrase opens by it"
        )
