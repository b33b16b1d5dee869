"""One fuzzer run, seen from outside: started with its limits, watched, and its findings told so that they can be repeated."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tests.fuzz import inputs
from tests.fuzz.targets.names import load
from tests.fuzz.workshop import ROOT, STATE

INTERPRETER_MIB: Final = 512
"""What Python, the libraries and a corpus take beside an input."""
GRACE_S: Final = 120
"""How long a fuzzer may take to load its corpus and to end, on a busy machine, beyond the time that it was given."""

MOST_KEPT: Final = 500
"""Inputs that a corpus may have before it is merged."""

_STATUS: Final = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/", re.MULTILINE)
_DONE: Final = re.compile(r"^Done (\d+) runs in (\d+) second", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: how many inputs, how many edges they reach together, and what was found."""

    target: str
    executions: int
    edges: int
    features: int
    corpus: int
    seconds: float
    findings: tuple[Path, ...]
    trouble: str
    """The end of the fuzzer's output where it ended for another reason than its time; empty otherwise."""

    @property
    def good(self) -> bool:
        """Whether it ran to its end and found nothing."""
        return not self.findings and not self.trouble


def flags(name: str, seconds: int, seed: int) -> list[str]:
    """Give libFuzzer's flags; a target's bounds are among them.

    Its clock measures wall time and its memory all of the process, so both are backstops: ``accepts_within`` watches each
    input more closely. ``-malloc_limit_mb`` takes effect only below AddressSanitizer, which nothing here is built with.
    """
    bound = load(name).bound
    return [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={bound.fuzzed}",
        f"-timeout={max(10, math.ceil(bound.cpu_ms / 100))}",
        f"-rss_limit_mb={INTERPRETER_MIB + bound.memory_mib}",
        f"-malloc_limit_mb={bound.memory_mib}",
        f"-artifact_prefix={findings_of(name)}/",
        "-print_final_stats=1",
    ]


def findings_of(name: str) -> Path:
    """Give the directory of a target's findings."""
    return STATE / "findings" / name


def corpus_of(name: str) -> Path:
    """Give the directory of a target's corpus, which grows from run to run."""
    return STATE / "corpus" / name


def write_seeds(name: str, directory: Path) -> None:
    """Write a target's seeds to files, but for those that a fuzzer would cut."""
    target = load(name)
    for seed in target.seeds():
        if len(seed) <= target.bound.fuzzed:
            (directory / hashlib.sha256(seed).hexdigest()).write_bytes(seed)


def fuzz(name: str, seconds: int, seed: int, say: Callable[[str], None], every_s: float = 10) -> Outcome:
    """Fuzz one target for so long, and say every so often how far it is."""
    for directory in (corpus_of(name), findings_of(name), STATE / "log"):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(findings_of(name).iterdir())
    log = STATE / "log" / f"{name}.txt"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kagimori-fuzz-") as seeds, log.open("w") as output:
        write_seeds(name, Path(seeds))
        words = [sys.executable, "-m", "tests.fuzz.engine", name, str(corpus_of(name)), seeds]
        process = started_small(words + flags(name, seconds, seed), output)
        try:
            code = _watched(process, name, log, started + seconds + GRACE_S, say, every_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    found = tuple(sorted(set(findings_of(name).iterdir()) - before))
    done = _DONE.search(text)
    status = _last_status(text)
    return Outcome(
        target=name,
        executions=int(done[1]) if done else status[0],
        edges=status[1],
        features=status[2],
        corpus=status[3],
        seconds=time.monotonic() - started,
        findings=found,
        trouble="" if done and code == 0 else _end_of(text, code),
    )


def started_small(command: list[str], output: IO[str]) -> subprocess.Popen[bytes]:
    """Start a fuzzer as a child of a shell, in a process group of its own.

    Linux counts what a process was before exec as memory that it has had (ru_maxrss), and libFuzzer's limit is for that: the
    child of a test runner would begin with the memory of that. A shell has little.
    """
    return subprocess.Popen(
        ["sh", "-c", '"$@"; exit $?', "sh", *command],
        cwd=ROOT,
        env=os.environ | {"TSS2_LOG": "all+none"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def shrink(name: str) -> None:
    """Keep of a large corpus only what reaches something that the rest does not; loading it all would take a leg's time.

    A corpus that cannot be merged stays as it is.
    """
    corpus = corpus_of(name)
    if len(list(corpus.iterdir())) <= MOST_KEPT:
        return
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=STATE) as room:
        fresh, old = Path(room, "fresh"), Path(room, "old")
        fresh.mkdir()
        words = [sys.executable, "-m", "tests.fuzz.engine", name, "-merge=1", str(fresh), str(corpus)]
        merged = subprocess.run(
            [*words, f"-max_len={load(name).bound.fuzzed}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if merged.returncode == 0 and any(fresh.iterdir()):
            corpus.rename(old)
            fresh.rename(corpus)


def _watched(
    process: subprocess.Popen[bytes],
    name: str,
    log: Path,
    until: float,
    say: Callable[[str], None],
    every_s: float,
) -> int | None:
    """Wait for the end of a fuzzer; gives its exit code, or None where it had to be ended."""
    while True:
        try:
            return process.wait(timeout=every_s)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                return None
            executions, edges, _, corpus = _last_status(log.read_text(errors="replace"))
            say(f"{name}: {executions} inputs, {edges} edges, {corpus} in the corpus")


def _last_status(text: str) -> tuple[int, int, int, int]:
    """Read the last line in which libFuzzer told how far it is."""
    last = (0, 0, 0, 0)
    for found in _STATUS.finditer(text):
        last = (int(found[1]), int(found[2]), int(found[3]), int(found[4]))
    return last


def _end_of(text: str, code: int | None) -> str:
    """Give the part of a fuzzer's output that says why it ended."""
    start = max(text.find("=== Uncaught Python exception"), 0)
    lines = [line for line in text[start:].splitlines() if not line.startswith(("#", "INFO:", "stat::"))]
    shown = "\n".join(lines[:60] if start else lines[-30:])
    return f"{shown}\n(exit code {code})"


def told(outcome: Outcome) -> str:
    """Say what a run came to; a finding with its input, and how to repeat it."""
    rate = outcome.executions / outcome.seconds if outcome.seconds else 0
    lines = [
        f"{outcome.target}: {outcome.executions} inputs in {outcome.seconds:.0f} s ({rate:.0f}/s), {outcome.edges} edges, "
        f"{outcome.features} features, {outcome.corpus} in the corpus: "
        + ("no finding" if outcome.good else "FAILED")
    ]
    if outcome.trouble:
        lines.append(outcome.trouble)
    for path in outcome.findings:
        text = inputs.as_text(path.read_bytes())
        lines += [f"finding {path}:", text, "repeat it with:", f"./dev fuzz {outcome.target} --input {text}"]
    return "\n".join(lines)
