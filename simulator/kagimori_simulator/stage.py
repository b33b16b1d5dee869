"""How the demo speaks: colours and a spinner on a terminal, plain lines in a pipe, one JSON object for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Checks = Sequence[Mapping[str, Any]]


class Stage(Protocol):
    """Where the demo is told."""

    def act(self, title: str) -> None:
        """Begin a part."""

    def step(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Do something that takes a moment."""

    def say(self, text: str) -> None:
        """Tell something."""

    def checks(self, checks: Checks, *, only_failed: bool = False) -> None:
        """Show checks: id, whether it holds, expected, found."""

    def refusal(self, title: str, told: str, checks: Checks) -> None:
        """Show an attack: what the agent was told, and why the verifier refused."""

    def end(self, result: Mapping[str, Any]) -> None:
        """Finish with the result as data."""


class PlainStage:
    """Lines without colour, for a pipe or a log."""

    def act(self, title: str) -> None:
        """Print a headline."""
        print(f"\n== {title}", flush=True)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Print the step once it is done, with its time."""
        started = time.monotonic()
        yield
        print(f"   {what} ({time.monotonic() - started:.1f} s)", flush=True)

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"   {text}", flush=True)

    def checks(self, checks: Checks, *, only_failed: bool = False) -> None:
        """Print a line for each check, what was expected and found below it."""
        for check in checks:
            if only_failed and check["ok"]:
                continue
            print(f"   {'holds ' if check['ok'] else 'FAILS '} {check['id']}")
            print(f"          expected: {_short(check['expected'])}")
            print(f"          found:    {_short(check['found'])}", flush=True)

    def refusal(self, title: str, told: str, checks: Checks) -> None:
        """Print an attack and its end."""
        print(f"\n-- {title}\n   the agent was told: {told}")
        self.checks(checks, only_failed=True)

    def end(self, result: Mapping[str, Any]) -> None:
        """Print a last line."""
        refused = len(result["refusals"])
        print(
            f"\nDone: the honest boot got its key ({result['volume']}), {refused} others did not.", flush=True
        )


class JsonStage:
    """Nothing until the end, then one object."""

    def act(self, title: str) -> None:
        """Say nothing."""

    def step(self, what: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - a program wants no progress
        """Say nothing."""
        return contextlib.nullcontext()

    def say(self, text: str) -> None:
        """Say nothing."""

    def checks(self, checks: Checks, *, only_failed: bool = False) -> None:
        """Say nothing: the end has them."""

    def refusal(self, title: str, told: str, checks: Checks) -> None:
        """Say nothing: the end has it."""

    def end(self, result: Mapping[str, Any]) -> None:
        """Print the object."""
        print(json.dumps(result, indent=2))


class TerminalStage:
    """Colours, a spinner and a table, by rich."""

    def __init__(self) -> None:
        """Import rich, which only a terminal needs."""
        from rich.console import Console  # noqa: PLC0415 - as the docstring says

        self._console = Console(highlight=False)

    def act(self, title: str) -> None:
        """Rule off and print a headline."""
        self._console.print()
        self._console.rule(f"[bold]{title}", align="left")

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Spin until it is done."""
        started = time.monotonic()
        with self._console.status(what):
            yield
        self._console.print(f" [green]✓[/] {what} [dim]{time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(f"   {text}", markup=False)

    def checks(self, checks: Checks, *, only_failed: bool = False) -> None:
        """Print a table."""
        from rich.table import Table  # noqa: PLC0415 - only a terminal needs it
        from rich.text import Text  # noqa: PLC0415 - as above

        table = Table("", "check", "expected", "found", box=None, header_style="dim", pad_edge=False)
        for check in checks:
            if not (only_failed and check["ok"]):
                mark = Text("✓", "green") if check["ok"] else Text("✗", "bold red")
                table.add_row(
                    mark, Text(check["id"]), Text(_short(check["expected"])), Text(_short(check["found"]))
                )
        self._console.print(table)

    def refusal(self, title: str, told: str, checks: Checks) -> None:
        """Print an attack and its end."""
        self._console.print(f"\n [bold red]✗[/] [bold]{title}")
        self._console.print(f"   the agent was told: {told}", markup=False)
        self.checks(checks, only_failed=True)

    def end(self, result: Mapping[str, Any]) -> None:
        """Print a last line."""
        self._console.print(
            f"\n[bold green]Done:[/] the honest boot got its key ({result['volume']}), "
            f"{len(result['refusals'])} others did not."
        )


def choose(*, as_json: bool) -> Stage:
    """Choose by what stdout is."""
    if as_json:
        return JsonStage()
    return TerminalStage() if sys.stdout.isatty() else PlainStage()


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
