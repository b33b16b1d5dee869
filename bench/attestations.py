"""Attestations a second through real HTTP, beside the same cryptography bare, taken in turns in one run.

A single run says little on a machine that others use: the three are measured one after the other, several times, and the
ratio is taken within each turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import bare, serving, worlds
from bench.serving import Measured

from kagimori_protocol.messages import Kind

THREADS: Final = 16
ASKING: Final = 40
SIZES: Final = (10, 1_000, 100_000)


@dataclass(frozen=True)
class Scale:
    """How long to measure."""

    rounds: int = 3
    seconds: float = 3.0
    warm_s: float = 1.5
    bare_s: float = 1.0
    sizes: tuple[int, ...] = SIZES


TINY: Final = Scale(rounds=1, seconds=2.0, warm_s=0.5, bare_s=0.1, sizes=(10, 40))


@dataclass(frozen=True)
class Turn:
    """One turn: the bare loop (attestations a second, processor milliseconds), then one and two processes."""

    bare: tuple[float, float]
    one: Measured
    two: Measured | None

    @property
    def by_clock(self) -> float:
        """What one process on one core reaches of the bound, by the clock."""
        return self.one.per_second / self.bare[0]

    @property
    def by_processor(self) -> float:
        """The same by processor time: what a core would reach if nothing else used it and no disk were waited for."""
        return self.bare[1] / self.one.cpu_ms


def turns(directory: Path, kind: Kind, scale: Scale, *, two: bool, keep_alive: bool = False) -> list[Turn]:
    """Measure. One process has core 0 to itself, the generator core 1; two processes have a core each, shared with it."""
    world = worlds.make(directory, kind=kind, enrolled=1_000, asking=ASKING)
    measured = []
    for _ in range(scale.rounds):
        alone = bare.measure(kind, scale.bare_s)
        one = _attest(world, [0], "1", scale, keep_alive=keep_alive)
        both = _attest(world, [0, 1], "0,1", scale, keep_alive=keep_alive) if two else None
        measured.append(Turn(alone, one, both))
    return measured


def by_size(directory: Path, scale: Scale) -> dict[int, list[float]]:
    """Give processor milliseconds of an attestation for each number of enrolled VMs, in turns."""
    made = {
        size: worlds.make(directory / str(size), enrolled=size, asking=min(size, ASKING))
        for size in scale.sizes
    }
    taken: dict[int, list[float]] = {size: [] for size in made}
    for _ in range(scale.rounds):
        for size, world in made.items():
            taken[size].append(_attest(world, [0], "1", scale).cpu_ms)
    return taken


def _attest(
    world: worlds.World, cpus: Sequence[int], generator: str, scale: Scale, *, keep_alive: bool = False
) -> Measured:
    with serving.served(world, cpus) as verifiers:
        return serving.attest(
            world,
            verifiers,
            cpus=generator,
            threads=THREADS,
            seconds=scale.seconds,
            warm_s=scale.warm_s,
            keep_alive=keep_alive,
        )


def rows(kind: Kind, measured: Sequence[Turn]) -> list[str]:
    """Write what was measured of one kind as rows of a table."""
    bare_rate, bare_ms = (statistics.median(turn.bare[which] for turn in measured) for which in (0, 1))
    lines = [f"| {kind} | bare, one process | {bare_rate:.0f} | {bare_ms:.2f} | 1 | 1 | | |"]
    clock = statistics.median(turn.by_clock for turn in measured)
    processor = statistics.median(turn.by_processor for turn in measured)
    ones = [turn.one for turn in measured]
    lines.append(_row(kind, "HTTP, one process", ones, f"{clock:.2f}", f"{processor:.2f}"))
    twos = [turn.two for turn in measured if turn.two is not None]
    if twos:
        processor = statistics.median(turn.bare[1] / turn.two.cpu_ms for turn in measured if turn.two)
        lines.append(_row(kind, "HTTP, two processes", twos, "", f"{processor:.2f}"))
    return lines


def _row(kind: Kind, what: str, measured: Sequence[Measured], clock: str, processor: str) -> str:
    rate, ms, busy, generator = (
        statistics.median(getattr(one, name) for one in measured)
        for name in ("per_second", "cpu_ms", "busy", "generator")
    )
    return (
        f"| {kind} | {what} | {rate:.0f} | {ms:.2f} | {clock} | {processor} | {busy:.2f} | {generator:.2f} |"
    )
