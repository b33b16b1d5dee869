"""Run the real command lines, as a person would, and read what they say."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import KagimoriError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kagimori_simulator.world import World

_TIMEOUT_S: Final = 60


@dataclass(frozen=True, slots=True)
class Done:
    """A program that has ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:  # noqa: ANN401 - whatever the verb prints
        """Read stdout as the JSON object that ``--json`` promises."""
        return json.loads(self.stdout)

    def told(self) -> str:
        """Give the first line of what went wrong, without the program's name."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("kagimori-")] or [""]
        told = [line.partition(": ")[2] for line in lines]
        return next((line for line in reversed(told) if "refuses" in line or "denies" in line), told[-1])


@dataclass(frozen=True, slots=True)
class ServedVerifier:
    """A verifier process that answers."""

    url: str
    public_key: str


class Commands:
    """``kagimori-verifier`` and ``kagimori-agent``, run in a demo's directory."""

    def __init__(self, directory: Path) -> None:
        """Remember the directory; the verifier's settings lie in ``verifier/``."""
        self._directory = directory

    def verifier(self, *arguments: str, stdin: str = "") -> Done:
        """Run an administrative verb; raises KagimoriError if it fails."""
        config = [] if arguments[0] == "init" else ["--config", str(self._config)]
        return _run("kagimori_verifier", *config, *arguments, stdin=stdin)

    def agent(self, world: World, *arguments: str, may_fail: bool = False) -> Done:
        """Run the agent in a world; raises KagimoriError if it fails, unless it may."""
        verb, *rest = arguments
        config = str(world.directory / "agent.toml")
        return _run("kagimori_agent", verb, "--config", config, *rest, may_fail=may_fail)

    def explain(self, session: str) -> dict[str, Any]:
        """Give what the owner sees of a session."""
        explained: dict[str, Any] = self.verifier("explain", session, "--json").json()
        return explained

    def last_refusal(self) -> list[dict[str, Any]]:
        """Give the checks of the newest thing that the verifier refused, in the ledger or before authenticity."""
        entry = self.verifier("ledger", "list", "--limit", "1", "--json").json()[:1]
        refusal = self.verifier("ledger", "refusals", "--limit", "1", "--json").json()[:1]
        if refusal and (not entry or refusal[0]["created"] >= entry[0]["created"]):
            found = refusal[0]
            return [
                {"id": found["code"], "ok": False, "expected": found["expected"], "found": found["found"]}
            ]
        checks: list[dict[str, Any]] = entry[0]["body"].get("checks", []) if entry else []
        return checks

    @contextlib.contextmanager
    def serving(self) -> Iterator[ServedVerifier]:
        """Run ``kagimori-verifier serve`` until the block ends."""
        identity = self.verifier("identity", "show", "--json").json()
        log = (self._directory / "verifier.log").open("wb")
        command = [
            sys.executable,
            "-m",
            "kagimori_verifier",
            "--config",
            str(self._config),
            "serve",
            "--json",
        ]
        with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                line = process.stdout.readline() if process.stdout else ""
                if not line:
                    raise KagimoriError(
                        "The verifier did not start.",
                        code="demo.verifier",
                        expected="a line with its address",
                        found=(self._directory / "verifier.log").read_text(encoding="utf-8")[-500:],
                    )
                yield ServedVerifier(json.loads(line)["url"], identity["public_key"])
            finally:
                process.terminate()

    @property
    def _config(self) -> Path:
        return self._directory / "verifier" / "verifier.toml"


def _run(module: str, *arguments: str, stdin: str = "", may_fail: bool = False) -> Done:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
        env=dict(os.environ),
    )
    if ended.returncode and not may_fail:
        raise KagimoriError(
            f"{module.replace('_', '-')} {' '.join(arguments[:6])} failed.",
            code="demo.command",
            expected="exit code 0",
            found=f"{ended.returncode}: {ended.stderr.strip()}",
        )
    return Done(ended.returncode, ended.stdout, ended.stderr)
