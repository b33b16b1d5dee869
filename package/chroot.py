"""A release of its own to build in: made by mmdebstrap once, copied for each build, and without a network while it builds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.boot.archive import archive
from tests.boot.cache import Cache
from tests.boot.images import PRIVATE_MOUNTS

from package.suites import BUILD_DEPENDS, Suite

TIMEOUT_S: Final = 1800


class BuildError(Exception):
    """A program that had to work did not; its last words are in the text."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program; give what it prints. Raises BuildError."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=dict(os.environ) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command[:5])} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


class Chroot:
    """A release to build in, at ``path``."""

    def __init__(self, suite: Suite, cache: Cache, work: Path) -> None:
        """Take the release out of ``cache``, where it is made if it is not there yet; copy it below ``work``."""
        source = archive(suite.name, cache.root)
        base = cache.get(
            f"{suite.name}.build",
            [suite.name, *BUILD_DEPENDS, *source.state()],
            lambda to: _make(suite, source.sources, to),
        )
        self.suite = suite
        self.path = work / "root"
        run(["cp", "-a", "--reflink=auto", str(base / "root"), str(self.path)])
        (self.path / "build").mkdir()

    def run(self, *command: str, **environment: str) -> str:
        """Run a program in it, with nothing of this machine's environment and no network. Raises BuildError."""
        script = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
        words = [
            "unshare",
            "--mount",
            "--net",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            str(self.path),
        ]
        kept = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/build"} | environment
        return run(["env", "-i", *(f"{name}={value}" for name, value in kept.items()), *words, *command])


def _make(suite: Suite, sources: Sequence[Path], to: Path) -> None:
    dates = [
        f"--aptopt={line.rstrip(';')}"
        for line in run(["apt-config", "dump"]).splitlines()
        if line.startswith("Acquire::Check-")  # this machine's mirror may be a snapshot
    ]
    run(
        [
            *PRIVATE_MOUNTS,
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *dates),
            *(f"--include={','.join(BUILD_DEPENDS)}", suite.name, str(to / "root"), *map(str, sources)),
        ]
    )
