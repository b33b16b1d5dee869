"""A target with two faults, for the tests of the fuzzers themselves: is a finding found, told, and repeatable?"""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.bounds import Bound
from tests.fuzz.mutators import parts
from tests.fuzz.target import Target

from kagimori_protocol.errors import Malformed


def run(data: bytes) -> None:
    """Accept what begins with an a; but on b it stumbles, and on c it is slow."""
    first = data[:1]
    if first == b"b":
        raise ValueError("a stray error")
    if first == b"c":
        for number in range(1 << 22):
            hash(number)
    if first != b"a":
        raise Malformed("not an a")


def seeds() -> Iterator[bytes]:
    """Give what is accepted."""
    yield b"a seed"


def worst() -> Iterator[tuple[str, bytes]]:
    """Give what is dear, and within the bounds."""
    yield "a long one", b"a" * 100


TARGET = Target(
    name="planted",
    about="a target with faults",
    bound=Bound(largest=100, cpu_ms=2, memory_mib=16, fuzzed=16),
    refusals=(Malformed,),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=lambda data, limit, _chance, mutate: parts.spliced(mutate(data, limit), 0, 0, b"")[:limit],
    covers=("kagimori_protocol.errors",),
)
