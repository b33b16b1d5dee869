"""What the verbs share: how a verb is declared, and how its result is printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kagimori_protocol.errors import KagimoriError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Verb = Callable[[argparse.Namespace, "Output"], int]
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse names the type only so

NAME: Final = "kagimori-verifier"
CONFIG_HELP: Final = "verifier.toml (default: $KAGIMORI_VERIFIER_CONFIG, or /etc/kagimori/verifier.toml)"
JSON_HELP: Final = "print JSON on stdout, and nothing else there"
EXIT_CODES: Final = """\
exit codes:
  0  done
  1  it does not hold, or was refused
  2  usage, or a file named on the command line that cannot be read
  3  operator: settings, key file, database, policy or reference value
  7  a file whose content cannot be believed (event log, certificate)
  8  disk: header, keyslot or cryptsetup
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: the same words, JSON and exit code as of any other error."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        """Take no abbreviations: a script must not change its meaning when a release adds an option."""
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(
            f"{message[:1].upper()}{message[1:]}.", expected=" ".join(self.format_usage().split()[1:]),
            todo=f"`{self.prog} --help` shows how.",
        )  # fmt: skip


def group(parser: argparse.ArgumentParser) -> Verbs:
    """Give a parser verbs."""
    return parser.add_subparsers(title="verbs", required=True, metavar="VERB")


def add_verb(  # noqa: PLR0913 - what a verb is, by name
    verbs: Verbs,
    name: str,
    run: Verb | None,
    about: str,
    example: str,
    *,
    epilog: str = EXIT_CODES,
    configured: bool = True,
) -> argparse.ArgumentParser:
    """Declare a verb: what it does in a sentence, and an example. A group of verbs has no ``run``.

    One that is not ``configured`` needs no verifier.toml.
    """
    parser = verbs.add_parser(
        name,
        help=about.partition("\n\n")[0],
        description=about,
        epilog=f"example:\n  {NAME} {example}\n\n{epilog}",
    )
    # Also after the verb, where people expect them; absent there, what stood before the verb counts.
    parser.add_argument("--config", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON_HELP)
    if run is not None:
        parser.set_defaults(run=run, configured=configured)
    return parser


class Output:
    """Results for people or for programs."""

    def __init__(self, *, as_json: bool, judging: bool = False) -> None:
        """Choose the form; the JSON of a verb that is ``judging`` says also of an error that nothing was verified."""
        self.as_json = as_json
        self._judging = judging

    def result(self, value: Any, *lines: str) -> None:  # noqa: ANN401 - whatever JSON can hold
        """Print ``value`` as JSON, or the lines for a person. Whoever reads may have gone; a verdict stands all the same."""
        try:
            if self.as_json:
                print(json.dumps(value, indent=2), flush=True)
            else:
                for line in lines:
                    print(printable(line))
        except BrokenPipeError:
            close_stdout()

    def rows(self, rows: Sequence[Mapping[str, Any]], *columns: str, none: str) -> None:
        """Print rows as a JSON array, or as a table of some columns; ``none`` says that there are none."""
        if self.as_json:  # whose rows may have other fields than the table's columns
            self.result(list(rows))
        else:
            self.result(None, *(table(rows, columns) if rows else [none]))

    def error(self, error: KagimoriError) -> None:
        """Tell an error: what, expected, found, what to do."""
        parts = error.as_dict()
        self.note(parts["what"])
        for name, text in (("expected", "expected"), ("found", "found"), ("to do", "todo")):
            if text in parts:
                print(f"  {name}: {printable(parts[text])}", file=sys.stderr)
        if self.as_json:
            verdict = {"verified": False, "reasons": [error.reason]} if self._judging else {}
            self.result(verdict | {"error": parts})

    def note(self, text: str) -> None:
        """Tell a person something beside the result."""
        print(f"{NAME}: {printable(text)}", file=sys.stderr)


def close_stdout() -> None:
    """Let nothing more be told, and Python not complain once more while it exits."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Escape what a terminal would obey: parts of texts were chosen by whoever sent evidence or made a log."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Align rows under their columns' names."""
    cells = [[name.upper() for name in columns]]
    cells += [[printable(_cell(row[name])) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def when(seconds: int) -> str:
    """Write a time for a person, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | frozenset):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
