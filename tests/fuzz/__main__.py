"""The fuzzers' command line; ``./dev fuzz`` starts it, and ``./dev test all`` its time-boxed leg."""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from typing import Final

from tests.fuzz import inputs
from tests.fuzz.campaign import fuzz, shrink, told
from tests.fuzz.target import Target, accepts, cpu_s
from tests.fuzz.targets.names import NAMES, load
from tests.fuzz.workshop import ROOT, amd_root

LEG_S: Final = 8
"""Seconds that each target gets in ``./dev test all``."""
PERSON_S: Final = 60
AT_ONCE: Final = 2
LEG_SEED: Final = 1
"""Chance is the same in each run of CI, as far as a clock that ends it allows."""

EXIT_FOUND: Final = 1
EXIT_USAGE: Final = 2
EXIT_STOPPED: Final = 130


def main(words: list[str]) -> int:
    """Run what was asked for; gives the exit code."""
    options = parser().parse_args(words)
    if options.list:
        for name in NAMES:
            target = load(name)
            print(f"{name:13} {target.about}")
        return 0
    names = list(NAMES) if options.target in (None, "all") else [options.target]
    if options.input is not None:
        return repeat(names, options.input)
    if options.lines:
        return run_module("tests.fuzz.lines", names)
    reason = absent()
    if reason:
        return skipped(reason)
    return campaign(names, options.seconds or (LEG_S if options.leg else PERSON_S), leg=options.leg)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="./dev fuzz",
        description="Give parsers what nobody would write, and see that nothing but their own refusals comes out.",
        epilog="Corpora and findings are kept below .dev/fuzz. Example: ./dev fuzz eventlog 600",
    )
    made.add_argument(
        "target", nargs="?", choices=(*NAMES, "all"), help="what to fuzz (default: all, two at a time)"
    )
    made.add_argument(
        "seconds", nargs="?", type=positive, help=f"how long, for each target (default: {PERSON_S})"
    )
    made.add_argument(
        "--input", metavar="HEX|FILE", help="try one input on the target and say what becomes of it"
    )
    made.add_argument(
        "--lines", action="store_true", help="tell which lines of the parsers the corpora reach"
    )
    made.add_argument("--list", action="store_true", help="tell which targets there are")
    made.add_argument("--leg", action="store_true", help=argparse.SUPPRESS)
    return made


def positive(text: str) -> int:
    """Read a number of seconds."""
    seconds = int(text)
    if seconds < 1:
        raise ValueError(text)
    return seconds


def absent() -> str:
    """Say why there is no fuzzer here; empty where there is one."""
    if importlib.util.find_spec("atheris") is not None:
        return ""
    python = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    return f"atheris has no wheel for {python} (requirements/fuzz.in), and is not built here"


def skipped(reason: str) -> int:
    """Skip, saying why; but not in CI on the machine that wheels are made for."""
    print(f"fuzz: skipped: {reason}", flush=True)
    if os.environ.get("CI") == "true" and platform.machine() == "x86_64":
        print("fuzz: FAILED: in CI on x86_64 the fuzzers must run", flush=True)
        return EXIT_FOUND
    return 0


def campaign(names: list[str], seconds: int, *, leg: bool) -> int:
    """Fuzz targets, two at a time; gives 1 if anything was found."""
    lock = threading.Lock()
    started = time.monotonic()

    def say(text: str) -> None:
        with lock:
            print(f"fuzz: {text}", flush=True)

    for product in ("Milan", "Turin"):
        amd_root(product)  # made here once, which takes seconds, not by two fuzzers at once
    seed = LEG_SEED if leg else int.from_bytes(os.urandom(4), "big") | 1
    say(f"{', '.join(names)}: {seconds} s each, seed {seed}")
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(fuzz, name, seconds, seed, say, 1e9 if leg else 10) for name in names]
        outcomes = []
        for done in concurrent.futures.as_completed(running):
            outcomes.append(done.result())
            say(told(outcomes[-1]))
    if not leg:
        for name in names:
            shrink(name)
    failed = [outcome.target for outcome in outcomes if not outcome.good]
    say(
        f"{len(outcomes)} targets in {time.monotonic() - started:.0f} s: "
        + (f"FAILED: {', '.join(failed)}" if failed else "no finding")
    )
    return EXIT_FOUND if failed else 0


def repeat(names: list[str], text: str) -> int:
    """Try one input on one target, and say what becomes of it."""
    if len(names) != 1:
        print("fuzz: --input needs a target: ./dev fuzz TARGET --input HEX", file=sys.stderr)
        return EXIT_USAGE
    try:
        data = inputs.from_text(text)
    except ValueError as error:
        print(f"fuzz: the input is neither a file nor hexadecimal: {error}", file=sys.stderr)
        return EXIT_USAGE
    os.environ["TSS2_LOG"] = "all+none"
    return tried(load(names[0]), data)


def tried(target: Target, data: bytes) -> int:
    """Say of one input whether it is accepted, refused or a finding."""
    try:
        accepted = accepts(target, data)
    except Exception:  # noqa: BLE001 - whatever it is, it is the finding
        traceback.print_exc()
        print(f"fuzz: {target.name}: {len(data)} bytes: a finding, as above")
        return EXIT_FOUND
    took_ms = cpu_s(target, data) * 1000
    print(
        f"fuzz: {target.name}: {len(data)} bytes: {'accepted' if accepted else 'refused'}, {took_ms:.1f} ms of CPU"
    )
    return 0


def run_module(module: str, words: list[str]) -> int:
    """Run a module in a process of its own, which has imported nothing yet."""
    return subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # the fuzzers had it too, and have ended; their corpora are kept
        print("fuzz: stopped", file=sys.stderr)
        code = EXIT_STOPPED
    sys.exit(code)
