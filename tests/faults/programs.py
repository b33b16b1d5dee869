"""Verifiers and agents as processes: started by the launcher, waited for with a bound, killed without mercy."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60
"""How long anything that must happen may take on a busy machine."""
POLL_S = 0.005


@dataclass
class Program:
    """One process. ``code`` is as subprocess has it: negative for a signal."""

    launcher: Launcher
    pid: int
    stdout: Path
    stderr: Path
    code: int | None = None

    def wait(self, seconds: float = WAIT_S) -> int:
        """Wait for the end, and give the exit code."""
        if self.code is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                ended = select.select([descriptor], [], [], seconds)[0]
            finally:
                os.close(descriptor)
            if not ended:
                raise TimeoutError(f"still runs after {seconds} s: {self.stderr.read_text()}")
            self.code = self.launcher.call({"reap": self.pid})["code"]
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> int:
        """Kill it, if it has not ended by itself."""
        self.send(signal.SIGKILL)
        return self.wait()

    def told(self) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Wait until it has printed the one JSON value that it prints, whether or not it has ended."""
        until = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                return self.json
            assert time.monotonic() < until, self.stderr.read_text()
            time.sleep(POLL_S)

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Give the one JSON value on stdout."""
        return json.loads(self.stdout.read_text())


@dataclass
class Launcher:
    """The process that starts programs. ``directory`` gets what they print."""

    directory: Path
    process: subprocess.Popen[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    @contextlib.contextmanager
    def running(cls, directory: Path) -> Iterator[Self]:
        """Start it; it ends with its stdin, and everything that it started with it."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.launcher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            launcher = cls(directory, process)
            launcher._answer()
            yield launcher
            assert process.stdin is not None
            process.stdin.close()

    def start(
        self,
        program: str,
        *arguments: str | Path,
        stdin: Path = Path(os.devnull),
        **failpoints: Any,  # noqa: ANN401 - the arguments of failpoints.arm
    ) -> Program:
        """Start ``verifier`` or ``agent`` with arguments, armed with failpoints."""
        number = next(self.numbers)
        stdout, stderr = (self.directory / f"{number}-{program}.{end}" for end in ("out", "err"))
        stderr.touch()
        stdout.touch()
        request = {
            "program": program,
            "arguments": [str(one) for one in arguments],
            "stdin": str(stdin),
            "stdout": str(stdout),
            "stderr": str(stderr),
            "failpoints": {
                name: str(value) if isinstance(value, Path) else value for name, value in failpoints.items()
            },
        }
        return Program(self, self.call(request)["pid"], stdout, stderr)

    def run(self, program: str, *arguments: str | Path, **options: Any) -> Program:  # noqa: ANN401 - as start
        """Run a program to its end."""
        started = self.start(program, *arguments, **options)
        started.wait()
        return started

    @contextlib.contextmanager
    def serving(self, directory: Path, **failpoints: Any) -> Iterator[tuple[str, Program]]:  # noqa: ANN401 - as start
        """Serve the verifier in a directory; gives its URL. Killed at the end, if it still runs."""
        arguments = ("--json", "--config", directory / "verifier.toml", "serve")
        program = self.start("verifier", *arguments, **failpoints)
        try:
            told = program.told()
            assert "url" in told, told
            yield told["url"], program
        finally:
            program.end()

    def call(self, request: dict[str, Any]) -> dict[str, int]:
        """Ask the launcher."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer
