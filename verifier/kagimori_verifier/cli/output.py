"""What the verbs share: how a verb is declared, how its result is printed, how the verifier's parts are opened."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import KagimoriError, OperatorError
from kagimori_verifier import settings
from kagimori_verifier.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Txn

    Verb = Callable[[argparse.Namespace, "Output"], int]
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse names the type only so

NAME: Final = "kagimori-verifier"
EXIT_CODES: Final = """\
exit codes:
  0  done
  1  it does not hold, or was refused
  2  usage, or a file that cannot be read
  3  operator: settings, key file, database or reference value
  7  bytes that the protocol does not allow
  8  disk: header, keyslot or cryptsetup
"""


def group(parser: argparse.ArgumentParser) -> Verbs:
    """Give a parser verbs."""
    return parser.add_subparsers(title="verbs", required=True, metavar="VERB")


def add_verb(
    verbs: Verbs, name: str, run: Verb | None, about: str, example: str = ""
) -> argparse.ArgumentParser:
    """Declare a verb: what it does in one sentence, and an example. A group of verbs has no ``run``."""
    epilog = (f"example:\n  {NAME} {example}\n\n" if example else "") + EXIT_CODES
    parser = verbs.add_parser(
        name,
        help=about,
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Also after the verb, where people expect them; absent there, what stood before the verb counts.
    parser.add_argument(
        "--config", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=argparse.SUPPRESS
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout")
    if run is not None:
        parser.set_defaults(run=run)
    return parser


class Output:
    """Results for people or for programs."""

    def __init__(self, *, as_json: bool) -> None:
        """Choose the form."""
        self.as_json = as_json

    def result(self, value: Any, *lines: str) -> None:  # noqa: ANN401 - whatever JSON can hold
        """Print ``value`` as JSON, or the lines for a person."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False))
        elif lines:
            print("\n".join(lines))

    def rows(self, rows: Sequence[Mapping[str, Any]], *columns: str, none: str) -> None:
        """Print rows as a JSON array, or as a table of some columns; ``none`` says that there are none."""
        if self.as_json:
            self.result(list(rows))
        elif rows:
            print(table(rows, columns))
        else:
            print(none)

    def error(self, error: KagimoriError) -> None:
        """Tell an error: what, expected, found, what to do."""
        print(f"{NAME}: " + str(error).replace("\n", "\n  "), file=sys.stderr)
        if self.as_json:
            self.result({"error": error.as_dict()})

    def note(self, text: str) -> None:
        """Tell a person something beside the result."""
        print(f"{NAME}: {text}", file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Align rows under their columns' names."""
    cells = [[name.upper() for name in columns]] + [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def when(seconds: int) -> str:
    """Write a time for a person, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def now_s() -> int:
    """Give the time in seconds since 1970."""
    return int(time.time())


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Settings, Store]]:
    """Open the database that the settings name."""
    loaded = settings.load(options.config)
    store = Store.open(loaded.database_url)
    try:
        yield loaded, store
    finally:
        store.close()


@contextlib.contextmanager
def reading(options: argparse.Namespace) -> Iterator[Txn]:
    """Read the database in one transaction."""
    with opened(options) as (_, store), store.read() as txn:
        yield txn


@contextlib.contextmanager
def writing(options: argparse.Namespace) -> Iterator[Txn]:
    """Write the database in one transaction."""
    with opened(options) as (_, store), store.write() as txn:
        yield txn


def unknown(what: str, name: str, todo: str) -> OperatorError:
    """Say that something named on the command line does not exist."""
    return OperatorError(
        f"There is no {what} {name}.",
        code=f"{what.replace(' ', '-')}.unknown",
        expected=f"a {what} that exists",
        found=name,
        todo=todo,
    )


def exists(what: str, name: str) -> OperatorError:
    """Say that something exists already and is left alone."""
    return OperatorError(
        f"There is a {what} {name} already.",
        code=f"{what.replace(' ', '-')}.exists",
        expected="a new name",
        found=name,
    )


def read_file(path: Path) -> bytes:
    """Read a file named on the command line; ``-`` is stdin. Raises OperatorError."""
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be read.",
            code="file.read",
            expected="a file that can be read",
            found=str(error.strerror),
        ) from error


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple | frozenset):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)
