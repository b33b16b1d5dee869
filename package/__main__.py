"""``./dev package``: the Debian packages of this checkout."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.boot.cache import Cache

from package import agent, deb, payload
from package.chroot import BuildError, Chroot
from package.suites import BUILT, SUITES

EXIT_FAILED = 1
EXIT_NOT_ROOT = 2


def main(words: list[str]) -> int:
    """Build what is asked for; gives the exit code."""
    options = _parser().parse_args(words)
    if os.geteuid() != 0:
        print("package: only root can build in a release of its own: sudo ./dev package", file=sys.stderr)
        return EXIT_NOT_ROOT
    try:
        for name in options.suite or BUILT:
            began = time.monotonic()
            made = build(name, options.to)
            print(f"package: {made} ({made.stat().st_size} bytes, {time.monotonic() - began:.0f} s)")
    except (BuildError, AssertionError) as error:
        print(f"package: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def build(name: str, to: Path) -> Path:
    """Build the agent's package for a release; gives its path. Raises BuildError."""
    suite = SUITES[name]
    cache = Cache(payload.ROOT / ".dev/package", lambda line: print(f"package: {line}", file=sys.stderr))
    fetched = cache.get(
        f"{name}.fetched",
        [suite.python, *(payload.REQUIREMENTS / f"{each}.txt" for each in ("agent", "build"))],
        lambda into: payload.fetch(suite.python, into / "files"),
    )
    with tempfile.TemporaryDirectory(prefix="kagimori-package-") as work:
        chroot = Chroot(suite, cache, Path(work))
        files = payload.install(chroot, fetched / "files", deb.epoch())
        payload.trim(chroot, files)
        agent.place(files)
        return deb.assemble(agent.package(suite), chroot, files, to)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="./dev package",
        description="Build kagimori-agent as a .deb, in a release of its own, the same bytes for the same commit.",
        epilog="Exit codes: 0 built, 1 a program failed, 2 usage, or not root.",
    )
    made.add_argument(
        "suite", nargs="*", type=_suite, metavar="RELEASE", help=f"default: {' and '.join(BUILT)}"
    )
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
