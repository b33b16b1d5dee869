"""Parse the command line, run one verb, and turn every error of ours into words and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import KagimoriError
from kagimori_verifier.cli import policies, records, setup, trust, vms
from kagimori_verifier.cli.output import EXIT_CODES, NAME, Output, group
from kagimori_verifier.settings import DEFAULT_PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG_VARIABLE: Final = "KAGIMORI_VERIFIER_CONFIG"
INTERRUPTED: Final = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parser().parse_args(arguments)
    output = Output(as_json=options.json)
    options.config = options.config or Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_PATH))
    try:
        code: int = options.run(options, output)
        sys.stdout.flush()
    except KagimoriError as error:
        output.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Judge the evidence of your confidential VMs and release their disks' keys under your policy.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"verifier.toml (default: ${CONFIG_VARIABLE}, or {DEFAULT_PATH})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    verbs = group(parser)
    for module in (setup, vms, policies, trust, records):
        module.register(verbs)
    return parser
