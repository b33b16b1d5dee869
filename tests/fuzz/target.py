"""What a fuzz target is, and the oracle that every input is held against, with atheris or without it."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tests.fuzz.bounds import Bound

from kagimori_protocol.errors import KagimoriError

Mutate = Callable[[bytes, int], bytes]
"""The engine's own mutation of bytes, to at most so many."""

Mutator = Callable[[bytes, int, random.Random, Mutate], bytes]
"""A mutation that knows the structure: input, largest size, chance, and the engine's mutation for its parts."""


@dataclass(frozen=True)
class Target:
    """One parser, or a family of them, and what must be true of it for every input.

    ``run`` returns for an input that is accepted and raises one of ``refusals`` for one that is not; anything else that
    leaves it is a finding, and so is an AssertionError, by which it says that a property does not hold.
    """

    name: str
    about: str
    bound: Bound
    refusals: tuple[type[KagimoriError], ...]
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    """Inputs that are accepted."""
    worst: Callable[[], Iterable[tuple[str, bytes]]]
    """The dearest inputs that we know, by name, for the bounds; accepted or not."""
    mutate: Mutator | None = None
    covers: tuple[str, ...] = field(default=())
    """Modules whose lines this target is there for."""


class OverBound(AssertionError):
    """One input took more than its target's bound. Not named an error: the oracle speaks in assertions."""


def accepts(target: Target, data: bytes) -> bool:
    """Tell whether an input is accepted. Whatever else than a refusal comes out is a finding."""
    try:
        target.run(data)
    except target.refusals as refusal:
        _require_told(refusal)
        return False
    return True


def accepts_within(target: Target, data: bytes, *, slower: float) -> bool:
    """Do the same within the target's bounds, as far as a fuzzer can watch them.

    CPU time of this process, ``slower`` times the bound because instrumented code is; what is over it is asked twice
    more, and counts if it is over it each time. Memory by the process's highest resident size: the input that raises
    it by more than the bound is one that took so much.
    """
    limit_s = slower * target.bound.cpu_ms / 1000
    peak_before = peak_mib()
    started = time.process_time()
    accepted = accepts(target, data)
    took_s = time.process_time() - started
    if took_s > limit_s:
        took_s = min(took_s, cpu_s(target, data), cpu_s(target, data))
        if took_s > limit_s:
            raise OverBound(f"{len(data)} bytes took {took_s * 1000:.0f} ms of CPU, of {limit_s * 1000:.0f}")
    grown = peak_mib() - peak_before
    if grown > target.bound.memory_mib:
        raise OverBound(f"{len(data)} bytes took {grown:.0f} MiB, of {target.bound.memory_mib}")
    return accepted


def cpu_s(target: Target, data: bytes) -> float:
    """Give the CPU seconds that one input takes."""
    started = time.process_time()
    accepts(target, data)
    return time.process_time() - started


def peak_mib() -> float:
    """Give the highest resident size that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _require_told(refusal: KagimoriError) -> None:
    """A refusal has a code that programs can match, and a text that is short: parts of it are the sender's."""
    assert refusal.code
    assert refusal.what
    assert len(str(refusal)) < MAX_REFUSAL, f"a refusal of {len(str(refusal))} characters"


MAX_REFUSAL = 3000
"""Characters of a refusal's text at most: messages and logs carry it, and a sender chose parts of it."""
