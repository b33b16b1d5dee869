"""Run the real command lines, as a person would, and read what they say."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
        """Give what went wrong in one line, as ``--json`` tells it."""
        return str(self.json()["error"]["what"])

    def session(self) -> str:
        """Give the session that the error tells the owner to look at."""
        found = re.search(r"explain ([0-9a-f]{16})", self.json()["error"].get("todo", ""))
        return found[1] if found else ""


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

    def verifier(self, *arguments: str, stdin: str = "", may_fail: bool = False) -> Done:
        """Run an administrative verb; raises KagimoriError if it fails."""
        config = [] if arguments[0] == "init" else ["--config", str(self._config)]
        return _run("kagimori_verifier", *config, *arguments, stdin=stdin, may_fail=may_fail)

    def agent(self, world: World, *arguments: str, may_fail: bool = False) -> Done:
        """Run the agent in a world; raises KagimoriError if it fails, unless it may."""
        verb, *rest = arguments
        config = str(world.directory / "agent.toml")
        return _run("kagimori_agent", verb, "--config", config, *rest, may_fail=may_fail)

    def explain(self, session: str) -> list[dict[str, Any]]:
        """Give the checks that the owner sees of a session: those of its decision, then what was not believed."""
        explained = self.verifier("explain", session, "--json", may_fail=True).json()
        refused = [
            {"id": row["code"], "ok": False, "expected": row["expected"], "found": row["found"]}
            for row in explained["refused"]
        ]
        checks: list[dict[str, Any]] = explained["checks"] + refused
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
