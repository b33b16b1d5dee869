"""``./dev package``: the Debian packages of this checkout."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.boot.cache import Cache

from package import agent, deb, payload, verifier
from package.chroot import BuildError, Chroot
from package.suites import BUILT, SUITES

EXIT_FAILED = 1
EXIT_NOT_ROOT = 2
PACKAGES = {"agent": agent, "verifier": verifier}
"""What is made of a release, by the word for it; each says what its package is, and puts its files in place."""


def main(words: list[str]) -> int:
    """Build what is asked for; gives the exit code."""
    options = _parser().parse_args(words)
    if os.geteuid() != 0:
        print("package: only root can build in a release of its own: sudo ./dev package", file=sys.stderr)
        return EXIT_NOT_ROOT
    try:
        for name, what in itertools.product(options.suite or BUILT, options.only or PACKAGES):
            began = time.monotonic()
            made = build(name, options.to, what)
            print(f"package: {made} ({made.stat().st_size} bytes, {time.monotonic() - began:.0f} s)")
    except (BuildError, AssertionError) as error:
        print(f"package: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def build(name: str, to: Path, what: str = "agent") -> Path:
    """Build a package for a release; gives its path. Raises BuildError."""
    suite, package = SUITES[name], PACKAGES[what]
    cache = Cache(payload.ROOT / ".dev/package", lambda line: print(f"package: {line}", file=sys.stderr))
    fetched = cache.get(
        f"{name}.{what}.fetched",
        [suite.python, *(payload.REQUIREMENTS / f"{each}.txt" for each in (package.PROGRAM.lock, "build"))],
        lambda into: payload.fetch(package.PROGRAM, suite.python, into / "files"),
    )
    with tempfile.TemporaryDirectory(prefix="kagimori-package-") as work:
        chroot = Chroot(suite, cache, Path(work))
        files = payload.install(package.PROGRAM, chroot, fetched / "files", deb.epoch())
        payload.trim(package.PROGRAM, chroot, files)
        package.place(files)
        return deb.assemble(package.package(suite), chroot, files, to)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="./dev package",
        description="Build kagimori-agent and kagimori-verifier as .deb, each in a release of its own, the same bytes for the same commit.",
        epilog="Exit codes: 0 built, 1 a program failed, 2 usage, or not root.",
    )
    made.add_argument(
        "suite", nargs="*", type=_suite, metavar="RELEASE", help=f"default: {' and '.join(BUILT)}"
    )
    made.add_argument("--only", action="append", choices=PACKAGES, help="repeatable; default: all")
    made.add_argument(
        "--to",
        type=Path,
        default=payload.ROOT / "dist",
        metavar="DIR",
        help="where to put it (default: dist)",
    )
    return made


def _suite(text: str) -> str:
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"{text!a} is none of {', '.join(SUITES)}")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
