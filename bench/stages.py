"""Where the time of one attestation goes inside a verifier, without HTTP: by stage, each without what it calls of others.

Functions of the product are wrapped in this process while it measures; nothing is measured in the product itself.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

from bench.guest import Attempt, SoftwareTpm
from bench.worlds import World

from kagimori_protocol import messages, sealing, signature, tpm
from kagimori_protocol.sealing import ResponseKey
from kagimori_verifier import app, pipeline, token
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.facts import StoredFacts
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store

OTHER: Final = "rest"
STAGES: Final = (
    "decode",
    "token",
    "facts",
    "endorsements",
    "report",
    "ak",
    "quote",
    "event log",
    "appraisal",
    "ledger and commit",
    "unwrap",
    "credential",
    "seal",
    "sign",
    OTHER,
)
"""In the order of PROTOCOL.md section 6."""


Times = tuple[float, float]
"""Milliseconds by the clock and of the processor."""


@dataclass
class Clock:
    """Time by stage: what runs inside another stage is taken from that one."""

    spent: dict[str, Times] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0.0)))
    _running: list[str] = field(default_factory=list)
    _since: Times = (0.0, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as this stage."""
        self._mark()
        self._running.append(name)
        try:
            yield
        finally:
            self._mark()
            self._running.pop()

    def _mark(self) -> None:
        now = (time.perf_counter() * 1000, time.thread_time() * 1000)
        if self._running:
            before = self.spent[self._running[-1]]
            self.spent[self._running[-1]] = (
                before[0] + now[0] - self._since[0],
                before[1] + now[1] - self._since[1],
            )
        self._since = now


@contextlib.contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    """Wrap the functions that are stages."""
    with contextlib.ExitStack() as stack:
        for place, name, stage in (
            (messages, "decode", "decode"),
            (token, "read", "token"),
            (token, "issue", "token"),
            (StoredFacts, "policy", "facts"),
            (StoredFacts, "vm", "facts"),
            (StoredFacts, "measurement", "facts"),
            (StoredFacts, "roots", "facts"),
            (EndorsementDirectory, "find", "endorsements"),
            (pipeline, "verify_report", "report"),
            (pipeline, "verify_ak", "ak"),
            (pipeline, "verify_quote", "quote"),
            (pipeline, "_verify_log", "event log"),
            (pipeline, "appraise", "appraisal"),
            (UnlockKeys, "unwrap", "unwrap"),
            (UnlockKeys, "unwrap_confirm_key", "unwrap"),
            (UnlockKeys, "wrap_confirm_key", "unwrap"),
            (tpm, "make_credential", "credential"),
            (sealing, "seal", "seal"),
            (signature, "sign", "sign"),
        ):
            wrapped = _wrapped(clock, getattr(place, name), stage)
            stack.enter_context(mock.patch.object(place, name, wrapped))
        write = Store.write

        @contextlib.contextmanager
        def watched_write(self: Store) -> Iterator[Any]:
            with clock.stage("ledger and commit"), write(self) as txn:
                yield txn

        stack.enter_context(mock.patch.object(Store, "write", watched_write))
        yield


def _wrapped(clock: Clock, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes and gives
        with clock.stage(stage):
            return function(*arguments, **named)

    return timed


def profile(world: World, rounds: int) -> dict[str, Times]:
    """Give the median times of each stage of one attestation, in one thread."""
    verifier = app.open_verifier(world.settings())
    vtpm = SoftwareTpm() if world.kind == "svsm-vtpm" else None
    machine, key = world.machine(), ResponseKey([bytes(range(64))])
    seen: dict[str, list[Times]] = {stage: [] for stage in STAGES}
    try:
        for number in range(-2 * len(world.asking), rounds):
            vm = world.asking[number % len(world.asking)]
            attempt, clock = Attempt(vm, vtpm, key), Clock()
            service = verifier.service
            with _watched(clock):
                with clock.stage(OTHER):
                    challenge = service.challenge(attempt.hello, "127.0.0.1").body
                evidence = attempt.evidence(world.on(machine, vm), verifier.keys.current, challenge)
                with clock.stage(OTHER):
                    sealed = service.release(evidence, "127.0.0.1").body
                confirm = attempt.confirm(sealed)
                with clock.stage(OTHER):
                    service.confirm(confirm, "127.0.0.1")
            if number >= 0:  # before that, everything is seen for the first times
                for stage in STAGES:
                    seen[stage].append(clock.spent[stage])
    finally:
        verifier.close()
    return {
        stage: (statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times))
        for stage, times in seen.items()
    }


def rows(profiled: dict[str, Times]) -> list[str]:
    """Write a profile as rows of a table."""
    wall, cpu = (sum(times[which] for times in profiled.values()) for which in (0, 1))
    lines = [
        f"| {stage} | {times[0]:.2f} | {times[1]:.3f} | {times[1] / cpu:.0%} |"
        for stage, times in profiled.items()
        if times[0]
    ]
    return [*lines, f"| **all** | {wall:.2f} | {cpu:.3f} | |"]
